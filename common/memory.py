"""How much memory the KV cache may take."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from common.config import ModelConfig

# On the CPU, memory is shared with everything else and pages are only taken when touched.
_CPU_SHARE = 0.25
_CPU_MOST_BYTES = 4 << 30


def num_kv_tokens_that_fit(
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    gpu_memory_utilization: float,
    profile: Callable[[], None],
) -> int:
    """Tokens whose keys and values fit beside the weights and one step's activations.

    Args:
        profile: runs the largest step the engine means to run, with the model loaded and no cache;
            what it allocates at its peak is kept free.

    Raises:
        ValueError: nothing is left for a cache.
    """
    if device.type == "cuda":
        budget = _cuda_budget(device, gpu_memory_utilization, profile)
    else:
        budget = min(int(available_bytes() * _CPU_SHARE), _CPU_MOST_BYTES)
    num_tokens = budget // model.kv_bytes_per_token(dtype.itemsize)
    if num_tokens < 1:
        raise ValueError(
            f"no memory is left for the KV cache (budget {budget / 2**20:.0f} MiB): raise "
            "gpu_memory_utilization, lower max_num_batched_tokens, or take a smaller model"
        )
    return num_tokens


def _cuda_budget(device: torch.device, utilization: float, profile: Callable[[], None]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    profile()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # What this process holds outside torch (the CUDA context), and what other processes hold.
    elsewhere = total - free - torch.cuda.memory_reserved(device)
    return int(total * utilization) - elsewhere - peak


def allocate_kv_cache(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Zeros for keys or values; on the CPU pages are taken only when they are touched.

    Raises:
        ValueError: there is not that much memory, or the cache has no room at all.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0:
        raise ValueError("the KV cache has no room for a single block: give it more memory")
    try:
        if device.type != "cpu":
            return torch.zeros(*shape, dtype=dtype, device=device)
        # torch.zeros would write every page; numpy has them from the system, zeroed on first use.
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(*shape)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(
            f"no memory for a KV cache of {num_bytes / 2**30:.1f} GiB on {device}: lower "
            "max_model_len, or the size of the cache where it was given"
        ) from error


def available_bytes() -> int:
    """Memory of this machine that could be taken now, in bytes."""
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: half of what the machine has is a cautious guess
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

"""The least time a piece of work can take on a machine, from its bytes and its FLOPs.

    cost = work_cost(config, dtype_bytes=2, lengths=[(128, 129)])
    cost.seconds(Ceilings(read_bytes_per_s=4.3e12, flops_per_s=686e12))

Whatever an engine does, it reads the weights once in every step and the cached keys and values once
for every token it generates, and it multiplies. Both can go on at the same time, so the bound is
the larger of bytes / bandwidth and FLOPs / peak (Williams et al., "Roofline", CACM 2009). Writes
and activations are not counted: they are small, and a bound must not claim too much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from common.config import ModelConfig
from common.layers import Linear


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at its best."""

    read_bytes_per_s: float
    flops_per_s: float
    source: str = "measured"  # or "given"


@dataclass(frozen=True)
class Cost:
    """Bytes to read and floating point operations to make, at least."""

    bytes: int
    flops: int

    def seconds(self, ceilings: Ceilings) -> float:
        """The least time this takes."""
        return max(self.bytes / ceilings.read_bytes_per_s, self.flops / ceilings.flops_per_s)

    def bound(self, ceilings: Ceilings) -> str:
        """Which of the two takes longer: "bytes" or "flops"."""
        reading = self.bytes / ceilings.read_bytes_per_s
        return "bytes" if reading >= self.flops / ceilings.flops_per_s else "flops"


def weight_bytes(config: ModelConfig, dtype_bytes: int, saved_bytes: int = 0) -> int:
    """Bytes of weights that one step reads: all but an untied embedding, of which it takes rows.

    Args:
        saved_bytes: by which quantized linear layers are smaller in their checkpoint than in this
            dtype. An engine that keeps them in a larger form reads more than it would have to.
    """
    parts = config.num_parameters()
    if not config.tie_word_embeddings:
        del parts["embed"]
    return sum(parts.values()) * dtype_bytes - saved_bytes


def kv_bytes(config: ModelConfig, dtype_bytes: int, lengths: Iterable[tuple[int, int]]) -> int:
    """Bytes of cached keys and values that decoding reads.

    Args:
        lengths: prompt and output length of every request. The first output token comes from the
            prefill, whose keys and values were just made; the token at position p, counted from 1,
            reads p of them.
    """
    num_reads = sum((n - 1) * p + n * (n - 1) // 2 for p, n in lengths)
    return num_reads * config.kv_bytes_per_token(dtype_bytes)


def work_cost(
    config: ModelConfig,
    dtype_bytes: int,
    lengths: Sequence[tuple[int, int]],
    *,
    saved_bytes: int = 0,
) -> Cost:
    """What serving these requests costs an engine that runs all of them at the same time.

    Then the steps are as many as the longest output has tokens, which no engine can undercut: a
    token needs the one before it. Arguments as ``kv_bytes`` and ``weight_bytes``.
    """
    flops = sum(config.flops(p + n - 1, p + n - 1, n) for p, n in lengths)
    num_steps = max(n for _, n in lengths)
    return steps_cost(
        config, dtype_bytes, lengths, num_steps=num_steps, flops=flops, saved_bytes=saved_bytes
    )


def steps_cost(
    config: ModelConfig,
    dtype_bytes: int,
    lengths: Iterable[tuple[int, int]],
    *,
    num_steps: int,
    flops: int,
    saved_bytes: int = 0,
) -> Cost:
    """What it costs in the steps an engine took: the weights once in each, and its own FLOPs."""
    weights = num_steps * weight_bytes(config, dtype_bytes, saved_bytes)
    return Cost(weights + kv_bytes(config, dtype_bytes, lengths), flops)


def decode_step_cost(
    config: ModelConfig,
    dtype_bytes: int,
    batch_size: int,
    input_len: int,
    output_len: int,
    *,
    saved_bytes: int = 0,
) -> Cost:
    """One token for each of ``batch_size`` requests, at the mean context from the second output
    token to the last (rounded down)."""
    context_len = input_len + output_len // 2
    read = batch_size * context_len * config.kv_bytes_per_token(dtype_bytes)
    flops = batch_size * config.flops(1, context_len, 1)
    return Cost(weight_bytes(config, dtype_bytes, saved_bytes) + read, flops)


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> Ceilings:
    """Time a sum over a large tensor and a large matrix product, each for about ``seconds``.

    The best of the repetitions counts: a ceiling is what the machine can do, not what it does on
    average. The product is timed both plain and as the engines' linear layer, whose packed weights
    are faster on some CPUs.
    """
    on_gpu = device.type == "cuda"
    # Far larger than any cache; the product large enough for the peak and short enough to repeat.
    num_bytes, size = (4 << 30, 8192) if on_gpu else (512 << 20, 2048)
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    reading = _fastest(data.sum, device, seconds)
    del data

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    linear = Linear(size, [size], False, name="ceiling", dtype=dtype, device=device)
    linear.load_shard("weight", 0, b)
    linear.finish_loading()
    multiplying = min(
        _fastest(lambda: a @ b, device, seconds), _fastest(lambda: linear(a), device, seconds)
    )
    return Ceilings(num_bytes / reading, 2 * size**3 / multiplying)


def _fastest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call, after one to warm up."""
    work()
    begin = time.perf_counter()
    best = _timed(work, device)
    while time.perf_counter() - begin < seconds:
        best = min(best, _timed(work, device))
    return best


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3

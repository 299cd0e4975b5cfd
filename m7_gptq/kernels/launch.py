"""The host side that the kernels share: argument checks, number of splits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Enough programs to keep each multiprocessor's memory queue full; more only adds partial results.
PROGRAMS_PER_MULTIPROCESSOR = 4
# A split shorter than this costs more in the combine step than it wins in parallelism.
MIN_TOKENS_PER_SPLIT = 256


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter, one program after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_num_splits(device: torch.device, programs: int, max_context: int) -> int:
    """Into how many pieces to cut each context so that ``programs`` times that fills the GPU.

    It depends on shapes only, never on the lengths, which live on the device: reading them would
    stall the CPU until the GPU has caught up. A kernel cuts each sequence by its own length.
    """
    wanted = PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(device) // max(programs, 1)
    return max(1, min(wanted, max_context // MIN_TOKENS_PER_SPLIT))


def check_cache(k_cache: Tensor, v_cache: Tensor) -> None:
    """Raise ValueError unless both are contiguous ``[num_blocks, block_size, Hkv, D]`` alike."""
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            "k_cache and v_cache must both be [num_blocks, block_size, Hkv, D], "
            f"got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous: allocate them whole")


def check_reshape_and_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Raise ValueError on arguments that a kernel would misread."""
    check_cache(k_cache, v_cache)
    tokens = slot_mapping.shape[0]
    for name, x in (("k", k), ("v", v)):
        if x.shape != (tokens, *k_cache.shape[2:]) or x.dtype != k_cache.dtype:
            raise ValueError(
                f"{name} must be [{tokens}, Hkv, D] of the cache {list(k_cache.shape)} in "
                f"{k_cache.dtype}, got {list(x.shape)} in {x.dtype}"
            )
        _check_rows(name, x)
    if slot_mapping.dtype != torch.int64:
        raise ValueError(f"slot_mapping must be int64, got {slot_mapping.dtype}")


def check_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
) -> None:
    """Raise ValueError on arguments that a kernel would misread."""
    check_cache(k_cache, v_cache)
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    if head_dim != k_cache.shape[3] or num_heads % num_kv_heads or q.dtype != k_cache.dtype:
        raise ValueError(
            f"q {list(q.shape)} in {q.dtype} does not fit the cache {list(k_cache.shape)} in "
            f"{k_cache.dtype}: head size and dtype must be equal and Hq a multiple of Hkv"
        )
    _check_rows("q", q)
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {list(q.shape)} in {q.dtype}, "
            f"got {list(out.shape)} in {out.dtype}"
        )
    if block_tables.dtype != torch.int32 or context_lens.dtype != torch.int32:
        raise ValueError(
            "block_tables and context_lens must be int32, "
            f"got {block_tables.dtype} and {context_lens.dtype}"
        )
    if block_tables.shape[0] != batch or context_lens.shape != (batch,):
        raise ValueError(
            f"block_tables must be [{batch}, max_blocks] and context_lens [{batch}], "
            f"got {list(block_tables.shape)} and {list(context_lens.shape)}"
        )
    if block_tables.stride(1) != 1:
        raise ValueError("block_tables must be contiguous in its last dimension")


def _check_rows(name: str, x: Tensor) -> None:
    """``x`` ``[T, heads, D]`` may be a slice of packed QKV, but a token's heads lie together."""
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        raise ValueError(
            f"{name}: the heads of one token must be contiguous, got strides {x.stride()}"
        )

"""Paged attention in CUDA C++ (``paged_attention.cu``): built on first use, called through ctypes.

``nvcc`` makes a shared library with a plain C interface, for the GPU and the head size at hand
(``common.nvcc``).
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from common.nvcc import NO_NVCC, build_library, find_nvcc

from .launch import check_paged_attention, check_reshape_and_cache, choose_num_splits

SOURCE = Path(__file__).with_name("paged_attention.cu")
MAX_HEAD_DIM = 256
MAX_HEADS = 4  # query heads that one thread block serves
VECTOR_BYTES = 16  # of one load
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
INSTEAD = "use attention_backend='triton', which needs no compiler of CUDA's"


def require_nvcc() -> None:
    """Raises RuntimeError where there is no nvcc, and says what to do without it."""
    if find_nvcc() is None:
        raise RuntimeError(f"{NO_NVCC}, or {INSTEAD}")


def build(arch: str, head_dim: int) -> Path:
    """The library for ``arch`` (like ``sm_90``) and ``head_dim``, unless an earlier run built it.

    Raises:
        RuntimeError: there is no nvcc, or it failed; the message has its output.
    """
    flags = (f"-arch={arch}", f"-DHEAD_SIZE={head_dim}")
    try:
        return build_library(SOURCE, f"paged_attention_{arch}_{head_dim}", flags)
    except RuntimeError as error:
        raise RuntimeError(f"{error}\nUntil that is mended, {INSTEAD}") from None


@lru_cache
def load_library(device: torch.device, head_dim: int) -> ctypes.CDLL:
    """The kernels for ``device`` and ``head_dim``, built if need be.

    Raises:
        ValueError: there can be no kernel for this head size.
        RuntimeError: as ``build`` does.
    """
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"the CUDA kernels serve head sizes that are multiples of 8 up to {MAX_HEAD_DIM}, "
            f"not {head_dim}: {INSTEAD}"
        )
    major, minor = torch.cuda.get_device_capability(device)
    library = ctypes.CDLL(str(build(f"sm_{major}{minor}", head_dim)))
    library.folovllm_paged_attention.argtypes = [
        c_int,  # dtype
        *[c_void_p] * 8,  # q, caches, tables, lengths, out, partial, log sums
        c_float,  # scale
        *[c_int] * 5,  # batch, heads, KV heads, block size, splits
        *(c_int64, c_int64, c_void_p),  # strides of q and tables, stream
    ]
    library.folovllm_reshape_and_cache.argtypes = [
        *[c_void_p] * 5,  # k, v, caches, slots
        *(c_int, c_int64, c_int64, c_int, c_void_p),  # tokens, strides, row, stream
    ]
    library.folovllm_error_string.argtypes = [c_int]
    library.folovllm_error_string.restype = c_char_p
    return library


def _check(library: ctypes.CDLL, error: int) -> None:
    if error:
        text = library.folovllm_error_string(error).decode()
        raise RuntimeError(f"a CUDA kernel could not be launched: {text}")


def _row_stride(name: str, x: Tensor) -> int:
    """Distance of two tokens' rows in 16-byte vectors, which all loads are made of."""
    stride = x.stride(0) * x.element_size()
    if stride % VECTOR_BYTES or x.data_ptr() % VECTOR_BYTES:
        raise ValueError(f"{name}: every token's row must start at a multiple of 16 bytes")
    return stride // VECTOR_BYTES


def reshape_and_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See ``reference.reshape_and_cache``; ``k`` and ``v`` may be slices of packed QKV."""
    check_reshape_and_cache(k, v, k_cache, v_cache, slot_mapping)
    tokens, num_kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    library = load_library(k.device, head_dim)
    with torch.cuda.device_of(k):
        error = library.folovllm_reshape_and_cache(
            k.data_ptr(),
            v.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slot_mapping.data_ptr(),
            tokens,
            _row_stride("k", k),
            _row_stride("v", v),
            num_kv_heads * head_dim * k.element_size() // VECTOR_BYTES,
            torch.cuda.current_stream().cuda_stream,
        )
    _check(library, error)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """See ``reference.paged_attention``; ``num_splits`` overrides how a context is cut."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check_paged_attention(q, k_cache, v_cache, block_tables, context_lens, out)
    batch, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    if q.dtype not in DTYPES:
        raise ValueError(f"the CUDA kernels serve {', '.join(map(str, DTYPES))}, not {q.dtype}")
    if batch == 0:
        return out
    if num_splits is None:
        group = num_heads // num_kv_heads
        thread_blocks = batch * num_kv_heads * math.ceil(group / MAX_HEADS)
        max_context = block_tables.shape[1] * block_size
        num_splits = choose_num_splits(q.device, thread_blocks, max_context)

    partial = log_sums = None
    if num_splits > 1:
        shape = (batch, num_heads, num_splits, head_dim)
        partial = torch.empty(shape, dtype=torch.float32, device=q.device)
        log_sums = torch.empty(shape[:-1], dtype=torch.float32, device=q.device)
    library = load_library(q.device, head_dim)
    with torch.cuda.device_of(q):
        error = library.folovllm_paged_attention(
            DTYPES[q.dtype],
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            block_tables.data_ptr(),
            context_lens.data_ptr(),
            out.data_ptr(),
            None if partial is None else partial.data_ptr(),
            None if log_sums is None else log_sums.data_ptr(),
            scale * math.log2(math.e),
            batch,
            num_heads,
            num_kv_heads,
            block_size,
            num_splits,
            q.stride(0),
            block_tables.stride(0),
            torch.cuda.current_stream().cuda_stream,
        )
    _check(library, error)
    return out

"""Products with weights of 4 bits on a GPU, at the speed of memory for few rows.

    weights = repack_int4(codes, zeros, scales, group_size=128, dtype=torch.bfloat16)   # at load
    y = int4_linear(x, weights, bias)                   # x[M, K] -> [M, N]
    if uses_dequantize(len(x), N, K):                   # many rows: cuBLAS pays
        y = F.linear(x, dequantize_int4(weights, out=scratch), bias)

With few rows, a product costs what reading its weight costs, and 4 bits are read in a fourth of the
time. The kernels (``int4_few_rows``, ``int4_many_rows``) turn them into numbers in registers; with
one row tensor cores are idle seven eighths of the time, and still faster than multiplying and
adding by the number.

Results do not depend on timing: sums that several programs share are added by the last of them,
always in the same order. It knows by counters, of `common.ops.matmul`, which each launch leaves at
zero; all launches of a device share them, so they go on one stream, or one graph, at a time.

What `repack_int4` and `int4_linear_reference` say needs no Triton: they are in ``int4_layout``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.ops.launch import INTERPRETED, launch
from common.ops.layout import ALIGNMENT, aligned
from common.ops.matmul import MAX_SPLIT_TILES, zeroed_counters

from .int4_dequantize import int4_dequantize_kernel
from .int4_few_rows import int4_few_rows_kernel
from .int4_layout import OFFSETS, WINDOW, Int4Weights, int4_linear_reference, repack_int4
from .int4_many_rows import ORDERED_INPUTS, int4_many_rows_kernel, order_inputs_kernel
from .int4_tiling import Tiling, choose_tiling, uses_dequantize

__all__ = [
    "Int4Weights",
    "Tiling",
    "choose_tiling",
    "dequantize_int4",
    "int4_linear",
    "int4_linear_reference",
    "repack_int4",
    "uses_dequantize",
]

DTYPES = (torch.bfloat16, torch.float16)
DEQUANTIZE_WARPS = 4


def int4_linear(
    x: Tensor,
    weights: Int4Weights,
    bias: Tensor | None = None,
    *,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """x[M, K] @ weight[N, K].T + bias[N] -> [M, N] in x's dtype, summed in float32.

    The twin is ``int4_linear_reference``.

    Args:
        x: any number of rows, contiguous; where ``uses_dequantize`` says so, there is a faster way.
        weights: for x's dtype and device.
        pdl: begin before the previous kernel has ended (see ``common.ops.launch``).
        tiling: instead of what ``choose_tiling`` says, to measure it.

    Raises:
        ValueError: arguments that do not go together.
    """
    _check(x, weights, bias)
    x, bias = aligned(x), None if bias is None else aligned(bias)
    rows, inputs, features = len(x), weights.in_features, weights.out_features
    y = x.new_empty((rows, features))
    if rows == 0:
        return y
    row_tiles, k_tiles = weights.words.shape[:2]
    parts = weights.scales.shape[2]
    how = tiling or choose_tiling(rows, features, k_tiles, weights.tiles_per_block, parts)
    if how.tiles > weights.tiles_per_block:
        raise ValueError(f"{how} takes more tiles at a time than the weight's blocks have")
    if how.stages and how.tiles * parts > weights.tiles_per_block:
        raise ValueError(f"{how} takes more tiles at a time than have the same scale")
    grid = (-(-rows // how.tile_m), -(-features // how.features), how.splits)
    partial, counters = y, y
    if how.splits > 1:
        if grid[0] * grid[1] > MAX_SPLIT_TILES:
            raise ValueError(f"{how} cuts {[rows, features]} into too many tiles to split them")
        shape = (how.splits, rows, grid[1] * how.features)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        counters = zeroed_counters(x.device)
    early = pdl and not INTERPRETED
    if how.stages:
        x = _ordered(x, early)
        inputs = x.shape[1]
    # A kernel never reads what its flags say is missing; any tensor stands in for it.
    args = (x, weights.words, weights.scales, *_or_any(weights.zeros, bias, x), y)
    layout = (features, inputs, row_tiles, k_tiles, weights.tiles_per_block, parts)
    cut = (how.tile_m, how.tiles, how.warps, how.steps(k_tiles))
    cut += (how.stages, how.splits) if how.stages else (how.splits,)
    flags = (weights.zeros is None, bias is not None, early, not INTERPRETED)
    launch(
        int4_many_rows_kernel if how.stages else int4_few_rows_kernel,
        grid,
        (*args, partial, counters, rows),
        (*layout, OFFSETS[weights.dtype], *cut, *flags),
        num_warps=how.warps,
        num_stages=max(1, how.stages),
        max_registers=how.max_registers,
        pdl=early,
    )
    return y


def dequantize_int4(weights: Int4Weights, out: Tensor | None = None) -> Tensor:
    """The weight [N, K] in its dtype, each number rounded once; into ``out`` if there is one.

    Raises:
        ValueError: an ``out`` of another shape, dtype or device.
    """
    shape = (weights.out_features, weights.in_features)
    if out is None:
        out = torch.empty(shape, dtype=weights.dtype, device=weights.device)
    _check_tensor("out", out, shape, weights)
    if not INTERPRETED and out.data_ptr() % ALIGNMENT:
        raise ValueError(f"out must start at a multiple of {ALIGNMENT} bytes")
    row_tiles, k_tiles = weights.words.shape[:2]
    launch(
        int4_dequantize_kernel,
        (row_tiles, -(-k_tiles // (2 * DEQUANTIZE_WARPS)), 1),
        (weights.words, weights.scales, *_or_any(weights.zeros, out), out),
        (
            *shape, row_tiles, k_tiles, weights.tiles_per_block, weights.scales.shape[2],
            OFFSETS[weights.dtype], DEQUANTIZE_WARPS, weights.zeros is None, not INTERPRETED,
        ),
        num_warps=DEQUANTIZE_WARPS,
    )  # fmt: skip
    return out


def _ordered(x: Tensor, pdl: bool) -> Tensor:
    """x[M, K] as `int4_many_rows_kernel` takes it, with K rounded up to windows."""
    rows, inputs = x.shape
    width = -(-inputs // WINDOW) * WINDOW
    ordered = x.new_empty((rows, width))
    launch(
        order_inputs_kernel,
        (rows, -(-width // ORDERED_INPUTS.value), 1),
        (x, ordered),
        (inputs, width, pdl),
        num_warps=4,
        pdl=pdl,
    )
    return ordered


def _or_any(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """All but the last, which stands in for those that are missing."""
    return tuple(tensors[-1] if tensor is None else tensor for tensor in tensors[:-1])


def _check(x: Tensor, weights: Int4Weights, bias: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [M, {weights.in_features}], not {list(x.shape)}")
    _check_tensor("x", x, (len(x), weights.in_features), weights)
    if bias is not None:
        _check_tensor("bias", bias, (weights.out_features,), weights)
    if weights.dtype not in DTYPES and not INTERPRETED:
        raise ValueError(f"no kernel for activations in {weights.dtype}, only {[*DTYPES]}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], weights: Int4Weights) -> None:
    if tensor.shape != shape or tensor.dtype != weights.dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {list(shape)} {weights.dtype}, not {list(tensor.shape)} "
            f"{tensor.dtype} with strides {tensor.stride()}"
        )
    if tensor.device != weights.device:
        raise ValueError(f"{name} is on {tensor.device}, the weights are on {weights.device}")
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError("these kernels need a CUDA device; elsewhere, use int4_linear_reference")

"""Matrix products of a decode step: 1 to 128 rows times a large weight, at the speed of memory.

    y = skinny_linear(x, weight)                                       # F.linear(x, weight)
    y, total = skinny_norm_linear(x, residual, norm_weight, eps, weight, silu_mul=True)

With so few rows a weight is read once and multiplied a few times: a product takes 3 us, and how
soon its loads are under way decides. cuBLAS, made for large products, is far from the memory's
bandwidth on some of these shapes. ``pays`` and ``norm_pays`` tell where these kernels
(``common.ops.matmul_kernels``) are expected to win; their plain twins are the methods of
``common.layers.Ops``.

Where the outputs are too few to occupy a GPU, the sums over K are split among programs; the last
one of a tile to arrive adds up the parts, always in the same order: results do not depend on
timing. The counters that tell it so are shared by a device's launches: one stream at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from common.ops.launch import INTERPRETED, launch
from common.ops.matmul_kernels import few_rows_kernel, many_rows_kernel, single_row_kernel

MAX_ROWS = 128
FEW_ROWS = 16  # rows of x that a single tile of tensor cores takes
MAX_SPLIT_TILES = 4096
WEIGHTS_PER_WARP = 4096  # under way to registers: 64 of each thread's
LARGE_VOCABULARY = 65536
LONG_ROWS = 4096  # K from which reading a row of the weight takes long enough to loop over it


@dataclass(frozen=True)
class Tiling:
    """How a product is cut into programs. N counts the rows of the weight, gate and up apart."""

    kernel: Literal["single", "few", "many"]  # rows it takes: 1, up to FEW_ROWS, up to MAX_ROWS
    tile_n: int  # of a program
    tile_k: int  # at a time
    warps: int
    depth: int  # tiles of weights under way: in registers, or "many": in the pipeline
    splits: int = 1  # programs that share the sums over K; "single": 1
    prefetch: int = 0  # "many", launched early: of a program's K, in the L2 cache ahead of x


@cache
def choose_tiling(rows: int, features: int, in_features: int, norm: bool = False) -> Tiling:
    """What was fastest on an H200, or near it (``python -m dev.bench kernels --suite matmul``).

    At least one or two programs for each of its 132 multiprocessors, with as many of their weights
    under way as registers hold.
    """
    steps = -(-in_features // 1024)
    if rows == 1:
        if in_features >= LONG_ROWS:
            return Tiling("single", 4, 2048, 8, min(-(-in_features // 2048), 4))
        return Tiling("single", 2 if features <= 2048 else 8, 1024, 4, min(steps, 4))
    large = features >= LARGE_VOCABULARY or _is_large(features, in_features)
    if rows <= FEW_ROWS and (norm or not large):
        if features <= 2048 or in_features > 1024:
            return Tiling("few", 16, 1024, 4, min(steps, 3))
        if features <= 4096:
            return Tiling("few", 32, 1024, 4, 1)
        return Tiling("few", 32, 512, 4, 2)
    if rows <= FEW_ROWS:
        return Tiling("many", 32, 128, 4, 4)
    tile_n = 32 if features > 4096 else 16
    programs, splits = -(-features // tile_n), 1
    while splits < 8 and splits * programs < 128 and 2 * splits * 128 <= in_features:
        splits *= 2
    if programs * splits < 256 and features <= 1024:
        splits *= 2
    prefetch = min(512, 1 << (in_features // splits).bit_length() - 1)
    return Tiling("many", tile_n, 128 if rows <= 64 else 64, 4, 4, splits, prefetch)


def _is_large(features: int, in_features: int) -> bool:
    """Whether a product is as in a model of 8B: cuBLAS is good at these."""
    return in_features >= LONG_ROWS and features > in_features


def pays(rows: int, features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether ``skinny_linear`` is expected to beat cuBLAS on x[rows, K] and weight[N, K]."""
    if dtype not in (torch.bfloat16, torch.float16) or in_features % 8:
        return False  # weights whose rows are not whole 16-byte pieces load slowly
    if rows == 1:
        return True
    if in_features >= LONG_ROWS:
        return rows <= 8 and features <= in_features
    return rows <= (FEW_ROWS if features >= LARGE_VOCABULARY else 64)


def norm_pays(rows: int, features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether ``skinny_norm_linear`` is expected to beat a kernel for each of its two parts."""
    fits = rows == 1 and in_features <= max_norm_features(rows)
    return fits and pays(rows, features, in_features, dtype)


def max_norm_features(rows: int) -> int:
    """The longest rows ``skinny_norm_linear`` takes: each program holds them in registers."""
    return 8192 if rows == 1 else 2048


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu_mul: bool = False,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """x[M, K] @ weight[N, K].T + bias[N] -> [M, N] in x's dtype, summed in float32.

    Args:
        x: 1 to ``MAX_ROWS`` rows. All arguments are contiguous, of one dtype and on one GPU.
        silu_mul: the weight is gate over up; return silu(gate) * up, [M, N // 2].
        pdl: begin before the previous kernel has ended (see ``common.ops.launch``).
        tiling: instead of what ``choose_tiling`` says, to measure it.

    Raises:
        ValueError: arguments that do not go together, or too many rows.
    """
    return _multiply(x, None, None, 0.0, weight, bias, silu_mul, pdl, tiling)[0]


def skinny_norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu_mul: bool = False,
    pdl: bool = False,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """``skinny_linear`` of rms_norm(x + residual) * norm_weight; returns it and x + residual.

    Args:
        x, residual: [M, K] with M up to ``FEW_ROWS``, K up to ``max_norm_features(M)``. The sum
            is a new tensor, as some programs may still be reading when the first has it; without
            a residual it is x itself.
        norm_weight: [K].

    Raises:
        ValueError: arguments that do not go together, or rows too many or too long for the norm.
    """
    return _multiply(x, residual, norm_weight, eps, weight, bias, silu_mul, pdl, tiling)


def _multiply(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    silu_mul: bool,
    pdl: bool,
    tiling: Tiling | None,
) -> tuple[Tensor, Tensor]:
    _check(x, residual, norm_weight, weight, bias, silu_mul)
    rows, in_features = x.shape
    features = weight.shape[0]
    pdl = pdl and not INTERPRETED
    normed, added, biased = norm_weight is not None, residual is not None, bias is not None
    how = tiling or choose_tiling(rows, features, in_features, normed)
    tiles = -(-features // how.tile_n)

    y = x.new_empty((rows, features // 2 if silu_mul else features))
    total = torch.empty_like(x) if added else x
    partial, counters = y, y
    if how.splits > 1:
        if tiles > MAX_SPLIT_TILES:
            raise ValueError(f"{how} cuts {features} features into too many tiles to split them")
        shape = (how.splits, rows, tiles * how.tile_n)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        counters = zeroed_counters(x.device)
    # A kernel never reads what its flags say is missing; any tensor stands in for it.
    residual = x if residual is None else residual
    norm_weight = x if norm_weight is None else norm_weight
    bias = x if bias is None else bias

    # Rows that tensor cores take: as the right side from 8, as the left from 16; from 64 on those
    # of a Hopper GPU work on the whole warp group's behalf, which is faster even when half empty.
    at_least = 8 if how.kernel == "few" else 16 if rows <= FEW_ROWS else 64
    tile_m = max(at_least, 1 << (rows - 1).bit_length())
    flags = (normed, added, biased, silu_mul, pdl)
    grid = (tiles, how.splits, 1)
    if how.kernel == "single":
        args = (x, residual, norm_weight, weight, bias, y, total, eps)
        constants = (features, in_features, how.tile_n, how.tile_k, how.depth, *flags)
        launch(single_row_kernel, grid, args, constants, num_warps=how.warps, pdl=pdl)
    elif how.kernel == "few":
        args = (x, residual, norm_weight, weight, bias, y, total, partial, counters, eps, rows)
        sizes = (features, in_features, tile_m, how.tile_n, how.tile_k, how.depth)
        constants = (*sizes, how.warps, how.splits, *flags)
        launch(few_rows_kernel, grid, args, constants, num_warps=how.warps, pdl=pdl)
    else:
        args = (x, weight, bias, y, partial, counters, rows)
        sizes = (features, in_features, tile_m, how.tile_n, how.tile_k, how.depth)
        constants = (*sizes, how.prefetch, how.splits, biased, silu_mul, pdl)
        launch(many_rows_kernel, grid, args, constants, num_warps=how.warps, pdl=pdl)
    return y, total


def _check(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    silu_mul: bool,
) -> None:
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(f"x must be 1 to {MAX_ROWS} rows [M, K], not {list(x.shape)}")
    rows, in_features = x.shape
    if norm_weight is not None and (rows > FEW_ROWS or in_features > max_norm_features(rows)):
        raise ValueError(
            f"x{[rows, in_features]} is too large to be normalised inside a product; "
            "normalise it first"
        )
    if weight.dim() != 2 or (silu_mul and weight.shape[0] % 2):
        raise ValueError(
            f"weight must be [N, K], or gate over up equally long, not {list(weight.shape)}"
        )
    for name, tensor, shape in (
        ("x", x, x.shape),
        ("residual", residual, x.shape),
        ("norm_weight", norm_weight, (in_features,)),
        ("weight", weight, (weight.shape[0], in_features)),
        ("bias", bias, (weight.shape[0],)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {list(shape)} {x.dtype}, not {list(tensor.shape)} "
                f"{tensor.dtype} with strides {tensor.stride()}"
            )
    if not (x.is_cuda or INTERPRETED):
        raise ValueError("these kernels need a CUDA device; use torch.nn.functional.linear")


@cache
def zeroed_counters(device: torch.device) -> Tensor:
    """A zero per tile, [MAX_SPLIT_TILES] int32; every kernel leaves them as it found them.

    Raises:
        ValueError: made while a CUDA graph is captured, where it would only be zero in replays.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError("run a product that is split once before capturing it in a CUDA graph")
    counters = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return counters

"""The product with 4-bit weights for few rows in CUDA C++ (``int4_few_rows.cu``).

    kernel.prepare(device)          # while a model is loaded: builds the library on first use
    if serves(len(x), weights):     # else Triton does
        y = few_rows_linear(x, weights, bias, pdl=True)     # x[M, K] -> [M, N], M <= 16
    kernel.why_not(device)          # what keeps it from serving, or None

Copies into shared memory that a thread block starts and does not wait for, and thread blocks that
exchange sums, are what Triton does not offer: with them a weight arrives at the speed of memory.
Where the library cannot be built or used, Triton's kernels compute the same.
"""

from __future__ import annotations

from ctypes import c_int
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .cuda_library import (
    DTYPES,
    MOST_SHARED,
    PRODUCT,
    SIZES,
    CudaLibrary,
    Ready,
    check_product,
    product_arguments,
)
from .int4_layout import MULTIPROCESSORS, PLANES, WINDOW, Int4Weights

SOURCE = Path(__file__).with_name("int4_few_rows.cu")
MAX_ROWS = 16
PIECES = (1, 2, 4)  # windows that one warp multiplies
WINDOW_BYTES = 1024  # of four planes of 16 rows
SLOT_BYTES = 1200  # about the same with scales and zero points; 1408 with a part for each window
SOME_SHARED = 112 << 10  # with many rows: what is not there cannot hold up x
AHEAD = 24 << 10  # and one slot more: with more than that, requests wait for each other

# What `choose_cut` compares, in bytes of weights that arrive in the same time.
CLUSTER_COST = {1: 0, 2: 46 << 10, 4: 24 << 10, 8: 25 << 10}  # sums are exchanged
PIECE_COST = {1: 8 << 10, 2: 0, 4: 4 << 10}  # short: more sums to add; long: a longer last step
FEW_WARPS_COST = 4 << 10
X_COST = 0.4  # of a byte of x, which comes from the L2 cache


@dataclass(frozen=True)
class Cut:
    """How a product is cut into thread blocks and warps: see the source."""

    clusters: int
    size: int  # thread blocks of a cluster, which share K
    windows: int  # of a warp's piece
    warps_n: int  # groups of warps that share K
    finishers: int  # warps
    shared: int = MOST_SHARED  # bytes at most
    ahead: int = AHEAD  # bytes that are under way at least


def nvcc_flags(major: int, minor: int) -> tuple[str, ...]:
    """Raises RuntimeError: such a GPU lacks what the kernel is made of."""
    if major < 9:
        raise RuntimeError(f"it needs a GPU of Hopper's generation or later, not sm_{major}{minor}")
    return (f"-arch=sm_{major}{minor}",)


# Its own: the cut, and PDL.
kernel = CudaLibrary(SOURCE, "folovllm_int4_few_rows", [*PRODUCT, *[c_int] * 8], nvcc_flags)


def serves(rows: int, weights: Int4Weights) -> bool:
    """Whether the kernel is ready for this product and expected to be faster than Triton's."""
    ready = kernel.ready(weights.device)
    return (
        ready is not None
        and weights.dtype in DTYPES
        and pays(rows, weights.out_features)
        and _cut(rows, weights, ready) is not None
    )


@lru_cache(maxsize=4096)
def pays(rows: int, features: int) -> bool:
    """Whether the kernel is expected to be faster than Triton's.

    A thread block has whole tiles of 16 rows of the weight, so with two to three tiles for each
    multiprocessor many wait for the last one. With one row, and with more than eight, the two
    differ by a few per cent, either way; with two tiles for each (8B's o) Triton is up to 11 %
    faster at 4 and 8 rows (``dev.bench kernels --suite int4``).
    """
    per_multiprocessor = -(-features // 16) / MULTIPROCESSORS
    uneven = 2.0 < per_multiprocessor < 3.0 and 1 < rows <= 8
    return 0 < rows <= MAX_ROWS and not uneven


def few_rows_linear(
    x: Tensor,
    weights: Int4Weights,
    bias: Tensor | None = None,
    *,
    pdl: bool = False,
    cut: Cut | None = None,
) -> Tensor:
    """x[M, K] @ weight[N, K].T + bias[N] -> [M, N] in x's dtype, summed in float32.

    The twin is ``int4_linear_reference``.

    Args:
        x: 1 to 16 rows, contiguous, starting at a multiple of 16 bytes.
        weights: for x's dtype and device.
        pdl: begin before the previous kernel has ended (see ``common.ops.launch``).
        cut: instead of what ``choose_cut`` says, to measure it.

    Raises:
        RuntimeError: the kernel is not ready on this device, or cannot serve this product.
        ValueError: x or bias does not fit the weight.
    """
    check_product(x, weights, bias)
    if not 0 < len(x) <= MAX_ROWS:
        raise ValueError(f"x must have 1 to {MAX_ROWS} rows, not {len(x)}")
    ready = kernel.require(x.device)
    cut = cut or _cut(len(x), weights, ready)
    if cut is None:
        raise RuntimeError(
            f"the CUDA kernel has no room for a weight of {weights.in_features} inputs"
        )
    y = x.new_empty((len(x), weights.out_features))
    how = (cut.clusters, cut.size, cut.windows, cut.warps_n, cut.finishers, cut.shared, cut.ahead)
    kernel.launch(x.device, *product_arguments(x, weights, bias, y), *how, pdl)
    return y


@lru_cache(maxsize=4096)
def choose_cut(
    rows: int,
    tiles: int,
    windows_in_all: int,
    windows_of_part: int,
    common: bool,
    at_once: tuple[int, ...],
) -> Cut | None:
    """What reads the least on the busiest multiprocessor: its weights, and its share of x.

    None if nothing fits: with very many inputs, and scales or zero points that are not common.

    Args:
        rows: of x, 1 to 16.
        tiles: of 16 rows of the weight.
        windows_in_all: of a tile: of 32 inputs of each plane.
        windows_of_part: of them, those that share their scales.
        common: scales in float16, every zero point 8.
        at_once: clusters of 1, 2, 4 and 8 thread blocks that the GPU runs at once.
    """
    cuts = possible_cuts(rows, tiles, windows_in_all, windows_of_part, common, at_once)
    return min(cuts, key=lambda pair: pair[0])[1] if cuts else None


def possible_cuts(
    rows: int,
    tiles: int,
    windows_in_all: int,
    windows_of_part: int,
    common: bool,
    at_once: tuple[int, ...],
) -> list[tuple[float, Cut]]:
    """(cost, cut) of all that fit into registers and shared memory; see `choose_cut`."""
    columns = 1 if rows <= 8 else 2
    cuts = []
    for size, most in zip(SIZES, at_once, strict=True):
        if not most:
            continue
        tiles_each = -(-tiles // most)
        for width in PIECES:
            pieces = windows_in_all // width
            if width > windows_of_part or pieces < size:
                continue
            warps_k = -(-pieces // size)
            room = most_warps(width, columns, common) - 1  # without the producer
            finishers = min(3, tiles_each, room - warps_k)
            share = warps_k * width
            shared = share * SLOT_BYTES + tiles_each * (24 + 512 * columns) + 8192
            if finishers < min(2, tiles_each) or shared > MOST_SHARED:
                continue
            warps_n = max(1, min(-(-8 // warps_k), (room - finishers) // warps_k, tiles_each))
            cost = tiles_each * share * WINDOW_BYTES + CLUSTER_COST[size] + PIECE_COST[width]
            cost += X_COST * share * PLANES * WINDOW * 2 * rows * warps_n
            cost += FEW_WARPS_COST * (warps_k * warps_n < 8)
            clusters = -(-tiles // tiles_each)
            some = columns == 2 and shared + 2 * share * SLOT_BYTES < SOME_SHARED
            most_shared = SOME_SHARED if some else MOST_SHARED
            cuts.append((cost, Cut(clusters, size, width, warps_n, finishers, most_shared)))
    return cuts


def _cut(rows: int, weights: Int4Weights, ready: Ready) -> Cut | None:
    tiles, k_tiles = weights.words.shape[:2]
    common = weights.zeros is None and weights.scales.dtype == torch.float16
    part = weights.part // WINDOW
    return choose_cut(rows, tiles, k_tiles // 2, part, common, ready.at_once)


def most_warps(windows: int, columns: int, common: bool) -> int:
    """Of a thread block: `most_threads` in the source."""
    held = windows * columns
    if held == 8:
        return 8
    if held == 4:
        return 16 if common else 12
    return 16 if columns == 2 else 20 if held == 2 else 24

"""The product with 4-bit weights for more than a few rows, on Hopper (``int4_wgmma.cu``).

    kernel.prepare(device)          # while a model is loaded: builds the library on first use
    if serves(len(x), weights):     # else Triton does, or cuBLAS
        y = many_rows_linear(x, weights, bias, pdl=True)    # x[M, K] -> [M, N]
    kernel.why_not(device)          # what keeps it from serving, or None

Hopper's tensor cores take one side of a product from registers. There weights become numbers, while
products with others run: with many rows that is hidden, and no weight is ever written to memory in
full precision.
"""

from __future__ import annotations

from ctypes import c_int
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from .cuda_library import (
    DTYPES,
    PRODUCT,
    SIZES,
    CudaLibrary,
    check_product,
    product_arguments,
)
from .int4_layout import PLANES, ROWS, Int4Weights

SOURCE = Path(__file__).with_name("int4_wgmma.cu")
FEW_ROWS = 8  # where others are faster: tiles have 32 rows of x
BOX_INPUTS = 64  # neighbours that are copied at once: of one plane
STAGE_INPUTS = PLANES * BOX_INPUTS
GROUP_ROWS = 64  # of the weight, of a group of four warps
MOST_GROUPS = {32: 4, 64: 4, 128: 3, 256: 2}  # by rows of x of a tile

# Microseconds on an H200, for `choose_cut`, fitted to trials that no committed report holds. By
# rows of x of a tile: a stage with one group, and what each further group adds.
STAGE = {32: (0.75, 0.43), 64: (0.84, 0.47), 128: (1.0, 0.51), 256: (1.4, 0.75)}
STORE = 0.8  # for 64 rows of x, and each group
SPLIT = 1.7  # thread blocks exchange sums


@dataclass(frozen=True)
class Cut:
    """How a product is cut into tiles and thread blocks: see the source."""

    tokens: int  # rows of x of a tile
    groups: int  # of four warps with 64 rows of the weight each
    split: int = 1  # thread blocks that share K


def nvcc_flags(major: int, minor: int) -> tuple[str, ...]:
    """Raises RuntimeError: such a GPU lacks these instructions, or has others instead."""
    if (major, minor) != (9, 0):
        raise RuntimeError(f"it needs a GPU of Hopper's generation, not sm_{major}{minor}")
    return ("-gencode=arch=compute_90a,code=sm_90a", "--split-compile=0")  # all processors


# Its own: a cut and the most thread blocks, whether the next kernel begins at once, and PDL.
kernel = CudaLibrary(SOURCE, "folovllm_int4_wgmma", [*PRODUCT, *[c_int] * 6], nvcc_flags)


def serves(rows: int, weights: Int4Weights) -> bool:
    """Whether the kernel is ready for this product, and it has enough rows."""
    return rows > FEW_ROWS and serves_all(weights)


def serves_all(weights: Int4Weights) -> bool:
    """Whether the kernel is ready for this weight, with any number of rows."""
    fits = weights.dtype in DTYPES and weights.plane % BOX_INPUTS == 0
    return fits and kernel.ready(weights.device) is not None


def many_rows_linear(
    x: Tensor,
    weights: Int4Weights,
    bias: Tensor | None = None,
    *,
    pdl: bool = False,
    next_at_once: bool = False,
    cut: Cut | None = None,
) -> Tensor:
    """x[M, K] @ weight[N, K].T + bias[N] -> [M, N] in x's dtype, summed in float32.

    Numbers of the weight are rounded to x's dtype: once, if their scales are in float16. Of scales
    in float32, what two numbers of x's dtype cannot hold is lost; with x in float16 that is more
    below 2**-10. For x in float16 numbers must be in its range. The twin is
    ``int4_linear_reference``.

    Args:
        x: one row or more, contiguous, starting at a multiple of 16 bytes.
        weights: for x's dtype and device, with planes of 64 inputs or more.
        pdl: begin before the previous kernel has ended (see ``common.ops.launch``).
        next_at_once: let the kernel after this one begin at once, not when the last tile has been
            multiplied. A large one's thread blocks would gather on the few multiprocessors that
            this one leaves free.
        cut: instead of what ``choose_cut`` says, to measure it.

    Raises:
        RuntimeError: the kernel is not ready on this device, or there is no such cut.
        ValueError: x or bias does not fit the weight, or the weight not the kernel.
    """
    check_product(x, weights, bias)
    if not len(x):
        raise ValueError("x must have a row at least")
    if weights.plane % BOX_INPUTS:
        raise ValueError(f"planes must have {BOX_INPUTS} inputs or more, not {weights.plane}")
    at_once = kernel.require(x.device).at_once
    tiles, k_tiles = weights.words.shape[:2]
    cut = cut or choose_cut(len(x), tiles, k_tiles * 64 // STAGE_INPUTS, at_once)
    y = x.new_empty((len(x), weights.out_features))
    how = (cut.tokens, cut.groups, cut.split, at_once[0], next_at_once, pdl)
    kernel.launch(x.device, *product_arguments(x, weights, bias, y), *how)
    return y


@lru_cache(maxsize=4096)
def choose_cut(rows: int, row_tiles: int, stages: int, at_once: tuple[int, ...]) -> Cut:
    """The fastest, by the times above.

    Args:
        rows: of x.
        row_tiles: of 16 rows of the weight.
        stages: of 256 inputs of the weight.
        at_once: clusters of 1, 2, 4 and 8 thread blocks that the GPU runs at once.
    """
    return min(possible_cuts(rows, row_tiles, stages, at_once), key=lambda pair: pair[0])[1]


def possible_cuts(
    rows: int, row_tiles: int, stages: int, at_once: tuple[int, ...]
) -> list[tuple[float, Cut]]:
    """(microseconds, cut) of all that may pay; see `choose_cut`."""
    cuts = []
    for tokens, most_groups in MOST_GROUPS.items():
        if tokens < min(rows, 64) or tokens >= 2 * max(rows, 32):
            continue
        for groups in range(1, most_groups + 1):
            tiles = -(-row_tiles * ROWS // (GROUP_ROWS * groups)) * -(-rows // tokens)
            for split, most in zip(SIZES, at_once, strict=True):
                if split == 1 or (split <= stages and tiles <= most):
                    rounds, first, further = -(-tiles // most), *STAGE[tokens]
                    stage = first + (groups - 1) * further
                    us = rounds * (-(-stages // split) * stage + STORE * tokens * groups / 64)
                    cuts.append((us + SPLIT * (split > 1), Cut(tokens, groups, split)))
    return cuts

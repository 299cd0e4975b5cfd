"""The product with 4-bit weights for more than a few rows of x: tiles, a pipeline, tensor cores.

A program has tiles of 16 rows of the weight, one for each warp, and all warps share the rows of x.
It goes along K in steps. While it multiplies one, what the next ones need is on its way to shared
memory. From there words go to the registers of the threads that multiply them, just as they lie in
memory: on Hopper the tensor cores take their left side from registers. Their right side they read
from shared memory, in the order of the words. x comes in that order already: another kernel has
written it so (``order_inputs_kernel``), once for all programs.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl

from common.ops.matmul_kernels import let_next_begin, prefetch, wait_for_inputs

from .int4_parts import finish_sums, load_scales, load_words, split_planes, unpack, word_places

ORDERED_INPUTS = tl.constexpr(1024)  # of a row, by one program


@triton.jit
def order_inputs_kernel(
    x,  # [M, K]
    ordered,  # [M, WIDTH]
    K: tl.constexpr,
    WIDTH: tl.constexpr,  # K in whole windows
    PDL: tl.constexpr,
):
    """x with the 32 inputs of each window in the order of words.

    In memory they are c, u, hi, h (``int4_parts``), and fragments have them as u, hi, c, h.
    """
    let_next_begin(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * ORDERED_INPUTS + tl.arange(0, ORDERED_INPUTS)
    values = tl.load(x + row * K + k, mask=k < K, other=0.0)
    values = values.reshape([ORDERED_INPUTS // 32, 4, 4, 2]).permute(0, 2, 1, 3)
    tl.store(ordered + row * WIDTH + k, values.reshape([ORDERED_INPUTS]), mask=k < WIDTH)


@triton.jit
def load_inputs(
    x,
    rows,
    step,
    plane: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """x of a step's plane as the right side of a product, [TILES * 16, TILE_M]."""
    tile = step * TILES
    k = tile // BLOCK * (BLOCK * 64) + plane * (BLOCK * 16) + tile % BLOCK * 16
    k += tl.arange(0, TILES * 16)[None, :]
    m = tl.arange(0, TILE_M)[:, None]
    inside = m < rows
    if MASKED:
        inside = inside & (k < WIDTH)
    return tl.load(x + m * WIDTH + k, mask=inside, other=0.0).trans()


@triton.jit(do_not_specialize=["all_rows"])
def int4_many_rows_kernel(
    x,  # [M, WIDTH], by order_inputs_kernel
    words,  # int16, scales, zeros: of Int4Weights
    scales,
    zeros,
    bias,  # BIAS: [N]
    y,  # [M, N]
    partial,  # SPLITS > 1: float32 [SPLITS, M, N rounded up to tiles]
    counters,  # SPLITS > 1: int32, a zero for each program's rows of the weight
    all_rows,  # M
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_TILES: tl.constexpr,  # tiles of 16 rows in all
    K_TILES: tl.constexpr,  # tiles of 64 inputs in all
    BLOCK: tl.constexpr,  # tiles of 64 inputs of a block
    PARTS: tl.constexpr,  # groups of a block's plane
    OFFSET: tl.constexpr,  # that nibbles are read with
    TILE_M: tl.constexpr,  # rows of x of a program, a multiple of 8
    TILES: tl.constexpr,  # tiles of 64 inputs of a step, of one group: BLOCK / PARTS or fewer
    WARPS: tl.constexpr,  # with 16 rows of the weight each
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,  # steps under way, and the one that is computed
    SPLITS: tl.constexpr,  # programs that share the sums over K
    SYMMETRIC: tl.constexpr,  # every zero point is 8
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """y = x @ weight.T + bias."""
    D: tl.constexpr = x.dtype.element_ty
    ROWS: tl.constexpr = 16 * WARPS  # of the weight
    MASKED: tl.constexpr = STEPS * SPLITS * TILES * 64 != WIDTH
    let_next_begin(PDL)
    m_before = tl.program_id(0) * TILE_M  # neighbours read the same weights
    row_tile = tl.program_id(1) * WARPS
    first_step = tl.program_id(2) * STEPS
    rows = all_rows - m_before
    x += m_before.to(tl.int64) * WIDTH
    if PDL and ASSEMBLY:
        for step in tl.static_range(STAGES):
            run = first_step + step
            prefetch(words + word_places(row_tile, run, ROW_TILES, K_TILES, TILES, WARPS, 1))
    wait_for_inputs(PDL)

    sums = tl.zeros([WARPS, 2, 8, TILE_M // 8, 4, 2], tl.float32)
    for step in tl.range(first_step, first_step + STEPS, num_stages=STAGES):
        packed = load_words(words, row_tile, step, ROW_TILES, K_TILES, TILES, WARPS, 1)
        packed = packed.reshape([TILES, WARPS, 32, 2, 4])
        scale, zero = load_scales(
            scales, zeros, row_tile, step,
            ROW_TILES, K_TILES, BLOCK, PARTS, TILES, WARPS, 1, SYMMETRIC,
        )  # fmt: skip
        inputs = ()
        for plane in tl.static_range(4):
            inputs += (load_inputs(x, rows, step, plane, WIDTH, MASKED, BLOCK, TILES, TILE_M),)
        for plane in tl.static_range(4):
            factor = split_planes(scale)[plane]
            # Only loads that lead to a side of a product are fetched ahead. So scales lead there,
            # for nothing.
            beside = factor.to(D).reshape([1, WARPS, 32, 2, 1])
            if SYMMETRIC:
                offset = tl.full([1, 1, 1, 1, 1], -(OFFSET + 8), D)
            else:
                offset = split_planes(zero)[plane].reshape([1, WARPS, 32, 2, 1])
            left = unpack(packed, offset, beside, plane, OFFSET, ASSEMBLY)
            # window, u, warp, g, c, r, hi, h -> rows, inputs
            left = left.reshape([TILES // 2, 2, WARPS, 8, 4, 2, 2, 2])
            left = left.permute(2, 5, 3, 0, 1, 6, 4, 7).reshape([ROWS, TILES * 16])
            product = tl.dot(left, inputs[plane], input_precision="ieee")
            product = product.reshape([WARPS, 2, 8, TILE_M // 8, 4, 2])
            factor = factor.reshape([WARPS, 8, 4, 2]).permute(0, 3, 1, 2)
            sums += product * factor.reshape([WARPS, 2, 8, 1, 4, 1]).to(tl.float32)
    finish_sums(
        sums.reshape([ROWS, TILE_M]), bias, y, partial, counters, all_rows, m_before,
        row_tile * 16, N, ROWS, TILE_M, SPLITS, BIAS,
    )  # fmt: skip

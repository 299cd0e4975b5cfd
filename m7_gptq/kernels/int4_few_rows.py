"""The product with 4-bit weights for few rows of x: everything is under way at once.

A program has 16 rows of the weight; its warps share their inputs. All its words go to registers
before it looks at x, as in `common.ops.matmul_kernels`: with one row of x a product takes as long
as its weight takes to arrive, and that is fastest when all of it has been asked for. No number goes
from one thread to another before the sums are done: no shared memory, and no warp that waits for
another.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl

from common.ops.matmul_kernels import let_next_begin

from .int4_parts import finish_sums, load_scales, load_words, split_planes, unpack


@triton.jit
def load_inputs(
    x,
    rows,
    run,
    plane: tl.constexpr,
    K: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    WARPS: tl.constexpr,
):
    """x of a plane as the right side of the products: [parts * warps, inputs of a part, TILE_M]."""
    PARTS_HERE: tl.constexpr = (TILES * PARTS + BLOCK - 1) // BLOCK
    WINDOWS: tl.constexpr = TILES // 2
    i = tl.arange(0, TILE_M // 8 * WINDOWS * WARPS * 32)[:, None]
    m = i // (32 * WARPS * WINDOWS) * 8 + i % 32 // 4
    tile = (run + i // 32 % WARPS) * TILES
    k = tile // BLOCK * (BLOCK * 64) + plane * (BLOCK * 16) + tile % BLOCK * 16
    k += i // (32 * WARPS) % WINDOWS * 32 + i % 4 * 8 + tl.arange(0, 8)[None, :]
    inside = m < rows
    if MASKED:
        inside = inside & (k < K)
    values = tl.load(x + m * K + k, mask=inside, other=0.0)
    # m high, part, window of the part, warp, m low, c, u, hi, h
    shape: tl.constexpr = [TILE_M // 8, PARTS_HERE, WINDOWS // PARTS_HERE, WARPS, 8, 4, 2, 2, 2]
    values = values.reshape(shape).permute(1, 3, 2, 6, 7, 5, 8, 0, 4)
    return values.reshape([PARTS_HERE * WARPS, TILES * 16 // PARTS_HERE, TILE_M])


@triton.jit
def multiply(
    sums,  # float32 [WARPS, 2 r, 8 g, TILE_M // 8, 4 c, 2]
    words,
    scale,  # and zero: by load_scales
    zero,
    inputs,  # by load_inputs, of AT_ONCE planes
    first: tl.constexpr,  # of the planes
    AT_ONCE: tl.constexpr,
    PARTS_HERE: tl.constexpr,
    OFFSET: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Add products of some planes: each warp those of its own tiles, each group's scaled once."""
    D: tl.constexpr = inputs[0].dtype
    PART_TILES: tl.constexpr = TILES // PARTS_HERE
    packed = words.reshape([PARTS_HERE, PART_TILES, WARPS, 32, 2, 4])
    for plane in tl.static_range(first, first + AT_ONCE):
        if SYMMETRIC:
            offset = tl.full([1, 1, 1, 1, 1, 1], -(OFFSET + 8), D)
        else:
            offset = split_planes(zero)[plane].reshape([PARTS_HERE, 1, WARPS, 32, 2, 1])
        left = unpack(packed, offset, offset, plane, OFFSET, ASSEMBLY)
        # part, window, u, warp, g, c, r, hi, h
        left = left.reshape([PARTS_HERE, PART_TILES // 2, 2, WARPS, 8, 4, 2, 2, 2])
        left = left.permute(0, 3, 6, 4, 1, 2, 7, 5, 8)
        left = left.reshape([PARTS_HERE * WARPS, 16, PART_TILES * 16])
        product = tl.dot(left, inputs[plane - first], input_precision="ieee")
        product = product.reshape([PARTS_HERE, WARPS, 2, 8, product.shape[2] // 8, 4, 2])
        factor = split_planes(scale)[plane].to(tl.float32)
        factor = factor.reshape([PARTS_HERE, WARPS, 8, 4, 2]).permute(0, 1, 4, 2, 3)
        factor = factor.reshape([PARTS_HERE, WARPS, 2, 8, 1, 4, 1])
        sums += tl.sum(product * factor, axis=0)
    return sums


@triton.jit(do_not_specialize=["all_rows"])
def int4_few_rows_kernel(
    x,  # [M, K]
    words,  # int16, scales, zeros: of Int4Weights
    scales,
    zeros,
    bias,  # BIAS: [N]
    y,  # [M, N]
    partial,  # SPLITS > 1: float32 [SPLITS, M, N rounded up to 16]
    counters,  # SPLITS > 1: int32, a zero for each program's rows of the weight
    all_rows,  # M
    N: tl.constexpr,
    K: tl.constexpr,
    ROW_TILES: tl.constexpr,  # tiles of 16 rows in all
    K_TILES: tl.constexpr,  # tiles of 64 inputs in all
    BLOCK: tl.constexpr,  # tiles of 64 inputs of a block
    PARTS: tl.constexpr,  # groups of a block's plane
    OFFSET: tl.constexpr,  # that nibbles are read with
    TILE_M: tl.constexpr,  # rows of x of a program, a multiple of 8
    TILES: tl.constexpr,  # tiles of 64 inputs of a warp in a step, at most BLOCK
    WARPS: tl.constexpr,  # that share the sums over K
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the sums over K
    SYMMETRIC: tl.constexpr,  # every zero point is 8
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """y = x @ weight.T + bias."""
    PARTS_HERE: tl.constexpr = (TILES * PARTS + BLOCK - 1) // BLOCK
    MASKED: tl.constexpr = STEPS * SPLITS * WARPS * TILES * 64 != K
    # As many planes of x at a time as 32 registers hold.
    AT_ONCE: tl.constexpr = max(1, min(4, 128 // (TILES * TILE_M)))
    let_next_begin(PDL)
    m_before = tl.program_id(0) * TILE_M  # neighbours read the same weights
    row_tile = tl.program_id(1)
    first_run = tl.program_id(2) * (STEPS * WARPS)
    rows = all_rows - m_before
    x += m_before.to(tl.int64) * K

    held = ()  # words, scale, zero of each step
    for step in tl.static_range(STEPS):
        run = first_run + step * WARPS
        held += (load_words(words, row_tile, run, ROW_TILES, K_TILES, TILES, 1, WARPS),)
        held += load_scales(
            scales, zeros, row_tile, run,
            ROW_TILES, K_TILES, BLOCK, PARTS, TILES, 1, WARPS, SYMMETRIC,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    else:
        tl.debug_barrier()  # else the compiler puts the loads off until they are needed

    sums = tl.zeros([WARPS, 2, 8, TILE_M // 8, 4, 2], tl.float32)
    for step in tl.static_range(STEPS):
        run = first_run + step * WARPS
        for first in tl.static_range(0, 4, AT_ONCE):
            inputs = ()
            for plane in tl.static_range(first, first + AT_ONCE):
                inputs += (
                    load_inputs(x, rows, run, plane, K, MASKED, BLOCK, PARTS, TILES, TILE_M, WARPS),
                )
            # Always true, which the compiler does not know: else it would load x little by little,
            # as if it were in the nearest cache, and wait for it as often.
            if rows > 0:
                sums = multiply(
                    sums, held[3 * step], held[3 * step + 1], held[3 * step + 2], inputs, first,
                    AT_ONCE, PARTS_HERE, OFFSET, TILES, WARPS, SYMMETRIC, ASSEMBLY,
                )  # fmt: skip
    result = tl.sum(sums.reshape([WARPS, 16, TILE_M]), axis=0)
    finish_sums(
        result, bias, y, partial, counters, all_rows, m_before, row_tile * 16,
        N, 16, TILE_M, SPLITS, BIAS,
    )  # fmt: skip

"""Triton kernels for weights of 4 bits; ``int4_matmul`` runs them, ``int4_layout`` lays them out.

The weights lie in memory as tensor cores take them: the 16 bytes that a thread loads at once are
the ones it multiplies, and x is read so that the same holds for it. No number goes from one thread
to another before the sums are done: no shared memory, and no warp that waits for another.

Two ways, by the rows of x. With few, a program has all its weights under way to registers before it
looks at x, as in `common.ops.matmul_kernels`. With more, it goes along K in steps, and asks for the
weights to come to the L2 cache some steps ahead.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl

from common.ops.matmul_kernels import let_next_begin

from .int4_parts import load_weights, make_step, prefetch_words, split_planes, unpack


@triton.jit
def store_sums(result, offset, y, rows, first, N: tl.constexpr):
    """Sums [rows of the weight, TILE_M], to which an offset [rows of the weight] is added."""
    n = first + tl.arange(0, result.shape[0])[:, None]
    m = tl.arange(0, result.shape[1])[None, :]
    result += offset[:, None]
    tl.store(y + m * N + n, result.to(y.dtype.element_ty), mask=(m < rows) & (n < N))


@triton.jit(do_not_specialize=["all_rows"])
def int4_linear_kernel(
    x,  # [M, K]
    words,  # int16, scales, zeros: of Int4Weights
    scales,
    zeros,
    bias,  # BIAS: [N]
    y,  # [M, N]
    partial,  # SPLITS > 1: float32 [SPLITS, M, N rounded up to tiles]
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
    PIECES: tl.constexpr,  # tiles of 16 rows of a warp
    TILES: tl.constexpr,  # tiles of 64 inputs of a warp in a step, at most BLOCK
    WARPS_N: tl.constexpr,  # warps with rows of their own
    WARPS_K: tl.constexpr,  # warps that share the sums over K
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,  # 0: all weights are loaded at once; n: the L2 cache is n steps ahead
    SPLITS: tl.constexpr,  # programs that share the sums over K
    SYMMETRIC: tl.constexpr,  # every zero point is 8
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """y = x @ weight.T + bias."""
    WARPS: tl.constexpr = WARPS_N * WARPS_K
    PIECE: tl.constexpr = 16 * WARPS_N  # rows of the weight
    MASKED: tl.constexpr = STEPS * SPLITS * WARPS_K * TILES * 64 != K
    let_next_begin(PDL)
    m_before = tl.program_id(0) * TILE_M  # neighbours read the same weights
    first_row_tile = tl.program_id(1) * (PIECES * WARPS_N)
    first = first_row_tile * 16
    first_run = tl.program_id(2) * (STEPS * WARPS_K)
    rows = all_rows - m_before
    x += m_before.to(tl.int64) * K
    y += m_before.to(tl.int64) * N

    offsets, sums = (), ()
    for piece in tl.static_range(PIECES):
        n = tl.minimum(first + piece * PIECE + tl.arange(0, PIECE), N - 1)
        if BIAS:
            offsets += (tl.load(bias + n).to(tl.float32),)
        else:
            offsets += (tl.zeros([PIECE], tl.float32),)
        sums += (tl.zeros([WARPS, 2, 8, TILE_M // 8, 4, 2], tl.float32),)

    held = ()
    for step in tl.static_range(AHEAD if AHEAD > 0 else STEPS):
        run = first_run + step * WARPS_K
        if AHEAD == 0:
            held += load_weights(
                words, scales, zeros, first_row_tile, run,
                ROW_TILES, K_TILES, BLOCK, PARTS, PIECES, TILES, WARPS_N, WARPS_K, SYMMETRIC,
            )  # fmt: skip
        elif ASSEMBLY:
            prefetch_words(
                words, first_row_tile, run, ROW_TILES, K_TILES, PIECES, TILES, WARPS_N, WARPS_K
            )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    else:
        tl.debug_barrier()  # else the compiler puts the loads off until they are needed
    if AHEAD == 0:
        for step in tl.static_range(STEPS):
            sums = make_step(
                sums, held[3 * PIECES * step : 3 * PIECES * (step + 1)], x, rows,
                first_run + step * WARPS_K, K, MASKED, BLOCK, PARTS, OFFSET,
                PIECES, TILES, TILE_M, WARPS_N, WARPS_K, SYMMETRIC, ASSEMBLY,
            )  # fmt: skip
    else:
        for step in tl.range(0, STEPS):
            run = first_run + step * WARPS_K
            loaded = load_weights(
                words, scales, zeros, first_row_tile, run,
                ROW_TILES, K_TILES, BLOCK, PARTS, PIECES, TILES, WARPS_N, WARPS_K, SYMMETRIC,
            )  # fmt: skip
            if ASSEMBLY:
                prefetch_words(
                    words, first_row_tile, run + AHEAD * WARPS_K,
                    ROW_TILES, K_TILES, PIECES, TILES, WARPS_N, WARPS_K,
                )  # fmt: skip
            sums = make_step(
                sums, loaded, x, rows, run, K, MASKED, BLOCK, PARTS, OFFSET,
                PIECES, TILES, TILE_M, WARPS_N, WARPS_K, SYMMETRIC, ASSEMBLY,
            )  # fmt: skip

    results = ()
    for piece in tl.static_range(PIECES):
        by_warp = sums[piece].reshape([WARPS_K, PIECE, TILE_M])
        results += (tl.sum(by_warp, axis=0),)
    if SPLITS == 1:
        for piece in tl.static_range(PIECES):
            store_sums(results[piece], offsets[piece], y, rows, first + piece * PIECE, N)
    else:
        width = tl.num_programs(1) * (PIECES * PIECE)
        m = tl.arange(0, TILE_M)[None, :]
        place = (m_before + m) * width + (first + tl.arange(0, PIECE))[:, None]
        inside = m < rows
        for piece in tl.static_range(PIECES):
            part = partial + tl.program_id(2) * all_rows * width + place + piece * PIECE
            tl.store(part, results[piece], mask=inside)
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            for piece in tl.static_range(PIECES):
                result = tl.zeros([PIECE, TILE_M], tl.float32)
                for split in tl.static_range(SPLITS):
                    part = partial + split * all_rows * width + place + piece * PIECE
                    # ".cg": not from this multiprocessor's own cache, which may be out of date
                    result += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
                store_sums(result, offsets[piece], y, rows, first + piece * PIECE, N)
            tl.store(counter, 0)


@triton.jit
def int4_dequantize_kernel(
    words,  # of Int4Weights
    scales,
    zeros,
    out,  # [N, K]
    N: tl.constexpr,
    K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    K_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    WARPS: tl.constexpr,  # along K, two tiles each
    SYMMETRIC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """out = weight, each rounded once. A thread stores runs of eight inputs."""
    D: tl.constexpr = out.dtype.element_ty
    row_tile, run = tl.program_id(0), tl.program_id(1) * WARPS
    words, scale, zero = load_weights(
        words, scales, zeros, row_tile, run,
        ROW_TILES, K_TILES, BLOCK, PARTS, 1, 2, 1, WARPS, SYMMETRIC,
    )  # fmt: skip
    words = words.reshape([2, WARPS, 32, 2, 4])
    factors = split_planes(scale)
    if not SYMMETRIC:
        by_plane = split_planes(zero)
    i = tl.arange(0, 2 * WARPS * 32)[:, None]  # r, warp, lane
    row = row_tile * 16 + i // (32 * WARPS) * 8 + i % 32 // 4
    tile = (run + i // 32 % WARPS) * 2
    for plane in tl.static_range(4):
        if SYMMETRIC:
            zero = tl.full([1, 1, 1, 1, 1], -(OFFSET + 8), D)
        else:
            zero = by_plane[plane].reshape([1, WARPS, 32, 2, 1])
        values = unpack(words, zero, plane, OFFSET, ASSEMBLY)
        factor = factors[plane].to(tl.float32).reshape([WARPS, 32, 2]).permute(2, 0, 1)
        values = values.permute(3, 1, 2, 0, 4).reshape([2, WARPS, 32, 8])  # r, .., u hi h
        values = values.to(tl.float32) * factor.reshape([2, WARPS, 32, 1])
        k = tile // BLOCK * (BLOCK * 64) + plane * (BLOCK * 16) + tile % BLOCK * 16
        k += i % 4 * 8 + tl.arange(0, 8)[None, :]
        place = row.to(tl.int64) * K + k
        inside = (row < N) & (k < K)
        tl.store(out + place, values.reshape([2 * WARPS * 32, 8]).to(D), mask=inside)

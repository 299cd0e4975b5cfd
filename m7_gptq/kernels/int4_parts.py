"""What the kernels of ``int4_kernels`` are made of: reading, unpacking and multiplying tiles.

Index letters: a tile has 16 rows, r (2) by g (8), and 64 inputs, plane p (4) by hi, c, h (2, 4, 2)
as the fragments of ``mma.m16n8k16`` do; lane is g * 4 + c. Two neighbouring tiles u (2) share a
window of 32 inputs of each plane, of which a thread has the eight from 8 * c on. What reshape and
permute do below is only to give registers other names.

In tensors of two dimensions, [X, 8], Triton gives the five lowest bits of X to lanes, the next to
warps and the others to registers, whatever its version. So X is made of an index in registers, the
warp along K, the warp along N and the lane, in this order.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl

from common.ops.matmul_kernels import prefetch

# Two words at a time -> the nibbles of a plane. A nibble put in the last bits of 128 (bfloat16) or
# 1024 (float16) reads as 128 + q or 1024 + q, exactly; what stands for the zero point takes that
# offset away again. No integer is converted. The plane's shift comes twice, for either word.
_UNPACK_BFLOAT16 = tl.constexpr("""{
    .reg .b32 shift, word, one;
    mov.b32 one, 0x3f803f80;
    and.b32 shift, $2, 15;
    shr.u32 word, $1, shift;
    lop3.b32 word, word, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, word, one, $3;
}""")
_UNPACK_FLOAT16 = tl.constexpr("""{
    .reg .b32 shift, word;
    and.b32 shift, $2, 15;
    shr.u32 word, $1, shift;
    lop3.b32 word, word, 0x000f000f, 0x64006400, 0xea;
    add.rn.f16x2 $0, word, $3;
}""")


@triton.jit
def unpack(words, zero, plane: tl.constexpr, OFFSET: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int16 words and -(OFFSET + zero point) -> q - zero point of the words' nibbles of a plane."""
    D: tl.constexpr = zero.dtype
    if ASSEMBLY:
        shift = tl.full([1] * len(words.shape), 4 * plane, tl.int16)
        values = tl.inline_asm_elementwise(
            _UNPACK_FLOAT16 if OFFSET == 1024 else _UNPACK_BFLOAT16,
            "=r,r,r,r",
            [words, shift, zero],
            dtype=zero.dtype,
            is_pure=True,
            pack=2,
        )
    else:  # Triton's interpreter knows no assembly
        values = (((words.to(tl.int32) >> (4 * plane)) & 15) + OFFSET).to(D) + zero
    return values


@triton.jit
def split_planes(values):
    """[X, 8], the last axis (p, r) -> four [X, 2]."""
    pairs = values.reshape([values.shape[0], 2, 2, 2]).permute(0, 3, 1, 2)  # X, r, p high, p low
    even, odd = tl.split(pairs)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def word_places(
    row_tile,
    run,
    ROW_TILES: tl.constexpr,
    K_TILES: tl.constexpr,
    TILES: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
):
    """Where the words of a piece lie that each thread takes at once, [TILES * WARPS * 32, 1].

    Past the ends the last tiles are taken again: x is zero there, or nothing is stored.
    """
    WARPS: tl.constexpr = WARPS_N * WARPS_K
    i = tl.arange(0, TILES * WARPS * 32)[:, None]
    row = tl.minimum(row_tile + i // 32 % WARPS_N, ROW_TILES - 1)
    tile = tl.minimum(run + i // (32 * WARPS_N) % WARPS_K, K_TILES // TILES - 1) * TILES
    return (row * K_TILES + tile + i // (32 * WARPS)) * 256 + i % 32 * 8


@triton.jit
def load_weights(
    words,
    scales,
    zeros,
    first_row_tile,
    run,  # of TILES tiles along K, the first of this step
    ROW_TILES: tl.constexpr,
    K_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PIECES: tl.constexpr,
    TILES: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Words, scales and zero points of a step, for each piece: what it multiplies x by."""
    WARPS: tl.constexpr = WARPS_N * WARPS_K
    PARTS_HERE: tl.constexpr = (TILES * PARTS + BLOCK - 1) // BLOCK
    column = tl.arange(0, 8)[None, :]
    i = tl.arange(0, PARTS_HERE * WARPS * 32)[:, None]
    tile = tl.minimum(run + i // (32 * WARPS_N) % WARPS_K, K_TILES // TILES - 1) * TILES
    part = tile * PARTS // BLOCK + i // (32 * WARPS)
    loaded = ()
    for piece in tl.static_range(PIECES):
        row_tile = first_row_tile + piece * WARPS_N
        place = word_places(row_tile, run, ROW_TILES, K_TILES, TILES, WARPS_N, WARPS_K)
        row = tl.minimum(row_tile + i // 32 % WARPS_N, ROW_TILES - 1)
        scale = (row * (K_TILES // BLOCK * PARTS) + part) * 64 + i % 32 // 4 * 8 + column
        loaded += (tl.load(words + place + column, eviction_policy="evict_first"),)
        loaded += (tl.load(scales + scale),)
        if SYMMETRIC:
            loaded += (0,)
        else:
            loaded += (tl.load(zeros + scale),)
    return loaded


@triton.jit
def prefetch_words(
    words,
    first_row_tile,
    run,
    ROW_TILES: tl.constexpr,
    K_TILES: tl.constexpr,
    PIECES: tl.constexpr,
    TILES: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
):
    """Ask for the words of a step to be brought into the L2 cache."""
    for piece in tl.static_range(PIECES):
        row_tile = first_row_tile + piece * WARPS_N
        place = word_places(row_tile, run, ROW_TILES, K_TILES, TILES, WARPS_N, WARPS_K)
        prefetch(words + place)


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
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
):
    """x of a plane as the right side of the products: [parts * warps, inputs of a part, TILE_M]."""
    WARPS: tl.constexpr = WARPS_N * WARPS_K
    PARTS_HERE: tl.constexpr = (TILES * PARTS + BLOCK - 1) // BLOCK
    WINDOWS: tl.constexpr = TILES // 2
    i = tl.arange(0, TILE_M // 8 * WINDOWS * WARPS * 32)[:, None]
    m = i // (32 * WARPS * WINDOWS) * 8 + i % 32 // 4
    tile = (run + i // (32 * WARPS_N) % WARPS_K) * TILES
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
    sums,  # for each piece float32 [WARPS, 2 r, 8 g, TILE_M // 8, 4 c, 2]
    loaded,  # by load_weights
    inputs,  # by load_inputs, of AT_ONCE planes
    first: tl.constexpr,  # of the planes
    AT_ONCE: tl.constexpr,
    PARTS_HERE: tl.constexpr,
    OFFSET: tl.constexpr,
    PIECES: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Add products of some planes: each warp those of its own tiles, each group's scaled once."""
    D: tl.constexpr = inputs[0].dtype
    PART_TILES: tl.constexpr = TILES // PARTS_HERE
    for plane in tl.static_range(first, first + AT_ONCE):
        added = ()
        for piece in tl.static_range(PIECES):
            words = loaded[3 * piece].reshape([PARTS_HERE, PART_TILES, WARPS, 32, 2, 4])
            if SYMMETRIC:
                zero = tl.full([1, 1, 1, 1, 1, 1], -(OFFSET + 8), D)
            else:
                zero = split_planes(loaded[3 * piece + 2])[plane]
                zero = zero.reshape([PARTS_HERE, 1, WARPS, 32, 2, 1])
            left = unpack(words, zero, plane, OFFSET, ASSEMBLY)
            # part, window, u, warp, g, c, r, hi, h
            left = left.reshape([PARTS_HERE, PART_TILES // 2, 2, WARPS, 8, 4, 2, 2, 2])
            left = left.permute(0, 3, 6, 4, 1, 2, 7, 5, 8)
            left = left.reshape([PARTS_HERE * WARPS, 16, PART_TILES * 16])
            product = tl.dot(left, inputs[plane - first], input_precision="ieee")
            product = product.reshape([PARTS_HERE, WARPS, 2, 8, product.shape[2] // 8, 4, 2])
            factor = split_planes(loaded[3 * piece + 1])[plane].to(tl.float32)
            factor = factor.reshape([PARTS_HERE, WARPS, 8, 4, 2]).permute(0, 1, 4, 2, 3)
            factor = factor.reshape([PARTS_HERE, WARPS, 2, 8, 1, 4, 1])
            added += (sums[piece] + tl.sum(product * factor, axis=0),)
        sums = added
    return sums


@triton.jit
def make_step(
    sums,
    loaded,
    x,
    rows,
    run,
    K: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    PIECES: tl.constexpr,
    TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Add a step's products, with as much of x at a time as 32 registers hold."""
    PARTS_HERE: tl.constexpr = (TILES * PARTS + BLOCK - 1) // BLOCK
    AT_ONCE: tl.constexpr = max(1, min(4, 128 // (TILES * TILE_M)))
    for first in tl.static_range(0, 4, AT_ONCE):
        inputs = ()
        for plane in tl.static_range(first, first + AT_ONCE):
            inputs += (
                load_inputs(
                    x, rows, run, plane, K, MASKED, BLOCK, PARTS, TILES, TILE_M, WARPS_N, WARPS_K
                ),
            )
        # Always true, which the compiler does not know: else it would load x little by little, as
        # if it were in the nearest cache, and wait for it as often.
        if rows > 0:
            sums = multiply(
                sums, loaded, inputs, first, AT_ONCE, PARTS_HERE, OFFSET,
                PIECES, TILES, WARPS_N * WARPS_K, SYMMETRIC, ASSEMBLY,
            )  # fmt: skip
    return sums

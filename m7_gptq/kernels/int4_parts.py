"""What the kernels for 4-bit weights are made of: reading, unpacking and storing.

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
def unpack(words, zero, beside, plane: tl.constexpr, OFFSET: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int16 words and -(OFFSET + zero point) -> q - zero point of the words' nibbles of a plane.

    Nothing is done with ``beside``, of zero's dtype: what it is made of counts as the words do, and
    a loop's loads are fetched ahead if they lead to a product's sides.
    """
    D: tl.constexpr = zero.dtype
    if ASSEMBLY:
        shift = tl.full([1] * len(words.shape), 4 * plane, tl.int16)
        values = tl.inline_asm_elementwise(
            _UNPACK_FLOAT16 if OFFSET == 1024 else _UNPACK_BFLOAT16,
            "=r,r,r,r,r",
            [words, shift, zero, beside],
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
    first_row_tile,
    run,
    ROW_TILES: tl.constexpr,
    K_TILES: tl.constexpr,
    TILES: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
):
    """Where the words lie that each thread takes at once, [TILES * WARPS * 32, 1].

    Past the ends the last tiles are taken again: x is zero there, or nothing is stored.
    """
    WARPS: tl.constexpr = WARPS_N * WARPS_K
    i = tl.arange(0, TILES * WARPS * 32)[:, None]
    row = tl.minimum(first_row_tile + i // 32 % WARPS_N, ROW_TILES - 1)
    tile = tl.minimum(run + i // (32 * WARPS_N) % WARPS_K, K_TILES // TILES - 1) * TILES
    return (row * K_TILES + tile + i // (32 * WARPS)) * 256 + i % 32 * 8


@triton.jit
def load_words(
    words,
    first_row_tile,  # of 16 rows of the weight
    run,  # of TILES tiles along K
    ROW_TILES: tl.constexpr,
    K_TILES: tl.constexpr,
    TILES: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
):
    """Words of a step, [TILES * WARPS * 32, 8]."""
    place = word_places(first_row_tile, run, ROW_TILES, K_TILES, TILES, WARPS_N, WARPS_K)
    return tl.load(words + place + tl.arange(0, 8)[None, :], eviction_policy="evict_first")


@triton.jit
def load_scales(
    scales,
    zeros,
    first_row_tile,
    run,
    ROW_TILES: tl.constexpr,
    K_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Scales and zero points of a step, [groups of a plane * WARPS * 32, 8] each; SYMMETRIC: 0."""
    WARPS: tl.constexpr = WARPS_N * WARPS_K
    PARTS_HERE: tl.constexpr = (TILES * PARTS + BLOCK - 1) // BLOCK
    i = tl.arange(0, PARTS_HERE * WARPS * 32)[:, None]
    row = tl.minimum(first_row_tile + i // 32 % WARPS_N, ROW_TILES - 1)
    tile = tl.minimum(run + i // (32 * WARPS_N) % WARPS_K, K_TILES // TILES - 1) * TILES
    part = tile * PARTS // BLOCK + i // (32 * WARPS)
    place = (row * (K_TILES // BLOCK * PARTS) + part) * 64 + i % 32 // 4 * 8
    place += tl.arange(0, 8)[None, :]
    scale = tl.load(scales + place)
    if SYMMETRIC:
        zero = 0
    else:
        zero = tl.load(zeros + place)
    return scale, zero


@triton.jit
def store_sums(result, bias, y, rows, first, N: tl.constexpr, BIAS: tl.constexpr):
    """Sums [rows of the weight, TILE_M], to which the bias of these rows is added."""
    n = first + tl.arange(0, result.shape[0])[:, None]
    m = tl.arange(0, result.shape[1])[None, :]
    if BIAS:
        result += tl.load(bias + tl.minimum(n, N - 1)).to(tl.float32)
    tl.store(y + m * N + n, result.to(y.dtype.element_ty), mask=(m < rows) & (n < N))


@triton.jit
def finish_sums(
    result,  # float32 [ROWS, TILE_M]
    bias,
    y,
    partial,
    counters,
    all_rows,
    m_before,  # rows of x before this program's
    first,  # of the rows of the weight
    N: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_M: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Store the sums; where several programs share them, the last one adds them all, in order."""
    rows = all_rows - m_before
    y += m_before.to(tl.int64) * N
    if SPLITS == 1:
        store_sums(result, bias, y, rows, first, N, BIAS)
    else:
        width = tl.num_programs(1) * ROWS
        m = tl.arange(0, TILE_M)[None, :]
        place = (m_before + m) * width + (first + tl.arange(0, ROWS))[:, None]
        inside = m < rows
        tl.store(partial + tl.program_id(2) * all_rows * width + place, result, mask=inside)
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            result = tl.zeros([ROWS, TILE_M], tl.float32)
            for split in tl.static_range(SPLITS):
                part = partial + split * all_rows * width + place
                # ".cg": not from this multiprocessor's own cache, which may be out of date
                result += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
            store_sums(result, bias, y, rows, first, N, BIAS)
            tl.store(counter, 0)

"""4-bit weights as numbers in memory, for products with so many rows that cuBLAS pays."""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl

from .int4_parts import load_scales, load_words, split_planes, unpack


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
    words = load_words(words, row_tile, run, ROW_TILES, K_TILES, 2, 1, WARPS)
    scale, zero = load_scales(
        scales, zeros, row_tile, run,
        ROW_TILES, K_TILES, BLOCK, PARTS, 2, 1, WARPS, SYMMETRIC,
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
        values = unpack(words, zero, zero, plane, OFFSET, ASSEMBLY)
        factor = factors[plane].to(tl.float32).reshape([WARPS, 32, 2]).permute(2, 0, 1)
        values = values.permute(3, 1, 2, 0, 4).reshape([2, WARPS, 32, 8])  # r, .., u hi h
        values = values.to(tl.float32) * factor.reshape([2, WARPS, 32, 1])
        k = tile // BLOCK * (BLOCK * 64) + plane * (BLOCK * 16) + tile % BLOCK * 16
        k += i % 4 * 8 + tl.arange(0, 8)[None, :]
        place = row.to(tl.int64) * K + k
        inside = (row < N) & (k < K)
        tl.store(out + place, values.reshape([2 * WARPS * 32, 8]).to(D), mask=inside)

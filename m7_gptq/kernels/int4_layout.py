"""4-bit weights in the order in which a GPU's tensor cores take them.

    weights = repack_int4(codes, zeros, scales, group_size=128, dtype=torch.bfloat16)
    unpack_int4(weights)                    # float32 [N, K]: (codes - zeros) * scales again
    int4_linear_reference(x, weights, bias)

Sixteen rows and 64 inputs form a tile of 512 bytes, 16 for each lane of a warp: eight words of 16
bits, with four inputs in each word's nibbles::

    block    tiles one after the other: four planes of equally many inputs
    plane    the inputs in the nibbles p of a block's words: p * plane and so on, so that a
             shift unpacks neighbours, and the sum over a group is scaled once
    window   32 inputs of a plane, in two tiles: lane c of four has the eight from 8 * c on,
             so that a thread reads eight inputs of x at once, too

Within a tile, the word of lane g * 4 + c and place (r, hi, h) has the row 8 * r + g and, in nibble
p of tile 2 * window + u, the input
``p * plane + 32 * window + 8 * c + 4 * u + 2 * hi + h`` of the block.

Rows are padded to 16, inputs to whole blocks; blocks are shorter where that pads less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MULTIPROCESSORS = 132  # of an H200
PLANES = 4  # nibbles of a word
ROWS = 16  # of a tile
WINDOW = 32  # inputs
PLANE_SIZES = (128, 64, 32)
# What a nibble is read with: in the last bits of this number it adds to it (see int4_parts).
OFFSETS = {torch.bfloat16: 128, torch.float16: 1024, torch.float32: 0}


@dataclass(frozen=True)
class Int4Weights:
    """A weight of 4 bits ``[N, K]`` in tiles; what pads it is never seen in a result.

    words: int16 ``[N / 16, K / 64, 32, 8]``, each rounded up: tiles, lanes, (r, hi, h).
    scales: float16 or float32 ``[N / 16, K / block, parts, 8, 8]``: for each part of a block's
        planes g by (plane, r), so that a thread has those of its rows in one piece.
    zeros: None if every zero point is 8, else like scales -(OFFSETS[dtype] + zero point) in dtype.
    plane: inputs of a plane, a fourth of a block. part: of them, those with one scale.
    dtype: of x and of y.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    out_features: int
    in_features: int
    group_size: int
    plane: int
    dtype: torch.dtype

    @property
    def part(self) -> int:
        return self.plane // self.scales.shape[2]

    @property
    def tiles_per_block(self) -> int:
        return 2 * self.plane // WINDOW

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def num_bytes(self) -> int:
        """Memory they take, padding included."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.words.nbytes + self.scales.nbytes + zeros


def repack_int4(
    codes: Tensor, zeros: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype
) -> Int4Weights:
    """Bring W = (codes - zeros) * scales into tiles, on the device of ``codes``.

    Args:
        codes: ``[N, K]`` integers 0 to 15; the inputs of a group are neighbours.
        zeros: ``[N, G]`` integers 0 to 15.
        scales: ``[N, G]``, kept exactly: in float16 where that holds them, else in float32.
        group_size: inputs that share a scale and a zero point, K / G rounded up; -1: all of them.
        dtype: of the activations.

    Raises:
        ValueError: what does not fit together; a group size that the kernels do not know; K that
            is no multiple of 8.
    """
    _check(codes, zeros, scales, group_size, dtype)
    rows, inputs = codes.shape
    scale_dtype = torch.float16
    if not torch.equal(scales.half().to(scales.dtype), scales):
        scale_dtype = torch.float32
    symmetric = bool((zeros == 8).all())
    bytes_per_part = scale_dtype.itemsize + (0 if symmetric else dtype.itemsize)
    plane, part = choose_plane(inputs, group_size, bytes_per_part)
    block = PLANES * plane
    padded_rows, padded_inputs = _round_up(rows, ROWS), _round_up(inputs, block)
    if padded_rows * padded_inputs // 4 >= 2**31:
        raise ValueError(f"[{rows}, {inputs}] is too large for offsets of 32 bits: split its rows")

    padded = codes.new_zeros((padded_rows, padded_inputs), dtype=torch.uint8)
    padded[:rows, :inputs] = codes
    padded[:rows, inputs:] = zeros[:, -1:]  # weights of zero: no scale makes them infinite
    # row tile, r, g, block, p, window, c, u, hi, h -> p in front, the rest in the order of memory
    axes = padded.view(-1, 2, 8, padded_inputs // block, PLANES, plane // WINDOW, 4, 2, 2, 2)
    nibbles = axes.permute(4, 0, 3, 5, 7, 2, 6, 1, 8, 9)
    words = nibbles[0].to(torch.int32)
    for p in range(1, PLANES):
        words |= nibbles[p].to(torch.int32) << (4 * p)
    words = words.to(torch.int16).reshape(padded_rows // ROWS, padded_inputs // 64, 32, 8)

    group = inputs if group_size == -1 else group_size
    of_part = torch.arange(0, padded_inputs, part, device=codes.device) // group
    of_part = of_part.clamp_(max=scales.shape[1] - 1)

    def by_part(values: Tensor) -> Tensor:
        """``[N, G]`` -> ``[N / 16, blocks, parts, g, (p, r)]``."""
        padded = values.new_zeros((padded_rows, len(of_part)))
        padded[:rows] = values[:, of_part]
        axes = padded.view(-1, 2, 8, padded_inputs // block, PLANES, plane // part)
        return axes.permute(0, 3, 5, 2, 4, 1).reshape(*axes.shape[::3], plane // part, 8, 8)

    return Int4Weights(
        words.contiguous(),
        by_part(scales.to(scale_dtype)).contiguous(),
        None if symmetric else by_part(-(zeros.float() + OFFSETS[dtype])).to(dtype).contiguous(),
        rows,
        inputs,
        group_size,
        plane,
        dtype,
    )


def choose_plane(inputs: int, group_size: int, bytes_per_part: int) -> tuple[int, int]:
    """(inputs of a plane, inputs of a part): what takes the least memory, the largest such plane.

    A part is what of a group fits into a plane without a remainder.
    """

    def part(plane: int) -> int:
        one_group = group_size == -1 or group_size >= inputs
        return plane if one_group else math.gcd(plane, group_size)

    def bytes_of_row(plane: int) -> float:
        padded = _round_up(inputs, PLANES * plane)
        return padded / 2 + padded / part(plane) * bytes_per_part

    plane = min(PLANE_SIZES, key=bytes_of_row)
    return plane, part(plane)


def unpack_int4(weights: Int4Weights) -> Tensor:
    """float32 ``[N, K]``: the weight, not rounded. The twin of `int4_matmul.dequantize_int4`."""
    row_tiles, blocks, parts = weights.scales.shape[:3]
    words = weights.words.view(row_tiles, blocks, weights.plane // WINDOW, 2, 8, 4, 2, 2, 2)
    codes = torch.stack([(words >> (4 * p)) & 15 for p in range(PLANES)])
    # p, row tile, block, window, u, g, c, r, hi, h -> rows, inputs
    codes = codes.permute(1, 7, 5, 2, 0, 3, 6, 4, 8, 9)
    codes = codes.reshape(row_tiles * ROWS, -1, weights.part)

    def by_input(values: Tensor) -> Tensor:
        """The reverse of what `repack_int4` does: ``[N, parts in all, 1]``, padded."""
        axes = values.float().view(row_tiles, blocks, parts, 8, PLANES, 2)
        return axes.permute(0, 5, 3, 1, 4, 2).reshape(row_tiles * ROWS, -1, 1)

    zeros = 8.0
    if weights.zeros is not None:
        zeros = -by_input(weights.zeros) - OFFSETS[weights.dtype]
    values = ((codes - zeros) * by_input(weights.scales)).view(row_tiles * ROWS, -1)
    return values[: weights.out_features, : weights.in_features].contiguous()


def int4_linear_reference(x: Tensor, weights: Int4Weights, bias: Tensor | None = None) -> Tensor:
    """x ``[M, K]`` @ weight.T + bias ``[N]``, in float32 and rounded once to the dtype of x."""
    product = x.float() @ unpack_int4(weights).T
    return (product if bias is None else product + bias.float()).to(x.dtype)


def _check(
    codes: Tensor, zeros: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype
) -> None:
    if dtype not in OFFSETS:
        raise ValueError(f"activations in {dtype} are not supported, only {[*OFFSETS]}")
    if codes.dim() != 2 or codes.is_floating_point() or not codes.numel():
        raise ValueError(f"codes must be integers [N, K], not {codes.dtype} {list(codes.shape)}")
    rows, inputs = codes.shape
    if inputs % 8:
        raise ValueError(f"K must be a multiple of 8, the inputs read at once, not {inputs}")
    if group_size != -1 and (group_size < 1 or group_size % WINDOW) and group_size < inputs:
        raise ValueError(
            f"group size {group_size} is not supported: multiples of {WINDOW}, or -1 for one group"
        )
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    for name, values in (("zeros", zeros), ("scales", scales)):
        if values.shape != (rows, groups):
            raise ValueError(
                f"{name} must be {[rows, groups]} for codes {[rows, inputs]} in groups of "
                f"{group_size}, not {list(values.shape)}"
            )
    for name, values in (("codes", codes), ("zeros", zeros)):
        if int(values.min()) < 0 or int(values.max()) > 15:
            raise ValueError(
                f"{name} must be 0 to 15, not {int(values.min())} to {int(values.max())}"
            )
    if not scales.isfinite().all():
        raise ValueError("scales contain NaN or infinity")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

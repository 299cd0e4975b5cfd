"""How a product with 4-bit weights is cut into programs, and from how many rows on it is not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from common.ops.matmul import MAX_SPLIT_TILES

WARPS = 8  # of a program
TWO_PROGRAMS, THREE_PROGRAMS = 128, 80  # registers of a thread that let so many run side by side
ENOUGH_PROGRAMS = 128  # about one for each multiprocessor of an H200
ONCE_LOADS = 8  # of 16 bytes a thread: 4 KB under way for each warp
MAX_SPLITS = 8

# Seconds on an H200. To dequantize is 4.5 bytes of traffic for each weight (half a one read, two
# written, two read again) and one more kernel; then each row of x costs two operations of cuBLAS,
# at 650 TFLOP/s. Ours, which takes numbers from registers, has an older instruction for them, at
# about 250 TFLOP/s.
START = 3e-6
DEQUANTIZE = 4.5 / 4e12
CUBLAS = 2 / 650e12
FUSED = 2 / 250e12


@dataclass(frozen=True)
class Tiling:
    """Of one program: ``16 * pieces * warps_n`` rows of the weight by ``tile_m`` rows of x."""

    tile_m: int  # 8, 16, 32 or 64
    pieces: int  # tiles of 16 rows of a warp: x is read once for all of them
    tiles: int  # of 64 inputs, a warp's in one step: 2, 4 or 8
    warps_n: int  # warps with rows of their own
    warps_k: int  # warps that share the sums over K
    splits: int = 1  # programs that do
    ahead: int = 0  # 0: load all weights at once; else steps that the L2 cache is ahead
    max_registers: int | None = TWO_PROGRAMS

    @property
    def warps(self) -> int:
        return self.warps_n * self.warps_k

    @property
    def features(self) -> int:
        """Rows of the weight."""
        return 16 * self.pieces * self.warps_n

    def steps(self, k_tiles: int) -> int:
        """That each program makes."""
        return -(-k_tiles // (self.tiles * self.warps_k * self.splits))


@cache
def choose_tiling(
    rows: int, features: int, k_tiles: int, tiles_per_block: int, parts: int
) -> Tiling:
    """By what keeps the memory busy: reasoned, and to be measured (``dev.bench kernels``).

    Args:
        rows: of x.
        features: rows of the weight.
        k_tiles: tiles of 64 inputs of the weight.
        tiles_per_block: of them, those of a block: as many as a warp may take in one step.
        parts: groups that a block's planes are cut into; their scales take registers.
    """
    if rows <= 16:
        return _all_at_once(rows, features, k_tiles, tiles_per_block, parts)
    return _step_by_step(rows, features, k_tiles, tiles_per_block, parts)


def _all_at_once(
    rows: int, features: int, k_tiles: int, tiles_per_block: int, parts: int
) -> Tiling:
    """Few rows of x: all weights of a program are under way before it looks at x.

    The warps of a program share K, as the smallest weights have too few rows for all of them.
    """
    warps_k = WARPS if k_tiles >= 4 * WARPS else WARPS // 2
    fitting = [n for n in (8, 4, 2) if n <= tiles_per_block and k_tiles % (n * warps_k) == 0]
    tiles = fitting[0] if fitting else 2
    steps = -(-k_tiles // (tiles * warps_k))
    splits = 1
    row_tiles = -(-features // 16)
    while splits < MAX_SPLITS and row_tiles <= MAX_SPLIT_TILES:
        if -(-steps // splits) * tiles <= ONCE_LOADS:
            break
        splits += 1
    splits = -(-steps // -(-steps // splits))  # without those that would have nothing to do
    tile_m = 8 if rows <= 8 else 16
    registers = THREE_PROGRAMS if tile_m == 8 and parts <= 2 else TWO_PROGRAMS
    return Tiling(tile_m, 1, tiles, 1, warps_k, splits, max_registers=registers)


def _step_by_step(
    rows: int, features: int, k_tiles: int, tiles_per_block: int, parts: int
) -> Tiling:
    """More rows of x: warps have rows of the weight of their own and share x in the L1 cache."""
    tile_m, tiles = 32, min(4 if parts <= 2 else 2, tiles_per_block)
    warps_n = WARPS if features >= 4096 else WARPS // 4
    warps_k = WARPS // warps_n
    programs = -(-rows // tile_m) * -(-features // (16 * warps_n))
    steps = -(-k_tiles // (tiles * warps_k))
    splits = 1
    while splits < min(MAX_SPLITS, steps) and programs * splits < ENOUGH_PROGRAMS:
        splits *= 2
    splits = -(-steps // -(-steps // splits))  # without those that would have nothing to do
    ahead = min(4, -(-steps // splits))
    return Tiling(tile_m, 1, tiles, warps_n, warps_k, splits, ahead)


def uses_dequantize(rows: int, features: int, in_features: int) -> bool:
    """Whether turning the weight into numbers first, for cuBLAS, is expected to be faster."""
    weights = features * in_features
    separate = START + weights * (DEQUANTIZE + rows * CUBLAS)
    return separate < rows * weights * FUSED

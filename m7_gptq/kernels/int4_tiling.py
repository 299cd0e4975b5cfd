"""How a product with 4-bit weights is cut into programs, and with how many rows cuBLAS has it.

Chosen by trials on an H200 that no committed report holds; what is chosen is measured by
`dev.bench kernels --suite int4`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from common.ops.matmul import MAX_SPLIT_TILES

from .int4_layout import MULTIPROCESSORS

FEW_ROWS = 8  # tiles of 8 columns are the tensor cores' smallest
SOME_ROWS = 16
LARGE_WEIGHT = 32 << 20  # numbers: from here on programs read enough to share x at 9 rows already
ONCE_LOADS = 16  # of 16 bytes a thread: 8 KB under way for each warp
MAX_SPLITS = 8
MOST_SHARED_ROWS = 64  # of x, that one program has; with more, weights are unpacked repeatedly

# Microseconds on an H200, for `uses_dequantize`. Ours: two kernels that begin, and a step of a
# program with 128 rows of the weight, 64 of x and 256 inputs, a multiprocessor to itself.
OURS_BEGIN = 2.0
OURS_STEP = 1.42
STEP_TILES = 4  # of 64 inputs, if groups are long enough; with short ones ours takes longer
# cuBLAS: it begins, and then computes at 720 TFLOP/s or reads at 4.2 TB/s, whichever takes longer.
CUBLAS_BEGIN = 4.5
CUBLAS_FLOP = 1 / 720e6
CUBLAS_BYTE = 1 / 4.2e6
# To dequantize a number, 2.5 bytes of traffic: to memory, or to the L2 cache if all of them fit.
DEQUANTIZE_BEGIN = 1.0
DEQUANTIZE = 0.75e-6
DEQUANTIZE_IN_CACHE = 0.35e-6
CACHED = 12 << 20  # numbers
# Within a graph, what the model does between two products hides so much of it at the least.
HIDDEN = 1.5


@dataclass(frozen=True)
class Tiling:
    """How `int4_few_rows_kernel` (stages 0) or `int4_many_rows_kernel` cuts a product."""

    tile_m: int  # rows of x of a program: 8, 16, 32 or 64
    tiles: int  # of 64 inputs, a warp's in one step: 2, 4 or 8
    warps: int  # few rows: they share the inputs; many: each has 16 rows of the weight
    splits: int = 1  # programs that share the inputs
    stages: int = 0  # steps of the pipeline
    max_registers: int | None = None

    @property
    def features(self) -> int:
        """Rows of the weight of a program."""
        return 16 * self.warps if self.stages else 16

    def steps(self, k_tiles: int) -> int:
        """That each program makes."""
        at_once = self.tiles if self.stages else self.tiles * self.warps
        return -(-k_tiles // (at_once * self.splits))


@cache
def choose_tiling(
    rows: int, features: int, k_tiles: int, tiles_per_block: int, parts: int
) -> Tiling:
    """What keeps the memory busy.

    Args:
        rows: of x.
        features: rows of the weight.
        k_tiles: tiles of 64 inputs of the weight.
        tiles_per_block: of them, those of a block: as many as a warp may take in one step.
        parts: groups that a block's planes are cut into; their scales take registers.
    """
    is_large = features * k_tiles * 64 >= LARGE_WEIGHT
    if rows <= FEW_ROWS or (rows <= SOME_ROWS and not is_large):
        return _all_at_once(rows, features, k_tiles, tiles_per_block, parts)
    return _step_by_step(rows, features, k_tiles, tiles_per_block, parts)


def _all_at_once(
    rows: int, features: int, k_tiles: int, tiles_per_block: int, parts: int
) -> Tiling:
    """Few rows of x: all weights of a program are under way before it looks at x.

    With few programs, more warps share one: all that is asked for at a time counts.
    """
    row_tiles = -(-features // 16)
    warps = 4 if 4 * row_tiles >= 6 * MULTIPROCESSORS else 8
    if k_tiles < 4 * warps:
        warps = 4
    fitting = [n for n in (8, 4, 2) if n <= tiles_per_block and k_tiles % (n * warps) == 0]
    tiles = fitting[0] if fitting else 2
    loads = -(-k_tiles // (tiles * warps)) * tiles
    splits = 1
    if row_tiles <= MAX_SPLIT_TILES:
        splits = min(MAX_SPLITS, -(-loads // ONCE_LOADS))
    steps = -(-k_tiles // (tiles * warps * splits))
    splits = -(-k_tiles // (tiles * warps * steps))  # without those that would have nothing to do
    tile_m = 8 if rows <= 8 else 16
    return Tiling(tile_m, tiles, warps, splits)


def _step_by_step(
    rows: int, features: int, k_tiles: int, tiles_per_block: int, parts: int
) -> Tiling:
    """More rows of x, which warps with rows of the weight of their own share.

    Programs of 4 warps leave room for others beside them. Those of 8 read x half as often, which
    pays where rows of x take several programs, and for tiles of 32 rows where programs of 4 warps
    would take more than one round.
    K is split so that the last round of programs leaves few multiprocessors without one.
    """
    tile_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tiles = min(4, tiles_per_block // parts)
    side_by_side = MULTIPROCESSORS * {16: 3, 32: 2, 64: 1}[tile_m]
    wide = rows > MOST_SHARED_ROWS or (tile_m == 32 and features > 64 * side_by_side)
    warps = 8 if wide else 4
    steps = -(-k_tiles // tiles)
    row_tiles = -(-features // (16 * warps))
    programs = -(-rows // tile_m) * row_tiles
    candidates = range(1, min(MAX_SPLITS, steps) + 1) if programs <= MAX_SPLIT_TILES else (1,)
    splits = min(candidates, key=lambda splits: _cost(programs, steps, splits, side_by_side))
    splits = -(-steps // -(-steps // splits))  # without those that would have nothing to do
    stages = 3 if wide or tile_m == 64 else 4
    return Tiling(tile_m, tiles, warps, splits, stages, 128 if wide and tile_m == 32 else None)


def _cost(programs: int, steps: int, splits: int, side_by_side: int) -> float:
    """How long a product takes, in steps."""
    rounds = -(-programs * splits // side_by_side)
    # To begin takes as long as a step or two, and so does to add what others have summed.
    return rounds * (-(-steps // splits) + 1.5) + (0.7 * splits if splits > 1 else 0)


@cache
def uses_dequantize(rows: int, features: int, in_features: int) -> bool:
    """Whether turning the weight into numbers first, for cuBLAS, is expected to be faster.

    Ours takes as many rounds as its programs need, so with a few more rows it may be no longer.
    """
    if rows <= MOST_SHARED_ROWS:
        return False
    k_tiles = -(-in_features // 64)
    how = choose_tiling(rows, features, k_tiles, STEP_TILES, 1)
    programs = -(-rows // how.tile_m) * -(-features // how.features)
    cost = _cost(programs, -(-k_tiles // STEP_TILES), how.splits, MULTIPROCESSORS)
    weights = features * in_features
    number = DEQUANTIZE_IN_CACHE if weights <= CACHED else DEQUANTIZE
    dequantize = max(0.0, DEQUANTIZE_BEGIN + weights * number - HIDDEN)
    cublas = max(2 * rows * weights * CUBLAS_FLOP, 2 * weights * CUBLAS_BYTE)
    return dequantize + CUBLAS_BEGIN + cublas < OURS_BEGIN + OURS_STEP * cost

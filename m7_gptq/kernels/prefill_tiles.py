"""How much one program of the prefill kernel holds: what fits the GPU, and what suits the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

MAX_ROWS = 128  # of a tile
LONG_KEYS = 2048  # seen by a query on average: from here on large tiles pay


@dataclass(frozen=True)
class TileShape:
    """What one program computes at a time, and with what."""

    rows: int  # queries: tokens times query heads of one KV head
    keys: int
    num_warps: int
    num_stages: int
    programs: int  # that share a multiprocessor


def tile_shape(
    generation: int, large: bool, paged: bool, group: int, head_dim: int, dtype: torch.dtype
) -> TileShape:
    """What fits a GPU's registers and shared memory.

    Args:
        generation: major compute capability: 8 Ampere and Ada, 9 Hopper, 10 Blackwell.
        large: for queries that see many keys; small tiles waste less where the diagonal is most
            of the work.
        paged: whether most queries read cached keys through block tables, a pointer for each row:
            that hides behind products better in small pieces.
        group: query heads of one KV head.

    Raises:
        ValueError: more query heads share a KV head than rows fit into a tile.
    """
    if group > MAX_ROWS:
        raise ValueError(f"at most {MAX_ROWS} query heads may share a KV head, not {group}")
    large |= group > 64
    if dtype == torch.float32:  # on plain cores, operands in registers
        return TileShape(32 if group <= 32 else 128, 16, 8, 2, programs=2)
    if head_dim > 128:
        return TileShape(64, 32, 4, 2, programs=2) if group <= 64 else TileShape(128, 32, 8, 2, 1)
    if not large:
        return TileShape(64, 64, 4, 3 if generation in (9, 10) else 2, programs=2)
    keys = 128 if generation == 9 and not paged else 64
    stages = 3 if generation in (9, 10) else 2
    return TileShape(128, keys, 8, stages, programs=1)


def choose_shape(
    queries: np.ndarray,
    contexts: np.ndarray,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    paged: bool,
) -> TileShape:
    """``tile_shape`` for a batch of ``queries`` ``[B]`` fresh and ``contexts`` ``[B]`` cached."""
    seen = float((queries * (contexts + queries / 2)).sum()) / max(float(queries.sum()), 1.0)
    large = seen >= LONG_KEYS and int(queries.sum()) * group > 64
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return tile_shape(generation, large, paged, group, head_dim, dtype)

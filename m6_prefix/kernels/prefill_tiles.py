"""How much one program of the prefill kernel holds: what fits the GPU, and what suits the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
            that hides behind the products of another program beside it.
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
    stages = 3 if generation in (9, 10) else 2
    if not large or (paged and generation == 9 and group <= 64):
        return TileShape(64, 64, 4, stages, programs=2)
    return TileShape(128, 128 if generation == 9 else 64, 8, stages, programs=1)


def choose_shape(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    paged: bool,
) -> TileShape:
    """``tile_shape`` for a batch with so many fresh and so many cached tokens in each sequence."""
    num_queries = sum(query_lens)
    pairs = sum(
        length * (context + length / 2)
        for length, context in zip(query_lens, context_lens, strict=True)
        if length
    )
    large = pairs >= LONG_KEYS * max(num_queries, 1) and num_queries * group > 64
    return tile_shape(_generation(device), large, paged, group, head_dim, dtype)


@lru_cache
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9

"""How a batch of prompts is cut into pieces of work for the prefill kernel: loops, on the host.

A *tile* is the unit of queries: some consecutive tokens of one sequence, each with all query heads
of one KV head. A long row of keys may be cut among several programs, whose partial results are then
merged (Flash-Decoding, for tiles); that pays when tiles are too few to fill the GPU, as in a short
chunk over a long cached context.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .launch import check_cache
from .prefill_tiles import TileShape, choose_shape

# Of an item's record: its sequence, the first row of that in q, its keys that are read through the
# block table, its first row in k and v, how many of its rows there come before the fresh ones, how
# many there are; the tile's first and last token, counted in the fresh ones; its tiles of keys,
# cached ones before the others, from which to which; slot; tiles of cached keys.
ITEM_FIELDS = 12
NO_ITEM = (0,) * 10 + (-1, 0)  # of no token; slot -1: its result is complete
MERGE_FIELDS = 8  # first row in q, tokens, the first of its slots, how many
COPY_FIELDS = 4
COPY_TOKENS = 32  # tokens that one program of the gather moves
MIN_KEYS_PER_ITEM = 512  # a shorter piece costs more in the merge than it wins in parallelism
MERGE_COST = 1024  # what launching the merge takes, in keys of one tile
EVEN_WAVES = 4  # programs of at most this fraction of the total leave no gap worth filling
MAX_WAVES = 8  # more pieces than this for each program only add merging
CUTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # into how many the longest row of keys may be cut
GATHER_ROWS = 4096  # queries of one KV head over a context, from which its pages are gathered


@dataclass(frozen=True)
class PrefillPlan:
    """The work of one prefill step, for all layers.

    Made on the CPU by ``plan_prefill``; ``to`` moves what the kernel reads.
    """

    query_lens: tuple[int, ...]  # fresh tokens of each sequence
    context_lens: tuple[int, ...]  # cached tokens before them
    shape: TileShape
    table: Tensor  # int32, the three below one after the other: one copy moves them all
    num_items: int  # records of ITEM_FIELDS, longest first
    num_merges: int  # records of MERGE_FIELDS, one a tile whose keys were cut
    num_copies: int  # records of COPY_FIELDS; without any, keys are read where they are
    num_slots: int  # partial results
    num_keys: int  # rows of fresh and gathered keys
    paged: bool  # whether any keys are read through the block tables

    def to(self, device: torch.device | str) -> PrefillPlan:
        """The same plan with its table on ``device``, copied in stream order."""
        return replace(self, table=self.table.to(device, non_blocking=True))

    def with_table(self, table: Tensor) -> PrefillPlan:
        """The same plan with a copy of its table that the caller has made (16-byte aligned)."""
        return replace(self, table=table)

    @cached_property
    def num_tokens(self) -> int:
        """Fresh tokens of all sequences."""
        return sum(self.query_lens)

    @property
    def launch_key(self) -> Hashable:
        """What decides which kernels ``flash_prefill`` launches, beside the shapes it is given."""
        counts = self.num_items, self.num_merges, self.num_copies, self.num_slots, self.num_keys
        return self.shape, self.paged, counts

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Items, merges and copies, as views of the table."""
        ends = self.num_items * ITEM_FIELDS, self.num_merges * MERGE_FIELDS
        return self.table[: ends[0]], self.table[ends[0] : sum(ends)], self.table[sum(ends) :]


def plan_prefill(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    device: torch.device | str,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    num_multiprocessors: int = 1,
    shape: TileShape | None = None,
    gather: bool | None = None,
    padded: bool = False,
) -> PrefillPlan:
    """Cut a batch into work for ``flash_prefill``.

    Args:
        query_lens: fresh tokens of each sequence; 0 is allowed.
        context_lens: tokens cached before them.
        device: where the plan will be used; it stays on the CPU until ``to`` is called.
        num_heads, num_kv_heads, head_dim, dtype: of the attention.
        num_multiprocessors: of the GPU, to fill it.
        shape: overrides the tile, for measurements.
        gather: whether cached keys are first copied next to the fresh ones; None: where it pays.
        padded: in round numbers, so that a CUDA graph of one plan serves many: what is added are
            items that see no key and write nowhere, and merges of no token.

    Raises:
        ValueError: lengths are negative or do not match, or heads do not divide.
    """
    if len(query_lens) != len(context_lens) or min((*query_lens, *context_lens), default=0) < 0:
        raise ValueError(
            "query_lens and context_lens must hold one length of at least 0 for each sequence, "
            f"got {len(query_lens)} and {len(context_lens)} of them"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    group = num_heads // num_kv_heads
    present = [i for i, length in enumerate(query_lens) if length]
    in_cache = [i for i in present if context_lens[i]]
    gathered = {
        i for i in in_cache if (query_lens[i] * group >= GATHER_ROWS if gather is None else gather)
    }
    num_queries = sum(query_lens)
    if shape is None:
        paged = 2 * sum(query_lens[i] for i in in_cache if i not in gathered) > num_queries
        device = torch.device(device)
        shape = choose_shape(query_lens, context_lens, group, head_dim, dtype, device, paged=paged)

    tokens = shape.rows // group  # of a tile
    tiles: list[tuple[int, ...]] = []  # what the items of each begin with
    key_tiles: list[int] = []  # that each reads
    old, fresh = [], []  # keys that are copied next to each other, if any are
    query_start = key_start = 0
    for i in present:
        length, context = query_lens[i], context_lens[i]
        cached, offset = (0, context) if i in gathered else (context, 0)
        cached_tiles = -(-cached // shape.keys)
        for first in range(0, length, tokens):
            last = min(first + tokens, length)
            tiles.append((i, query_start, cached, key_start, offset, offset + length, first, last))
            key_tiles.append(cached_tiles + -(-(offset + last) // shape.keys))
        if gathered:
            old += _copies(key_start, i, 0, offset)
            fresh += _copies(key_start + offset, -1, query_start, length)
        query_start += length
        key_start += offset + length

    programs = max(1, num_multiprocessors * shape.programs // num_kv_heads)
    items, merges, num_slots = [], [], 0
    pieces_of = choose_pieces(key_tiles, shape.keys, programs)
    for tile, all_keys, pieces in zip(tiles, key_tiles, pieces_of, strict=True):
        _, start, cached, _, _, _, first, last = tile
        cached_tiles = -(-cached // shape.keys)
        for piece in range(pieces):
            begin, end = all_keys * piece // pieces, all_keys * (piece + 1) // pieces
            slot = num_slots + piece if pieces > 1 else -1
            items.append((*tile, begin, end, slot, cached_tiles))
        if pieces > 1:
            merges.append((start + first, last - first, num_slots, pieces, 0, 0, 0, 0))
            num_slots += pieces
    items.sort(key=lambda item: item[8] - item[9])  # the longest first
    if padded:
        items += [NO_ITEM] * (round_up(len(items)) - len(items))
        merges += [(0,) * MERGE_FIELDS] * (round_up(len(merges)) - len(merges))
        num_slots = round_up(num_slots)
    records = [*items, *merges, *old, *fresh]
    table = np.fromiter(itertools.chain.from_iterable(records), np.int32)
    return PrefillPlan(
        tuple(query_lens),
        tuple(context_lens),
        shape,
        torch.from_numpy(table),
        num_items=len(items),
        num_merges=len(merges),
        num_copies=len(old) + len(fresh),
        num_slots=num_slots,
        num_keys=key_start,
        paged=len(in_cache) > len(gathered),
    )


def check_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    plan: PrefillPlan,
    scale: float,
    out: Tensor,
) -> None:
    """Raise ValueError on arguments that a kernel would misread."""
    check_cache(k_cache, v_cache)
    tokens, num_kv_heads, head_dim = plan.num_tokens, *k_cache.shape[2:]
    if q.dim() != 3 or q.shape[::2] != (tokens, head_dim) or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q must be [{tokens}, Hq, {head_dim}] by the plan and the cache, with Hq a multiple "
            f"of {num_kv_heads}, got {list(q.shape)}"
        )
    if head_dim * q.element_size() % 16:
        raise ValueError(f"head size {head_dim} in {q.dtype} is no multiple of 16 bytes")
    for name, x in (("q", q), ("k", k), ("v", v)):
        wanted = (tokens, num_kv_heads, head_dim) if name != "q" else q.shape
        if x.shape != wanted or x.dtype != k_cache.dtype:
            raise ValueError(
                f"{name} must be {list(wanted)} in the cache's {k_cache.dtype}, "
                f"got {list(x.shape)} in {x.dtype}"
            )
        if x.stride(2) != 1 or x.stride(1) != head_dim:
            raise ValueError(
                f"{name}: the heads of one token must be contiguous, got strides {x.stride()}"
            )
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {list(q.shape)} in {q.dtype}, "
            f"got {list(out.shape)} in {out.dtype}"
        )
    sequences = len(plan.query_lens)
    if block_tables.dtype != torch.int32 or block_tables.dim() != 2 or block_tables.stride(1) != 1:
        raise ValueError("block_tables must be int32 [B, max_blocks], rows contiguous")
    if len(block_tables) < sequences and (plan.paged or plan.num_copies):
        raise ValueError(f"block_tables has {len(block_tables)} rows for {sequences} sequences")
    if plan.table.device != q.device:
        raise ValueError(f"the plan is on {plan.table.device}, q on {q.device}: use plan.to()")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")


def choose_pieces(key_tiles: Sequence[int], keys: int, programs: int) -> list[int]:
    """Into how many items to cut each tile, at least 1: what is estimated to end first.

    Args:
        key_tiles: tiles of keys that each tile of queries reads.
        keys: of such a tile.
        programs: items that the GPU works on at a time, for one KV head.
    """
    whole = [1] * len(key_tiles)
    longest, total = max(key_tiles, default=0), sum(key_tiles)
    if longest * EVEN_WAVES <= total / programs:
        return whole
    best, best_time = whole, _duration(key_tiles, whole, programs)
    for cut in CUTS:
        limit = -(-longest // cut)
        pieces = [-(-tiles // limit) for tiles in key_tiles]
        num_items = sum(pieces)
        if limit * keys < MIN_KEYS_PER_ITEM or num_items > len(whole) + MAX_WAVES * programs:
            break
        if (total + num_items) / programs + MERGE_COST / keys >= best_time:
            break  # too much work even if all programs ended together; and it grows with each cut
        time = _duration(key_tiles, pieces, programs) + MERGE_COST / keys
        if time < best_time:
            best, best_time = pieces, time
    return best


def _duration(key_tiles: Sequence[int], pieces_of: Sequence[int], programs: int) -> float:
    """Time of all items in tiles of keys, the longest first, each on the program free first."""
    both = zip(key_tiles, pieces_of, strict=True)
    lengths = [-(-tiles // pieces) + 1 for tiles, pieces in both]  # 1: a program's start and end
    if sum(pieces_of) <= programs:
        return max(lengths)
    ends = [0] * programs
    for length, pieces in sorted(zip(lengths, pieces_of, strict=True), reverse=True):
        for _ in range(pieces):
            heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def round_up(size: int) -> int:
    """To a power of two or one of three sizes between two of them, at most a quarter more."""
    if size <= 4:
        return size
    quarter = 1 << ((size - 1).bit_length() - 3)
    return -(-size // quarter) * quarter


def _copies(row: int, sequence: int, first: int, num_tokens: int) -> list[tuple[int, ...]]:
    """Records that bring tokens to rows of their own: row, sequence, first token, tokens.

    Args:
        row: where the first of them goes.
        sequence: whose cached ones they are; -1: fresh ones, counted in all sequences'.
    """
    return [
        (row + done, sequence, first + done, min(num_tokens - done, COPY_TOKENS))
        for done in range(0, num_tokens, COPY_TOKENS)
    ]

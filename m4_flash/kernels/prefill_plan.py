"""How a batch of prompts is cut into pieces of work for the prefill kernel: numpy, on the host.

A *tile* is the unit of queries: some consecutive tokens of one sequence, each with all query heads
of one KV head. A long row of keys may be cut among several programs, whose partial results are then
merged (Flash-Decoding, for tiles); that pays when tiles are too few to fill the GPU, as in a short
chunk over a long cached context.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .launch import check_cache
from .prefill_tiles import TileShape, choose_shape

ITEM_FIELDS = 12  # of an item's record; the kernel names them
SLOT_FIELD = 10  # of an item: where its partial result goes, -1: it is complete
MERGE_FIELDS = 8
COPY_FIELDS = 4
COPY_TOKENS = 32  # tokens that one program of the gather moves
MIN_KEYS_PER_ITEM = 512  # a shorter piece costs more in the merge than it wins in parallelism
MERGE_COST = 1024  # what launching the merge takes, in keys of one tile
EVEN_WAVES = 4  # programs of at most this fraction of the total leave no gap worth filling
MAX_WAVES = 8  # more pieces than this for each program only add merging
CUTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # into how many the longest row of keys may be cut
GATHER_ROWS = 1024  # queries of one KV head over a context, from which its pages are gathered


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

    def padded(self) -> PrefillPlan:
        """The same work in round numbers, so that a CUDA graph of one plan serves many.

        What is added are items that see no key and write nowhere, and merges of no token.
        """
        items, merges, copies = (part.numpy() for part in self.parts)
        more_items = round_up(self.num_items) - self.num_items
        more_merges = round_up(self.num_merges) - self.num_merges
        no_item = np.zeros((more_items, ITEM_FIELDS), np.int32)
        no_item[:, SLOT_FIELD] = -1
        no_merge = np.zeros(more_merges * MERGE_FIELDS, np.int32)
        table = np.concatenate([items, no_item.ravel(), merges, no_merge, copies])
        return replace(
            self,
            table=torch.from_numpy(table),
            num_items=self.num_items + more_items,
            num_merges=self.num_merges + more_merges,
            num_slots=round_up(self.num_slots),
        )

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
    queries, contexts = np.array(query_lens, np.int64), np.array(context_lens, np.int64)
    in_cache = (contexts > 0) & (queries > 0)
    gathered = in_cache & (queries * group >= GATHER_ROWS if gather is None else gather)
    if shape is None:
        paged = 2 * queries[in_cache & ~gathered].sum() > queries.sum()
        device = torch.device(device)
        shape = choose_shape(queries, contexts, group, head_dim, dtype, device, paged=bool(paged))
    starts = _starts(queries)  # each sequence's first row in q
    if not gathered.any():
        copies = np.zeros((0, COPY_FIELDS), np.int32)
        key_starts, num_keys = starts, int(queries.sum())
    else:
        copies, key_starts, num_keys = _lay_out_keys(queries, contexts, gathered)
    cached = np.where(gathered, 0, contexts)  # keys read through the block table
    offsets = np.where(gathered, contexts, 0)  # where a sequence's fresh keys begin in its rows

    tokens = shape.rows // group  # of a tile
    tiles = -(-queries // tokens)
    sequence, place = _spread(tiles)  # of each tile
    first = place * tokens
    last = np.minimum(first + tokens, queries[sequence])
    cached_tiles = -(-cached // shape.keys)[sequence]
    key_tiles = cached_tiles + -(-(offsets[sequence] + last) // shape.keys)

    programs = max(1, num_multiprocessors * shape.programs // num_kv_heads)
    pieces = choose_pieces(key_tiles, shape.keys, programs)
    owner, piece = _spread(pieces)  # of each item: its tile, and which of its pieces
    num_pieces, num_tiles = pieces[owner], key_tiles[owner]
    begin, end = num_tiles * piece // num_pieces, num_tiles * (piece + 1) // num_pieces
    split = num_pieces > 1
    slots = np.where(split, split.cumsum() - 1, -1)

    of_item = sequence[owner]
    items = _records(
        ITEM_FIELDS,
        of_item,
        starts[of_item],
        first[owner],  # tokens of the tile, counted in the sequence's fresh ones
        last[owner],
        cached[of_item],
        key_starts[of_item],  # the sequence's first row in k and v
        offsets[of_item],
        (offsets + queries)[of_item],  # rows it has there
        begin,  # tiles of keys: cached ones, then the others
        end,
        slots,
        cached_tiles[owner],
    )
    items = items[(begin - end).argsort(kind="stable")]
    firsts = split & (piece == 0)  # one item of each tile that was cut
    cut = owner[firsts]
    merges = _records(
        MERGE_FIELDS,
        starts[sequence[cut]] + first[cut],  # first row in q
        last[cut] - first[cut],
        slots[firsts],  # the first of its slots, which follow each other
        pieces[cut],
    )
    table = np.concatenate([items.ravel(), merges.ravel(), copies.ravel()])
    return PrefillPlan(
        tuple(query_lens),
        tuple(context_lens),
        shape,
        torch.from_numpy(table),
        num_items=len(items),
        num_merges=len(merges),
        num_copies=len(copies),
        num_slots=int(np.count_nonzero(split)),
        num_keys=num_keys,
        paged=bool(cached[sequence].any()),
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


def choose_pieces(key_tiles: np.ndarray, keys: int, programs: int) -> np.ndarray:
    """Into how many items to cut each tile: what is estimated to end first.

    Args:
        key_tiles: ``[N]``, tiles of keys that each tile of queries reads.
        keys: of such a tile.
        programs: items that the GPU works on at a time, for one KV head.

    Returns:
        ``[N]``, at least 1.
    """
    whole = np.ones(len(key_tiles), np.int64)
    longest, total = int(key_tiles.max(initial=0)), int(key_tiles.sum())
    if longest * EVEN_WAVES <= total / programs:
        return whole
    best, best_time = whole, _duration(key_tiles, whole, programs)
    for cut in CUTS:
        limit = -(-longest // cut)
        pieces = -(-key_tiles // limit)
        num_items = int(pieces.sum())
        if limit * keys < MIN_KEYS_PER_ITEM or num_items > len(whole) + MAX_WAVES * programs:
            break
        if (total + num_items) / programs + MERGE_COST / keys >= best_time:
            break  # too much work even if all programs ended together; and it grows with each cut
        time = _duration(key_tiles, pieces, programs) + MERGE_COST / keys
        if time < best_time:
            best, best_time = pieces, time
    return best


def _duration(key_tiles: np.ndarray, pieces: np.ndarray, programs: int) -> float:
    """Time of all items in tiles of keys, the longest first, each on the program free first."""
    lengths = -(-key_tiles // pieces) + 1  # 1: a program's start and end
    if pieces.sum() <= programs:
        return int(lengths.max())
    ends = [0] * programs
    for length in sorted(lengths.repeat(pieces).tolist(), reverse=True):
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def round_up(size: int) -> int:
    """To a power of two or one of three sizes between two of them, at most a quarter more."""
    if size <= 4:
        return size
    quarter = 1 << ((size - 1).bit_length() - 3)
    return -(-size // quarter) * quarter


def _starts(counts: np.ndarray) -> np.ndarray:
    return counts.cumsum() - counts


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For owners of so many parts each: whose every part is, and which of its owner's parts."""
    owner = np.arange(len(counts)).repeat(counts)
    return owner, np.arange(len(owner)) - _starts(counts)[owner]


def _records(fields: int, *columns: np.ndarray) -> np.ndarray:
    """The columns side by side, padded to ``fields``, which keeps the table's parts aligned."""
    records = np.zeros((len(columns[0]), fields), np.int32)
    for i, column in enumerate(columns):
        records[:, i] = column
    return records


def _lay_out_keys(
    queries: np.ndarray, contexts: np.ndarray, gathered: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows for all fresh keys, and in front of them the contexts that are to be gathered.

    Returns:
        the copies ``[C, COPY_FIELDS]`` (row, sequence or -1 for fresh keys, first token, tokens),
        each sequence's first row ``[B]``, and the number of rows.
    """
    moved = np.where(gathered, contexts, 0)
    starts = _starts(queries + moved)
    parts = []
    for sources, begins, froms, counts in (
        (np.arange(len(queries)), starts, np.zeros_like(starts), moved),
        (np.full(len(queries), -1), starts + moved, _starts(queries), queries),
    ):
        owner, place = _spread(-(-counts // COPY_TOKENS))
        done = place * COPY_TOKENS
        moved_now = np.minimum(counts[owner] - done, COPY_TOKENS)
        columns = (begins[owner] + done, sources[owner], froms[owner] + done, moved_now)
        parts.append(_records(COPY_FIELDS, *columns))
    return np.concatenate(parts), starts, int((queries + moved).sum())

"""What ``common.trace`` reads from an engine's rooms, and how it writes down what changed there.

The milestones' schedulers and caches have the same roles under slightly different names; this is
the one place that knows them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.request import Request

Record = dict[str, Any]
Chunk = tuple[Request, int, int, bool]  # tokens [start, end); whether the next one is sampled

PREFIX_COUNTERS = (
    "num_queries", "num_hits", "num_query_tokens", "num_hit_tokens", "num_inserted", "num_evicted",
    "num_blocks", "num_nodes", "num_evictable",
)  # fmt: skip

# A snapshot of the prefix index costs time for each of its nodes: one of more nodes than this is
# looked at in every second step, of twice as many in every third, and so on.
_NODES_A_STEP = 128


@dataclass(frozen=True)
class Computed:
    """The whole work of a step in m0 and m1: tokens ``[start, end)`` of one sequence."""

    request: Request
    start: int
    end: int


class TracedSequence:
    """What the trace remembers of a request that has not ended."""

    __slots__ = ("chunks_end", "index", "num_preemptions", "request", "table")

    def __init__(self, index: int, request: Request) -> None:
        self.index = index
        self.request = request
        self.num_preemptions = 0
        self.chunks_end = 0  # tokens that its chunks have covered since it was admitted
        self.table: list[int] = []  # its block table as last written


def split(plan: Any) -> tuple[Sequence[Request], Sequence[Chunk]]:
    """Who decodes in a step, and the chunks of the others."""
    if isinstance(plan, Computed):
        request, start, end = plan.request, plan.start, plan.end
        if start and end - start == 1:
            return [request], []
        return [], [(request, start, end, True)]
    if not hasattr(plan, "parts"):  # up to m4 a step is either a prefill or a decode
        if not plan.is_prefill:
            return plan.requests, []
        return [], [(request, 0, request.num_computed_tokens, True) for request in plan.requests]
    parts, num_decodes = plan.parts, plan.num_decodes
    if num_decodes == len(parts):
        return plan.requests, []
    return [part.request for part in parts[:num_decodes]], [
        (part.request, part.start, part.end, part.samples) for part in parts[num_decodes:]
    ]


def was_taken_back(plan: Any) -> bool:
    """Whether a step that was scheduled has not been computed: then its sequences start over."""
    for part in getattr(plan, "parts", ()):
        if not part.request.is_finished:
            return part.request.num_computed_tokens < part.end
    return False


class ChunkReasons:
    """What ended each chunk, from how the scheduler's counts of it grow (from m5 on)."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._counts = self._read()

    def _read(self) -> dict[str, int]:
        return dict(getattr(self._scheduler, "chunk_reasons", ()))

    def of(self, chunks: Sequence[Chunk]) -> list[str | None]:
        """A reason for each chunk of the step that was scheduled last; None where nobody counts.

        A chunk to the end of what is known was ended by that. Once a limit of the step is used up
        no chunk follows, so it ended the last of the others; what is left then are free blocks.
        """
        counts, before = self._read(), self._counts
        if not counts:
            return [None] * len(chunks)
        self._counts = counts
        names = ("budget", "chunk", "itl")
        limit = next((why for why in names if counts.get(why, 0) > before.get(why, 0)), "blocks")
        reasons: list[str | None] = []
        for _, _, _, is_whole in reversed(chunks):
            reasons.append("prompt" if is_whole else limit)
            limit = limit if is_whole else "blocks"
        return reasons[::-1]


class BlockTables:
    """The cache's layout, and block tables that are not as they were in the step before."""

    def __init__(self, engine: Any) -> None:
        self._scheduler = getattr(engine, "scheduler", None)  # from m2 on
        cache = getattr(engine, "kv_cache", None) if self._scheduler is None else None
        self._one_slot = [0, 0] if cache is None else [cache.num_slots, 1]
        self._lens: list[int] = []  # of the tables of the last batch, if that only decoded
        self.layout = self._layout_of(None)

    def record(
        self,
        record: Record,
        plan: Any,
        decodes: Sequence[Request],
        of: Mapping[str, TracedSequence],
        running: list[Request],
    ) -> None:
        """Add to a step's record: layout, copies, and ``[sequence, blocks kept, new ones]``.

        Args:
            decodes: who decodes in it.
            of: sequences by ``Request.key``.
            running: the scheduler's queue.
        """
        layout = self._layout_of(plan)
        if layout != self.layout:
            self.layout = record["layout"] = layout
        copies = getattr(plan, "copies", ())
        if copies:
            record["copies"] = [[copy.source, copy.target] for copy in copies]
        is_same = record.get("decode") == "same" and "chunks" not in record
        if is_same and not copies and hasattr(plan, "block_tables"):
            changed = self._grown(plan.block_tables, decodes, of)
        else:
            self._lens = []
            changed = self._changed(plan, of, running)
        if changed:
            record["tables"] = changed

    def _layout_of(self, plan: Any) -> list[int]:
        """Tokens in a block and number of blocks; up to m2 slots are what comes closest."""
        if self._scheduler is None:
            return self._one_slot
        cache = self._scheduler.kv_cache
        if hasattr(cache, "pool"):
            return [cache.block_size, cache.pool.num_blocks]
        slot_len = cache.slot_len if plan is None else plan.slot_len
        return [slot_len, cache.num_slots_at(slot_len)]

    def _changed(
        self, plan: Any, of: Mapping[str, TracedSequence], running: list[Request]
    ) -> list[list[Any]]:
        changed = []
        for request, table in self._tables(plan, running):
            sequence = of[request.key]
            old = sequence.table
            if table != old:
                kept = _num_common(old, table)
                old[kept:] = table[kept:]
                changed.append([sequence.index, kept, old[kept:]])
        return changed

    def _grown(
        self,
        tables: Sequence[Sequence[int]],
        decodes: Sequence[Request],
        of: Mapping[str, TracedSequence],
    ) -> list[list[Any]]:
        """The same sequences decode on, nothing is copied: a table has changed if it is longer."""
        lens = list(map(len, tables))
        if lens == self._lens:
            return []
        changed = []
        before = self._lens or [0] * len(lens)
        self._lens = lens
        for place, num_blocks in enumerate(lens):
            if num_blocks == before[place]:
                continue
            sequence = of[decodes[place].key]
            kept = len(sequence.table)
            if num_blocks > kept:
                sequence.table += tables[place][kept:]
                changed.append([sequence.index, kept, sequence.table[kept:]])
        return changed

    def _tables(
        self, plan: Any, running: list[Request]
    ) -> list[tuple[Request, Sequence[int]]]:
        """The block table of everyone in a step; of slots, the number of the one they are in."""
        if isinstance(plan, Computed):
            return [(plan.request, [0])] if self.layout[1] else []
        if not hasattr(plan, "block_tables"):
            # Those before the batch sit still in it, but may have moved since the step before.
            in_slots = [*running[: plan.first_slot], *plan.requests]
            return [(request, [slot]) for slot, request in enumerate(in_slots)]
        tables = list(zip(plan.requests, plan.block_tables, strict=True))
        if plan.forks:
            table_of = {request.key: table for request, table in tables}
            for key, samples in plan.forks.items():
                tables += [(sample, table_of[key]) for sample in samples]
        return tables


class PrefixNodes:
    """The prefix index: its counters, and its nodes that are new, changed or gone (from m6 on)."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._stats: Any = None  # as last seen
        self._counters: list[int] = []
        self._nodes: dict[int, tuple[int, tuple[int, ...]]] = {}  # by their first block
        self._shape: tuple[int, ...] = ()  # of the last snapshot
        self._num_steps_to_snapshot = 0

    def record(self, record: Record) -> None:
        """Add to a step's record what is not as it was."""
        if self._index is None:
            return
        stats = self._index.stats()
        self._num_steps_to_snapshot -= 1
        if stats == self._stats and self._shape == _shape(stats):
            return
        self._stats = stats
        counters = [getattr(stats, name) for name in PREFIX_COUNTERS]
        if counters != self._counters:
            self._counters = record["prefix"] = counters
        shape = _shape(stats)
        if shape == self._shape or self._num_steps_to_snapshot > 0:
            return
        self._shape = shape
        self._num_steps_to_snapshot = 1 + stats.num_nodes // _NODES_A_STEP
        # A node goes by its first block: no other has that, and it keeps it as long as it lives.
        nodes = {
            blocks[0]: (-1 if parent is None else parent, tuple(blocks))
            for parent, blocks in self._index.snapshot()
        }
        new = [[first, *node] for first, node in nodes.items() if self._nodes.get(first) != node]
        gone = [first for first in self._nodes if first not in nodes]
        if new or gone:
            record["tree"] = {"nodes": new, "gone": gone}
        self._nodes = nodes


def _shape(stats: Any) -> tuple[int, ...]:
    """Counters of a prefix index of which one moves whenever its nodes do."""
    return (stats.num_inserted, stats.num_evicted, stats.num_nodes, stats.num_blocks)


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items two lists begin with alike."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)

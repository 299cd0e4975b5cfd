"""Which blocks hold which sequence's tokens. Pure bookkeeping: no tensors here.

A sequence's *block table* lists its blocks in order: token i lives in block
``table[i // block_size]`` at offset ``i % block_size``. The blocks may lie anywhere, so no memory
is reserved for tokens that may never come, and at most one block a sequence is partly empty::

    A: tokens 0-15 -> block 7, 16-31 -> block 2, 32-36 -> block 9 (5 of 16 slots used)
    B: tokens 0-15 -> block 7 (shared with A), 16-20 -> block 4

Copy-on-write: samples of one prompt share its blocks. Full blocks are never written again, so only
the last, partly filled one matters: whoever writes to it while others hold it gets a copy first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.request import Request

from .block_pool import BlockPool


@dataclass(frozen=True)
class BlockCopy:
    """Copy a whole block of the cache in every layer, before the step that writes to ``target``."""

    source: int
    target: int


class PagedKVCache:
    """Block tables over a pool, with counters of what is really used.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._tables: dict[str, list[int]] = {}
        self._num_filled = [0] * num_blocks  # slots of each block that hold a token
        self._num_used = 0  # sum over allocated blocks; a shared slot counts once

    def table(self, request: Request) -> list[int]:
        """The block table of a request; not to be changed by the caller."""
        return self._tables[request.key]

    def tables(self, requests: Sequence[Request]) -> list[list[int]]:
        """The block table of each; not to be changed by the caller."""
        tables = self._tables
        return [tables[request.key] for request in requests]

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_new_blocks(self, request: Request, num_tokens: int) -> int:
        """Blocks to take from the pool before the cache can hold ``num_tokens`` of a request.

        That is what its table lacks, and one more if the block it will write to is shared.
        """
        table = self._tables.get(request.key, ())
        missing = self.num_blocks_for(num_tokens) - len(table)
        first = request.num_computed_tokens // self.block_size
        copies = first < len(table) and self.pool.ref_count(table[first]) > 1
        return missing + copies

    def allocate(self, request: Request, num_tokens: int) -> BlockCopy | None:
        """Make room for the first ``num_tokens`` tokens of a request, of which the last are new.

        The pool must have ``num_new_blocks`` free. Returns the copy to make before they are
        written, if the block they begin in is shared.
        """
        table = self._tables.setdefault(request.key, [])
        copy = None
        first = request.num_computed_tokens // self.block_size  # place of the block to write to
        if first < len(table) and self.pool.ref_count(table[first]) > 1:
            copy = BlockCopy(table[first], self.pool.allocate())
            self._release(copy.source)
            table[first] = copy.target
        while len(table) * self.block_size < num_tokens:
            table.append(self.pool.allocate())
        for place in range(first, len(table)):
            self._fill(table[place], min(num_tokens - place * self.block_size, self.block_size))
        return copy

    def append(self, requests: Sequence[Request], first: int) -> int:
        """Make room for one more token of each request from ``requests[first]`` on.

        Stops at one whose last block is shared, or full while no other is free: that is for
        ``allocate``. Returns its place. Every decode step asks for everyone, so it has to be quick.
        """
        size, tables, filled, pool = self.block_size, self._tables, self._num_filled, self.pool
        ref_counts = pool.ref_counts
        place = first
        for request in requests[first:]:
            table, num_tokens = tables[request.key], request.num_computed_tokens
            if num_tokens == len(table) * size:
                if not pool.num_free:
                    break
                table.append(pool.allocate())
            block = table[-1]
            if ref_counts[block] > 1:
                break
            num_here = num_tokens % size + 1
            self._num_used += num_here - filled[block]  # nothing new after a step that broke off
            filled[block] = num_here
            place += 1
        return place

    def fork(self, parent: Request, child: Request) -> None:
        """Let ``child`` share all blocks of ``parent``; whoever writes first will copy."""
        table = list(self._tables[parent.key])
        self.pool.share_all(table)
        self._tables[child.key] = table

    def free(self, request: Request) -> None:
        """Let go of all blocks of a request."""
        for block in self.pool.release_all(self._tables.pop(request.key)):
            self._fill(block, 0)

    @property
    def num_used(self) -> int:
        """Slots that hold a token; one that several sequences share counts once."""
        return self._num_used

    @property
    def num_allocated(self) -> int:
        """Slots in allocated blocks."""
        return self.pool.num_allocated * self.block_size

    def _fill(self, block: int, num_tokens: int) -> None:
        self._num_used += num_tokens - self._num_filled[block]
        self._num_filled[block] = num_tokens

    def _release(self, block: int) -> None:
        if self.pool.release(block):
            self._fill(block, 0)

"""Which blocks hold which sequence's tokens. Pure bookkeeping: no tensors here.

A sequence's *block table* lists its blocks in order: token i lives in block
``table[i // block_size]`` at offset ``i % block_size``. The blocks may lie anywhere, so no memory
is reserved for tokens that may never come, and at most one block a sequence is partly empty::

    A: tokens 0-15 -> block 7, 16-31 -> block 2, 32-36 -> block 9 (5 of 16 slots used)
    B: tokens 0-15 -> block 7 (shared with A), 16-20 -> block 4

Copy-on-write: samples of one prompt share its blocks. Full blocks are never written again, so only
the last, partly filled one matters: whoever writes to it while others hold it gets a copy first.

Prefix caching: full blocks are entered into an index by the tokens they hold. A sequence that
begins as another one did takes the same blocks, and where it parts from the other inside a block,
a copy of that. Blocks that nobody holds any more stay in the index until somebody needs the room.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from common.request import Request

from .block_pool import BlockPool
from .hash_index import HashIndex, Match, PrefixIndex, PrefixStats, block_keys
from .prefix_tree import PrefixTree


@dataclass(frozen=True)
class BlockCopy:
    """Copy a whole block of the cache in every layer, before the step that writes to ``target``."""

    source: int
    target: int


INDEXES = {"tree": PrefixTree, "hash": HashIndex}
_NO_MORE = sys.maxsize  # in place of a number of blocks: nothing behind these will be entered


@dataclass
class _Asked:
    """The last question to the index. Who is first in the queue asks again in every step."""

    request: Request
    num_tokens: int  # that the request had
    keys: tuple[list[bytes], bytes]
    num_changes: int  # of the index
    match: Match


class PagedKVCache:
    """Block tables over a pool, with counters of what is really used.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
        prefix_index: "tree" or "hash"; "off": nothing is shared across requests.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_index: str = "tree") -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.index: PrefixIndex | None = None
        if prefix_index != "off":
            self.index = INDEXES[prefix_index](self.pool, block_size)
        self._tables: dict[str, list[int]] = {}
        self._num_indexed: dict[str, int] = {}  # by Request.key: leading blocks that were entered
        self._fresh: set[int] = set()  # blocks that the step being planned will fill
        self._asked: _Asked | None = None
        self._num_held = 0  # blocks that a sequence holds; the index is none
        # Slots of each held block that hold no token, and their sum. Most blocks are full: they can
        # be found and let go of by the hundred, and there is nothing to write here.
        self._num_empty = [0] * num_blocks
        self._num_empty_in_all = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be had: free ones, and those that only the index holds."""
        return self.pool.num_free + (self.index.num_evictable() if self.index else 0)

    def num_free_beside(self, match: Match) -> int:
        """The same, once the blocks of a match are held."""
        return self.pool.num_free + (self.index.num_evictable(match) if self.index else 0)

    def begin_step(self) -> None:
        """A new step is planned: what earlier ones fill is there before it."""
        self._fresh.clear()

    def match(self, request: Request) -> Match:
        """What the cache holds already of a request that has nothing computed.

        The last token is always computed: its logits are what the next one is drawn from. So are
        all tokens of a prompt whose log-probabilities were asked for.
        """
        tokens = request.token_ids
        if self.index is None:
            return Match([], 0, len(tokens), 0)
        wants_all = request.sampling_params.prompt_logprobs is not None
        most = 0 if wants_all and not request.output_token_ids else len(tokens) - 1
        match = self._find(request, most)
        # Copies are made before the step: a block that it fills itself is still empty then. And a
        # copy costs as much as computing some tokens does.
        too_early = match.partial_block in self._fresh
        too_few = 2 * match.num_partial_tokens < self.block_size
        return match.without_partial() if too_early or too_few else match

    def begin(self, request: Request, match: Match) -> BlockCopy | None:
        """Give a request the blocks of a match; its ``num_computed_tokens`` follow.

        Returns the copy to make of a block that it shares in part.
        """
        copy = self._asked = None
        if self.index is not None:
            taken = self.index.acquire(match)
            self._num_held += len(taken)
        table = self._tables[request.key] = list(match.blocks)
        self._num_indexed[request.key] = len(match.blocks)
        request.num_computed_tokens = match.num_tokens
        if match.partial_block is not None:
            copy = BlockCopy(match.partial_block, self._take())
            # The copy is made before the step, so whoever gets the source next comes after it.
            self.index.release(match.partial_block)
            table.append(copy.target)
            self._fill(copy.target, match.num_partial_tokens)
            request.num_computed_tokens += match.num_partial_tokens
        return copy

    def enter(self, request: Request) -> None:
        """Enter into the index what is full and known of a request's blocks by now."""
        if self.index is None:
            return
        num_known = min(request.num_computed_tokens, request.num_tokens)
        num_full = num_known // self.block_size
        num_indexed, table = self._num_indexed[request.key], self._tables[request.key]
        if num_full > num_indexed:
            num_entered = self.index.insert(request.token_ids, table[:num_full])
            self._fresh.update(table[num_indexed:num_entered])
            # Where another sequence holds the same block as ours, ours stay ours from there on.
            self._num_indexed[request.key] = num_full if num_entered == num_full else _NO_MORE

    def forget_all(self) -> None:
        """Empty the index: what it says of blocks is not to be relied on."""
        if self.index is not None:
            self.index.clear()

    def prefix_stats(self) -> PrefixStats | None:
        """Counters of the index; None without one."""
        return self.index.stats() if self.index else None

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

        There must be ``num_new_blocks`` free. Returns the copy to make before they are
        written, if the block they begin in is shared.
        """
        table = self._tables.setdefault(request.key, [])
        copy = None
        first = request.num_computed_tokens // self.block_size  # place of the block to write to
        if first < len(table) and self.pool.ref_count(table[first]) > 1:
            copy = BlockCopy(table[first], self._take())
            self._release([copy.source])
            table[first] = copy.target
        while len(table) * self.block_size < num_tokens:
            table.append(self._take())
        for place in range(first, self.num_blocks_for(num_tokens)):
            self._fill(table[place], min(num_tokens - place * self.block_size, self.block_size))
        return copy

    def append(self, requests: Sequence[Request], first: int) -> int:
        """Make room for one more token of each request from ``requests[first]`` on.

        Stops at one whose last block is shared, or full while none is free without evicting: that
        is for ``allocate``. Returns its place. Every decode step asks for everyone, so it has to
        be quick.
        """
        size, tables, empty, pool = self.block_size, self._tables, self._num_empty, self.pool
        ref_counts = pool.ref_counts
        place = first
        for request in requests[first:]:
            table, num_tokens = tables[request.key], request.num_computed_tokens
            if num_tokens == len(table) * size:
                if not pool.num_free:
                    break
                table.append(self._take())
            block = table[-1]
            if ref_counts[block] > 1:
                break
            num_left = size - 1 - num_tokens % size
            self._num_empty_in_all += num_left - empty[block]
            empty[block] = num_left
            place += 1
        return place

    def fork(self, parent: Request, child: Request) -> None:
        """Let ``child`` share all blocks of ``parent``; whoever writes first will copy."""
        table = list(self._tables[parent.key])
        self.pool.share_all(table)
        self._tables[child.key] = table
        self._num_indexed[child.key] = self._num_indexed[parent.key]

    def free(self, request: Request) -> None:
        """Let go of all blocks of a request, from the end: a prefix is of use without what follows,
        what follows is not without it, and the hash index evicts in the order of release."""
        self._release(self._tables.pop(request.key)[::-1])
        del self._num_indexed[request.key]

    @property
    def num_used(self) -> int:
        """Slots that hold a token; one that several sequences share counts once."""
        return self.num_allocated - self._num_empty_in_all

    @property
    def num_allocated(self) -> int:
        """Slots in blocks that a sequence holds."""
        return self._num_held * self.block_size

    def _find(self, request: Request, max_tokens: int) -> Match:
        """Ask the index; only if something has changed since the same question."""
        index, asked, tokens = self.index, self._asked, request.token_ids
        if asked is None or asked.request is not request or asked.num_tokens != len(tokens):
            keys = block_keys(tokens[:max_tokens], self.block_size)
        elif asked.num_changes == index.num_changes:
            return asked.match
        else:
            keys = asked.keys
        match = index.match(tokens, max_tokens, keys)
        self._asked = _Asked(request, len(tokens), keys, index.num_changes, match)
        return match

    def _fill(self, block: int, num_tokens: int) -> None:
        """Note that a held block has so many tokens now."""
        num_left = self.block_size - num_tokens
        self._num_empty_in_all += num_left - self._num_empty[block]
        self._num_empty[block] = num_left

    def _take(self) -> int:
        """A block nobody holds, from the index if need be."""
        if not self.pool.num_free and self.index is not None:
            self.index.evict(1)
        self._num_held += 1
        return self.pool.allocate()

    def _release(self, blocks: Sequence[int]) -> None:
        unheld = (self.index or self.pool).release_all(blocks)
        self._num_held -= len(unheld)
        empty = self._num_empty
        for block in unheld:
            if empty[block]:
                self._num_empty_in_all -= empty[block]
                empty[block] = 0

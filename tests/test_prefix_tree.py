"""The two indexes of cached prefixes: what they find, keep and give up, beside a plain record."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from prefix_cases import SIZE, TOKENS, num_common, paths

from m6_prefix.block_pool import BlockPool
from m6_prefix.hash_index import HashIndex
from m6_prefix.prefix_tree import PrefixTree


class IndexMachine(RuleBasedStateMachine):
    """Sequences that come, grow, fork and go, over an index and over a plain record of it.

    The record is a dictionary from every cached prefix, spelled out, to its last block.
    """

    index_class: type

    @initialize(num_blocks=st.integers(2, 16))
    def create(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.index = self.index_class(self.pool, SIZE)
        self.cached: dict[tuple, int] = {}
        self.last_use: dict[tuple, int] = {}  # when it became idle, of those that are
        self.now = 0
        self.sequences: list[tuple[list[int], list[int]]] = []  # tokens and block table
        self.hit_tokens = self.asked_tokens = self.evicted = 0

    # What the record says.

    def holders(self, block):
        return sum(table.count(block) for _, table in self.sequences)

    def settle(self):
        """Let time pass: what is not held any more has been used until now."""
        self.now += 1
        idle = {path for path, block in self.cached.items() if not self.holders(block)}
        self.last_use = {path: self.last_use.get(path, self.now) for path in idle}

    def eviction_order(self):
        return sorted(self.last_use, key=lambda path: (self.last_use[path], -len(path)))

    # What is done to both.

    def evict_both(self, num_blocks):
        expected = self.eviction_order()[:num_blocks]
        assert self.index.evict(num_blocks) == [self.cached.pop(path) for path in expected]
        self.evicted += len(expected)
        self.settle()

    def take(self, num_blocks):
        """So many blocks of the pool, evicting for them just what is needed."""
        self.evict_both(max(num_blocks - self.pool.num_free, 0))
        return [self.pool.allocate() for _ in range(num_blocks)]

    def insert_both(self, tokens, table):
        known = set(self.cached.values())
        first = max((i + 1 for i, block in enumerate(table) if block in known), default=0)
        num_taken = first
        for path in paths(tokens)[first:]:
            if path in self.cached and self.holders(self.cached[path]):
                break  # another sequence's own: ours stay apart
            self.cached[path] = table[num_taken]
            self.last_use.pop(path, None)
            num_taken += 1
        assert self.index.insert(tokens, table) == num_taken
        self.settle()

    def room_beside(self, match):
        return self.pool.num_free + self.index.num_evictable(match)

    @rule(
        data=st.data(),
        more=TOKENS,
        looks=st.sampled_from([True, True, False]),
        inserts=st.booleans(),
        copies=st.booleans(),
    )
    def admit(self, data, more, looks, inserts, copies):
        """A prompt that goes on from something cached, if only from nothing at all."""
        tokens = [*data.draw(st.sampled_from([(), *self.cached])), *more]
        most = len(tokens) - 1 if looks else 0
        match = self.index.match(tokens, most)
        self.check_match(match, tokens[:most])
        num_new = -(-len(tokens) // SIZE) - len(match.blocks)
        if not copies or self.room_beside(match) < num_new:
            match = match.without_partial()
        if self.room_beside(match) < num_new:
            return
        expected_room = self.room_beside(match)
        self.index.acquire(match)
        held = match.blocks + [match.partial_block] * (match.partial_block is not None)
        self.sequences.append((tokens, held))
        self.settle()
        assert self.pool.num_free + self.index.num_evictable() == expected_room
        new = self.take(num_new)
        if match.partial_block is not None:
            self.index.release(match.partial_block)
        self.sequences[-1] = (tokens, match.blocks + new)
        self.settle()
        self.asked_tokens += len(tokens)
        self.hit_tokens += match.num_tokens + match.num_partial_tokens
        if inserts:
            self.insert_both(*self.sequences[-1])

    def check_match(self, match, tokens):
        expected = list(itertools.takewhile(self.cached.__contains__, paths(tokens)))
        assert match.blocks == [self.cached[path] for path in expected]
        assert match.num_tokens == len(expected) * SIZE
        behind = {
            block: num_common(path[match.num_tokens :], tokens[match.num_tokens :])
            for path, block in self.cached.items()
            if len(path) == match.num_tokens + SIZE
            and path[: match.num_tokens] == tuple(tokens[: match.num_tokens])
        }
        if self.index_class is HashIndex or not any(behind.values()):
            assert (match.partial_block, match.num_partial_tokens) == (None, 0)
        else:
            assert match.num_partial_tokens == max(behind.values())
            assert behind[match.partial_block] == match.num_partial_tokens

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), more=TOKENS)
    def grow(self, data, more):
        tokens, table = data.draw(st.sampled_from(self.sequences))
        num_new = -(-(len(tokens) + len(more)) // SIZE) - len(table)
        if self.pool.num_free + self.index.num_evictable() >= num_new:
            tokens += more
            table += self.take(num_new)
            self.insert_both(tokens, table)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def insert(self, data):
        self.insert_both(*data.draw(st.sampled_from(self.sequences)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data):
        """Another sequence shares the full blocks, as samples of one prompt do."""
        tokens, table = data.draw(st.sampled_from(self.sequences))
        num_full = len(tokens) // SIZE
        for block in table[:num_full]:
            self.pool.share(block)
        self.sequences.append((tokens[: num_full * SIZE], table[:num_full]))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), at_once=st.booleans())
    def finish(self, data, at_once):
        place = data.draw(st.integers(0, len(self.sequences) - 1))
        _, table = self.sequences.pop(place)
        if at_once:
            unheld = [block for block in table if self.holders(block) == 0]
            assert sorted(self.index.release_all(table[::-1])) == sorted(unheld)
        else:
            for block in reversed(table):
                assert self.index.release(block) is (self.holders(block) == 0)
        self.settle()

    @rule(num_blocks=st.integers(0, 5))
    def evict(self, num_blocks):
        self.evict_both(num_blocks)

    @rule(gone=st.integers(0, 9))
    def clear(self, gone):
        if gone:  # seldom
            return
        freed = [block for block in self.cached.values() if not self.holders(block)]
        assert sorted(self.index.clear()) == sorted(freed)
        self.cached.clear()
        self.settle()

    @invariant()
    def every_block_can_be_walked_to(self):
        """Whoever holds one holds those before it, and these are cached too."""
        for path, block in getattr(self, "cached", {}).items():
            if len(path) > SIZE:
                before = self.cached[path[:-SIZE]]
                assert self.holders(before) >= self.holders(block)
                assert self.index.match(path).blocks[-2:] == [before, block]

    @invariant()
    def counts_are_right(self):
        if not hasattr(self, "pool"):
            return
        stats = self.index.stats()
        assert stats.num_blocks == len(self.cached)
        assert stats.num_nodes <= stats.num_blocks
        assert stats.num_evictable == self.index.num_evictable() == len(self.last_use)
        assert stats.num_evicted == self.evicted
        assert (stats.num_hit_tokens, stats.num_query_tokens) == (
            self.hit_tokens,
            self.asked_tokens,
        )
        known = set(self.cached.values())
        for block in range(self.pool.num_blocks):
            assert self.pool.ref_count(block) == self.holders(block) + (block in known)

    def teardown(self):
        """Nothing leaks: after everyone has let go, all blocks can be had."""
        if not hasattr(self, "pool"):
            return
        while self.sequences:
            _, table = self.sequences.pop()
            for block in table:
                self.index.release(block)
        num_blocks = self.pool.num_blocks
        assert self.pool.num_free + self.index.num_evictable() == num_blocks
        self.index.evict(num_blocks)
        assert self.pool.num_free == num_blocks
        stats = self.index.stats()
        assert (stats.num_blocks, stats.num_nodes, stats.num_evictable) == (0, 0, 0)


class TreeMachine(IndexMachine):
    index_class = PrefixTree


class HashMachine(IndexMachine):
    index_class = HashIndex


TestTree = TreeMachine.TestCase
TestHash = HashMachine.TestCase
TestTree.settings = TestHash.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)

"""The two indexes of cached prefixes: what they find, keep and give up, beside a plain record."""

from __future__ import annotations

import itertools
import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from m3_paged.block_pool import BlockPool
from m6_prefix.hash_index import HashIndex
from m6_prefix.prefix_tree import PrefixTree

SIZE = 3
# Two different tokens and short blocks: prefixes meet and part all the time.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=16)


def num_common(a, b):
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def paths(tokens):
    """Its full-block prefixes, the shortest first."""
    return [tuple(tokens[:end]) for end in range(SIZE, len(tokens) + 1, SIZE)]


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

    def is_pinned(self, path):
        """Whether it has to stay: in a tree also for the sake of what follows it."""
        if self.index_class is HashIndex:
            return self.holders(self.cached[path]) > 0
        behind = (p for p in self.cached if p[: len(path)] == path)
        return any(self.holders(self.cached[p]) for p in behind)

    def settle(self):
        """Let time pass: what is not pinned any more has been used until now."""
        self.now += 1
        idle = {path for path in self.cached if not self.is_pinned(path)}
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
        duplicates = []
        for place, path in enumerate(paths(tokens)):
            if place < first:
                continue
            if path in self.cached:
                duplicates.append((place, self.cached[path]))
            else:
                self.cached[path] = table[place]
        assert self.index.insert(tokens, table) == duplicates
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
    @rule(data=st.data())
    def finish(self, data):
        place = data.draw(st.integers(0, len(self.sequences) - 1))
        _, table = self.sequences.pop(place)
        known = set(self.cached.values())
        for i, block in reversed(list(enumerate(table))):
            held_elsewhere = self.holders(block) or block in table[:i]
            assert self.index.release(block) is not (block in known or held_elsewhere > 0)
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


@pytest.fixture(params=[PrefixTree, HashIndex], ids=["tree", "hash"])
def index_class(request):
    return request.param


class Cache:
    """An index over a pool, and sequences that behave."""

    def __init__(self, index_class, num_blocks=64, block_size=4, pool_class=BlockPool, **options):
        self.pool = pool_class(num_blocks)
        self.index = index_class(self.pool, block_size, **options)
        self.block_size = block_size

    def compute(self, tokens):
        """Hold blocks for a sequence, with no look at the index, and insert them."""
        table = [self.pool.allocate() for _ in range(-(-len(tokens) // self.block_size))]
        self.index.insert(tokens, table)
        return table

    def release(self, table):
        for block in reversed(table):
            self.index.release(block)

    def remember(self, tokens):
        """Compute a sequence and let go of it."""
        table = self.compute(tokens)
        self.release(table)
        return table

    def blocks(self, tokens, max_tokens=None):
        return self.index.match(tokens, max_tokens).blocks


def run(first, length):
    return list(range(first, first + length))


class TestMatch:
    def test_only_full_blocks_are_found(self, index_class):
        cache = Cache(index_class)
        table = cache.remember(run(0, 11))
        assert cache.blocks(run(0, 11)) == cache.blocks(run(0, 9)) == table[:2]
        assert cache.blocks(run(0, 7)) == table[:1]
        assert cache.blocks(run(0, 3)) == cache.blocks([]) == cache.blocks(run(1, 8)) == []

    def test_a_full_hit_leaves_the_last_token_to_compute(self, index_class):
        cache = Cache(index_class)
        tokens = run(0, 12)
        table = cache.remember(tokens)
        assert cache.blocks(tokens) == table
        match = cache.index.match(tokens, len(tokens) - 1)
        assert (match.blocks, match.num_tokens) == (table[:2], 8)
        # The rest of the last block may be copied: then it is just the one token.
        copied = (table[2], 3) if index_class is PrefixTree else (None, 0)
        assert (match.partial_block, match.num_partial_tokens) == copied

    def test_the_same_block_after_another_prefix_is_another_block(self, index_class):
        cache = Cache(index_class)
        one = cache.remember([1] * 4 + [9] * 4)
        two = cache.remember([2] * 4 + [9] * 4)
        assert cache.blocks([1] * 4 + [9] * 4) == one
        assert cache.blocks([2] * 4 + [9] * 4) == two
        assert cache.blocks([9] * 4) == []

    def test_generated_tokens_are_found_in_the_next_turn(self, index_class):
        cache = Cache(index_class)
        tokens, table = run(0, 6), []
        for token in run(100, 20):
            if len(table) * 4 < len(tokens):
                table.append(cache.pool.allocate())
            cache.index.insert(tokens, table)
            tokens = [*tokens, token]
        cache.release(table)
        assert cache.blocks(tokens + run(200, 9)) == table[:6]

    def test_asking_changes_nothing(self, index_class):
        """A waiting request asks in every step; only a request that runs counts as a hit."""
        cache = Cache(index_class)
        old, new = cache.remember(run(0, 4)), cache.remember(run(10, 4))
        for _ in range(3):
            assert cache.blocks(run(0, 4)) == old
        stats = cache.index.stats()
        assert (stats.num_queries, stats.num_query_tokens, stats.num_hit_tokens) == (0, 0, 0)
        assert cache.index.evict(2) == old + new
        cache.index.acquire(cache.index.match(run(0, 4)))
        cache.remember(run(0, 4))
        cache.index.acquire(cache.index.match(run(0, 6)))
        stats = cache.index.stats()
        assert (stats.num_queries, stats.num_hits) == (2, 1)
        assert (stats.num_query_tokens, stats.num_hit_tokens) == (10, 4)
        assert stats.token_hit_rate == 0.4

    def test_unknown_tokens_are_refused(self, index_class):
        """-1 stands for a token that is sampled but not read back yet."""
        cache = Cache(index_class)
        with pytest.raises(ValueError, match="known"):
            cache.compute([1, 2, 3, -1])
        assert cache.index.stats().num_blocks == 0


class TestPartialBlock:
    def test_two_prompts_part_inside_a_block(self):
        cache = Cache(PrefixTree)
        table = cache.remember(run(0, 12))
        match = cache.index.match([*run(0, 6), 99, 98, 97])
        assert (match.blocks, match.num_tokens) == (table[:1], 4)
        assert (match.partial_block, match.num_partial_tokens) == (table[1], 2)

    @pytest.mark.parametrize("num_siblings", [1, 2, 5, 40])
    def test_the_most_similar_sibling_is_chosen(self, num_siblings):
        cache = Cache(PrefixTree, num_blocks=256)
        generator = random.Random(num_siblings)
        blocks = {}
        for _ in range(num_siblings):
            # Ids of several bytes each: similar bytes must not pass for similar tokens.
            tokens = tuple(generator.choice((1, 256, 257, 65536)) for _ in range(4))
            if tokens not in blocks:
                (blocks[tokens],) = cache.remember(tokens)
        for wanted in itertools.product((1, 256, 257, 65536), repeat=3):
            match = cache.index.match(wanted)
            similar = {block: num_common(tokens, wanted) for tokens, block in blocks.items()}
            assert match.num_partial_tokens == max(similar.values())
            if match.num_partial_tokens:
                assert similar[match.partial_block] == match.num_partial_tokens

    def test_it_is_safe_until_the_copy_is_under_way(self):
        cache = Cache(PrefixTree, num_blocks=3)
        table = cache.remember(run(0, 12))
        match = cache.index.match(run(0, 11))
        assert (match.blocks, match.partial_block) == (table[:2], table[2])
        cache.index.acquire(match)
        assert cache.index.evict(3) == []
        cache.index.release(table[2])
        assert cache.index.evict(3) == [table[2]]

    def test_without_room_for_the_copy_the_block_itself_is_room(self):
        cache = Cache(PrefixTree, num_blocks=3)
        table = cache.remember(run(0, 12))
        match = cache.index.match(run(0, 12), 11)
        assert cache.index.num_evictable(match) == 0
        assert cache.index.num_evictable(match.without_partial()) == 1
        cache.index.acquire(match.without_partial())
        assert cache.index.evict(1) == [table[2]]


class TestInsert:
    def test_the_same_prefix_twice_in_different_blocks(self, index_class):
        """Both were computed at once: the first one stays, the second one keeps its copy."""
        cache = Cache(index_class)
        one = cache.compute(run(0, 12))
        two = [cache.pool.allocate() for _ in range(4)]
        tokens = [*run(0, 12), 50, 51, 52, 53]
        duplicates = cache.index.insert(tokens, two)
        assert duplicates == [(0, one[0]), (1, one[1]), (2, one[2])]
        assert cache.blocks(tokens) == [*one, two[3]]
        assert [cache.pool.ref_count(block) for block in two] == [1, 1, 1, 2]
        cache.release(two)
        assert [cache.pool.ref_count(block) for block in two] == [0, 0, 0, 1]
        cache.release(one)
        assert cache.index.evict(64) == [two[3], *reversed(one)]
        assert cache.pool.num_free == 64

    @pytest.mark.parametrize("released_first", [False, True])
    def test_a_prefix_stays_while_what_follows_it_is_held(self, released_first):
        """Nobody holds the first one's blocks any more, but without them the rest were lost."""
        cache = Cache(PrefixTree)
        one = cache.compute(run(0, 8))
        two = [cache.pool.allocate() for _ in range(3)]
        if released_first:
            cache.release(one)
            assert cache.index.num_evictable() == 2
        cache.index.insert(run(0, 12), two)
        if not released_first:
            cache.release(one)
        assert cache.index.num_evictable() == 0
        assert cache.index.evict(5) == []
        cache.release(two)
        assert cache.index.evict(5) == [two[2], one[1], one[0]]

    def test_again_is_nothing_new(self, index_class):
        cache = Cache(index_class)
        table = cache.compute(run(0, 12))
        assert cache.index.insert(run(0, 12), table) == []
        assert [cache.pool.ref_count(block) for block in table] == [2, 2, 2]
        assert cache.index.stats().num_inserted == 3

    def test_blocks_without_tokens_and_tokens_without_blocks(self, index_class):
        cache = Cache(index_class)
        table = [cache.pool.allocate() for _ in range(5)]
        assert cache.index.insert(run(0, 9), table) == []
        assert cache.index.stats().num_blocks == 2
        assert cache.index.insert(run(0, 20), table[:3]) == []
        assert cache.blocks(run(0, 20)) == table[:3]
        assert cache.index.insert([], []) == cache.index.insert([1], table) == []

    def test_faults_of_the_caller_are_refused_and_change_nothing(self, index_class):
        cache = Cache(index_class)
        table = cache.compute(run(0, 8))
        mine = cache.pool.allocate()
        free = cache.pool.num_blocks - 1
        for tokens, blocks, message in (
            (run(0, 16), [*table, mine, free], "free"),
            (run(0, 16), [*table, mine, mine], "twice"),
            ([*run(0, 4), *run(50, 8)], [*table, mine], "other tokens"),
        ):
            with pytest.raises(RuntimeError, match=message):
                cache.index.insert(tokens, blocks)
            assert cache.blocks(run(0, 16)) == table
        cache.release([*table, mine])
        assert cache.index.evict(64) == list(reversed(table))
        assert cache.pool.num_free == 64


class TestEviction:
    def test_an_evicted_block_that_is_used_again_is_not_found_by_its_old_tokens(self, index_class):
        cache = Cache(index_class, num_blocks=2)
        table = cache.remember(run(0, 8))
        assert cache.index.evict(2) == table[::-1]
        again = cache.remember(run(50, 8))
        assert sorted(again) == sorted(table)
        assert cache.blocks(run(0, 8)) == []
        assert cache.blocks(run(50, 8)) == again

    def test_only_the_tail_that_is_needed_goes(self, index_class):
        cache = Cache(index_class)
        table = cache.remember(run(0, 20))
        assert cache.index.evict(2) == [table[4], table[3]]
        assert cache.blocks(run(0, 20)) == table[:3]
        cache.index.acquire(cache.index.match(run(0, 12)))
        other = [*table[:3], cache.pool.allocate()]
        cache.index.insert([*run(0, 12), 70, 71, 72, 73], other)
        assert cache.blocks(run(0, 20)) == table[:3]
        assert cache.blocks([*run(0, 12), 70, 71, 72, 73]) == other

    def test_a_match_that_is_held_stays_and_what_is_behind_it_goes(self, index_class):
        cache = Cache(index_class)
        table = cache.remember(run(0, 20))
        match = cache.index.match(run(0, 8))
        assert cache.index.num_evictable(match) == 3
        cache.index.acquire(match)
        assert cache.index.num_evictable() == 3
        assert cache.index.evict(64) == [table[4], table[3], table[2]]
        assert cache.blocks(run(0, 20)) == table[:2]
        cache.release(match.blocks)
        assert cache.index.evict(64) == [table[1], table[0]]

    def test_a_match_is_void_after_an_eviction(self, index_class):
        """Its blocks may be somebody else's by now."""
        cache = Cache(index_class, num_blocks=2)
        cache.remember(run(0, 8))
        match = cache.index.match(run(0, 8))
        cache.index.evict(1)
        cache.pool.allocate()
        with pytest.raises(RuntimeError, match="match again"):
            cache.index.acquire(match)

    def test_least_recently_used_first(self, index_class):
        cache = Cache(index_class)
        system, size = run(0, 8), 8
        one = cache.remember([*system, *run(100, size)])
        turns = []
        for first in (200, 300, 400):
            match = cache.index.match([*system, *run(first, size)])
            cache.index.acquire(match)
            table = match.blocks + [cache.pool.allocate() for _ in range(2)]
            cache.index.insert([*system, *run(first, size)], table)
            cache.release(table)
            turns.append(table)
        match = cache.index.match([*system, *run(100, size)])  # the oldest is used once more
        cache.index.acquire(match)
        cache.release(match.blocks)
        order = [*(block for table in turns for block in table[:1:-1]), *reversed(one)]
        assert cache.index.evict(64) == order

    def test_the_end_of_a_prefix_that_is_used_alone_goes_before_younger_ones(self, index_class):
        """The parent of the oldest leaf is not the next to go if it was used since."""
        cache = Cache(index_class)
        one, two = cache.remember(run(0, 8)), cache.remember(run(50, 4))
        match = cache.index.match(run(0, 4))
        cache.index.acquire(match)
        cache.release(match.blocks)
        assert cache.index.evict(3) == [one[1], *two, one[0]]

    def test_one_sequence_does_not_keep_what_another_one_added(self):
        """Two sequences of one prefix, one of them done: what it added is free to go."""
        cache = Cache(PrefixTree)
        one = cache.compute(run(0, 8))
        two = [cache.pool.allocate() for _ in range(4)]
        cache.index.insert([*run(0, 8), *run(50, 8)], two)
        cache.release(two)
        assert cache.index.evict(64) == [two[3], two[2]]
        # The same where the other one's blocks are a copy of what it has computed meanwhile.
        cache.index.acquire(cache.index.match(run(0, 4)))
        two = [one[0], *(cache.pool.allocate() for _ in range(2))]
        cache.index.insert([*run(0, 8), *run(50, 4)], two)
        cache.release(two)
        assert cache.index.evict(64) == [two[2]]
        cache.release(one)
        assert cache.index.evict(64) == one[::-1]

    def test_the_end_that_a_sequence_gave_back_goes_once_a_match_parts_it_from_the_rest(self):
        """It shares an edge with blocks that are held, until somebody holds only those."""
        cache = Cache(PrefixTree)
        table = cache.compute(run(0, 12))
        cache.index.release(table[2])
        assert cache.index.num_evictable() == 0
        cache.index.acquire(cache.index.match(run(0, 8)))
        assert cache.index.num_evictable() == 1
        assert cache.index.evict(64) == [table[2]]
        cache.release(table[:2] * 2)
        assert cache.index.evict(64) == [table[1], table[0]]

    def test_what_grew_by_several_blocks_is_held_and_released_whole(self, index_class):
        cache = Cache(index_class)
        table = cache.compute(run(0, 4))
        table += [cache.pool.allocate() for _ in range(3)]
        cache.index.insert(run(0, 16), table)
        for _ in range(2):
            assert cache.index.num_evictable() == 0
            cache.release(table)
            assert cache.index.num_evictable() == 4
            cache.index.acquire(cache.index.match(run(0, 16)))

    def test_a_sample_does_not_keep_what_another_one_added(self, index_class):
        """They share the prompt's block, which comes into the index with the first one's next."""
        cache = Cache(index_class)
        prompt = cache.pool.allocate()
        cache.pool.share(prompt)
        table = [prompt, cache.pool.allocate()]
        cache.index.insert(run(0, 8), table)
        cache.release(table)
        assert cache.index.evict(64) == [table[1]]
        cache.index.release(prompt)
        assert cache.index.evict(64) == [prompt]


class TestHashes:
    @settings(max_examples=100)
    @given(prompts=st.lists(TOKENS, max_size=12), num_names=st.integers(1, 4), seed=st.integers())
    def test_collisions_never_give_wrong_tokens(self, prompts, num_names, seed):
        """With a handful of names nearly everything collides."""
        cache = Cache(HashIndex, 256, SIZE, hash_block=lambda *block: hash(block) % num_names)
        generator = random.Random(seed)
        written: dict[int, tuple] = {}
        for tokens in prompts:
            match = cache.index.match(tokens)
            assert [written[b] for b in match.blocks] == paths(tokens)[: len(match.blocks)]
            cache.index.acquire(match)
            num_new = len(tokens) // SIZE - len(match.blocks)
            table = match.blocks + [cache.pool.allocate() for _ in range(num_new)]
            written |= zip(table, paths(tokens), strict=True)
            for place, block in cache.index.insert(tokens, table):
                assert written[block] == paths(tokens)[place]
            cache.release(table)
            cache.index.evict(generator.randrange(4))
        cache.index.evict(256)
        assert cache.pool.num_free == 256

    def test_a_child_of_an_evicted_block_is_not_taken_for_that_of_its_namesake(self):
        """Two first blocks share a name; the second one must not inherit the first one's child."""

        def hash_block(parent, key):
            return hash((0, key[4:]))  # all but the first token

        cache = Cache(HashIndex, hash_block=hash_block)
        one = cache.compute([1, 5, 5, 5, 6, 6, 6, 6])
        cache.index.release(one[0])
        assert cache.index.evict(1) == [one[0]]
        two = cache.compute([2, 5, 5, 5])
        assert cache.blocks([2, 5, 5, 5, 6, 6, 6, 6]) == two
        assert cache.index.stats().num_collisions == 1

    def test_what_is_behind_an_evicted_block_is_found_when_its_like_returns(self):
        cache = Cache(HashIndex)
        one = cache.compute(run(0, 12))
        cache.index.release(one[0])
        assert cache.index.evict(1) == [one[0]]
        assert cache.blocks(run(0, 12)) == []
        again = cache.compute(run(0, 4))
        assert cache.blocks(run(0, 12)) == [*again, *one[1:]]
        before = cache.index.stats().num_compared
        cache.blocks(run(0, 12))
        assert cache.index.stats().num_compared - before == 3  # not what was before each again


@settings(max_examples=100)
@given(prompts=st.lists(TOKENS, max_size=12), asked=st.lists(TOKENS, max_size=5))
def test_both_find_the_same(prompts, asked):
    tree, table = Cache(PrefixTree, 128, SIZE), Cache(HashIndex, 128, SIZE)
    for prompt in prompts:
        assert tree.remember(prompt) == table.remember(prompt)
    for prompt in prompts + asked:
        assert tree.blocks(prompt) == table.blocks(prompt)


class CountingPool(BlockPool):
    """Counts what is asked of it."""

    num_calls = 0

    def ref_count(self, block):
        self.num_calls += 1
        return super().ref_count(block)

    def release(self, block):
        self.num_calls += 1
        return super().release(block)


class TestCost:
    """What grows with what, by counting and not by the clock."""

    def forest(self, index_class, num_prompts=300, length=256):
        """Prompts that part at random places from one another, and all of them held."""
        generator = random.Random(0)
        cache = Cache(index_class, 40_000, 4, pool_class=CountingPool)
        prompts = [run(0, length)]
        tables = [cache.compute(prompts[0])]
        for first in range(1, num_prompts):
            prompt = generator.choice(prompts)[: generator.randrange(length)]
            prompts.append([*prompt, *run(first * length, length - len(prompt))])
            tables.append(cache.compute(prompts[-1]))
        return cache, prompts, tables

    def compared(self, cache, action):
        before = cache.index.stats().num_compared
        action()
        return cache.index.stats().num_compared - before

    def test_a_match_compares_each_block_of_the_prompt_a_few_times(self, index_class):
        cache, prompts, _ = self.forest(index_class)
        for prompt in prompts:
            num_compared = self.compared(cache, partial(cache.index.match, prompt))
            assert num_compared <= 3 * len(prompt) // 4 + 1

    def test_one_more_block_costs_the_same_however_long_the_sequence(self, index_class):
        cache = Cache(index_class, 2_000)
        table, costs = [], []
        for end in range(4, 4_001, 4):
            table.append(cache.pool.allocate())
            insert = partial(cache.index.insert, run(0, end), table)
            costs.append(self.compared(cache, insert))
        assert max(costs) <= 2
        assert cache.index.stats().num_blocks == 1_000

    def test_a_sequence_that_grows_alone_is_one_node(self):
        cache = Cache(PrefixTree)
        tokens, table = [], []
        for first in range(0, 80, 4):
            tokens += run(first, 4)
            table.append(cache.pool.allocate())
            cache.index.insert(tokens, table)
        assert cache.index.stats().num_nodes == 1

    def test_an_eviction_looks_at_nothing_but_what_it_frees(self, index_class):
        cache, _, tables = self.forest(index_class)
        for table in tables[:30]:
            cache.release(table)
        num_evictable = cache.index.num_evictable()
        assert 30 < num_evictable < cache.index.stats().num_blocks
        before = cache.pool.num_calls
        for _ in range(30):
            assert len(cache.index.evict(1)) == 1
        assert len(cache.index.evict(10_000)) == num_evictable - 30
        assert cache.pool.num_calls - before == num_evictable

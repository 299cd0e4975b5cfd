"""The two indexes of cached prefixes: what goes first, colliding hashes, and what it all costs."""

from __future__ import annotations

import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_cases import INDEX_CLASSES, SIZE, TOKENS, Cache, paths, run

from m6_prefix.block_pool import BlockPool
from m6_prefix.hash_index import HashIndex
from m6_prefix.prefix_tree import PrefixTree


@pytest.fixture(params=INDEX_CLASSES.values(), ids=INDEX_CLASSES)
def index_class(request):
    return request.param


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

    def test_one_sequence_does_not_keep_what_another_one_added(self, index_class):
        """Two sequences of one prefix, one of them done: what it added is free to go."""
        cache = Cache(index_class)
        one = cache.compute(run(0, 8))
        cache.index.acquire(cache.index.match(run(0, 8)))
        two = [*one, *(cache.pool.allocate() for _ in range(2))]
        assert cache.index.insert([*run(0, 8), *run(50, 8)], two) == 4
        cache.release(two)
        assert cache.index.evict(64) == [two[3], two[2]]
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
            assert cache.index.insert(tokens, table) >= len(match.blocks)
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
        tree.remember(prompt)
        table.remember(prompt)
    for prompt in prompts + asked:
        assert len(tree.blocks(prompt)) == len(table.blocks(prompt))


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

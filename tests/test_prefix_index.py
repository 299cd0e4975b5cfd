"""The two indexes of cached prefixes: what a match finds and what an insertion takes."""

from __future__ import annotations

import itertools
import random

import pytest
from prefix_cases import INDEX_CLASSES, Cache, num_common, run

from m6_prefix.prefix_tree import PrefixTree


@pytest.fixture(params=INDEX_CLASSES.values(), ids=INDEX_CLASSES)
def index_class(request):
    return request.param


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
        """Both were computed at once: the first one's stay, the second one's are its own."""
        cache = Cache(index_class)
        one = cache.compute(run(0, 12))
        two = [cache.pool.allocate() for _ in range(4)]
        tokens = [*run(0, 12), 50, 51, 52, 53]
        assert cache.index.insert(tokens, two) == 0
        assert cache.blocks(tokens) == one
        assert [cache.pool.ref_count(block) for block in two] == [1] * 4
        assert cache.index.stats().num_duplicates == 4
        cache.release(one)
        assert cache.index.num_evictable() == 3
        cache.release(two)
        assert cache.index.evict(64) == one[::-1]
        assert cache.pool.num_free == 64

    def test_what_is_behind_a_match_may_be_held_by_another_one(self, index_class):
        cache = Cache(index_class)
        one = cache.compute(run(0, 12))
        cache.index.acquire(cache.index.match(run(0, 4)))
        two = [one[0], *(cache.pool.allocate() for _ in range(3))]
        assert cache.index.insert(run(0, 16), two) == 1
        assert cache.blocks(run(0, 16)) == one
        assert [cache.pool.ref_count(block) for block in two] == [3, 1, 1, 1]

    def test_idle_blocks_give_way_to_the_same_in_use(self, index_class):
        """Else blocks that nobody holds would have to stay for the sake of what follows them."""
        cache = Cache(index_class)
        one = cache.remember(run(0, 12))
        two = [cache.pool.allocate() for _ in range(4)]
        match = cache.index.match(run(0, 12))
        assert cache.index.insert(run(0, 16), two) == 4
        assert cache.blocks(run(0, 16)) == two
        assert [cache.pool.ref_count(block) for block in one + two] == [0] * 3 + [2] * 4
        stats = cache.index.stats()
        assert (stats.num_blocks, stats.num_replaced, stats.num_evictable) == (4, 3, 0)
        assert cache.index.evict(64) == []
        with pytest.raises(RuntimeError, match="match again"):
            cache.index.acquire(match)
        cache.release(two)
        assert cache.index.evict(64) == two[::-1]
        assert cache.pool.num_free == 64

    def test_what_else_follows_blocks_that_gave_way_is_found_behind_the_new_ones(
        self, index_class
    ):
        cache = Cache(index_class)
        one = cache.remember(run(0, 16))
        other = cache.index.match(run(0, 8))
        cache.index.acquire(other)
        branch = [*other.blocks, cache.pool.allocate()]
        cache.index.insert([*run(0, 8), *run(50, 4)], branch)
        cache.release(branch)
        two = [cache.pool.allocate() for _ in range(3)]
        assert cache.index.insert(run(0, 12), two) == 3
        assert cache.blocks(run(0, 16)) == [*two, one[3]]
        assert cache.blocks([*run(0, 8), *run(50, 4)]) == [*two[:2], branch[2]]
        assert cache.index.num_evictable() == 2
        assert sorted(cache.index.evict(64)) == sorted([one[3], branch[2]])
        assert cache.blocks(run(0, 16)) == two

    def test_blocks_that_samples_share_and_those_that_one_has_alone_give_way_apart(self):
        """The second one's last block is nobody's as soon as that one has let go."""
        cache = Cache(PrefixTree)
        cache.remember(run(0, 12))
        two = [cache.pool.allocate() for _ in range(3)]
        for block in two[:2]:
            cache.pool.share(block)
        assert cache.index.insert(run(0, 12), two) == 3
        cache.release(two)
        assert cache.index.num_evictable() == 1
        assert cache.index.evict(64) == [two[2]]
        cache.release(two[:2])
        assert cache.index.evict(64) == [two[1], two[0]]

    def test_again_is_nothing_new(self, index_class):
        cache = Cache(index_class)
        table = cache.compute(run(0, 12))
        assert cache.index.insert(run(0, 12), table) == 3
        assert [cache.pool.ref_count(block) for block in table] == [2, 2, 2]
        assert cache.index.stats().num_inserted == 3

    def test_blocks_without_tokens_and_tokens_without_blocks(self, index_class):
        cache = Cache(index_class)
        table = [cache.pool.allocate() for _ in range(5)]
        assert cache.index.insert(run(0, 9), table) == 2
        assert cache.index.stats().num_blocks == 2
        assert cache.index.insert(run(0, 20), table[:3]) == 3
        assert cache.blocks(run(0, 20)) == table[:3]
        assert cache.index.insert([], []) == cache.index.insert([1], table) == 0

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

"""The block pool: counts are right after any sequence of operations, and faults are refused."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from m3_paged.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a plain record of who holds what."""

    @initialize(num_blocks=st.integers(1, 12))
    def create(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.holders: Counter[int] = Counter()

    @rule()
    def allocate(self):
        if len(self.holders) == self.pool.num_blocks:
            with pytest.raises(RuntimeError, match="no free block"):
                self.pool.allocate()
            return
        block = self.pool.allocate()
        assert 0 <= block < self.pool.num_blocks
        assert block not in self.holders
        self.holders[block] = 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data):
        block = data.draw(st.sampled_from(sorted(self.holders)))
        self.pool.share(block)
        self.holders[block] += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data):
        block = data.draw(st.sampled_from(sorted(self.holders)))
        is_last = self.holders[block] == 1
        assert self.pool.release(block) is is_last
        self.holders -= Counter([block])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share_all(self, data):
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.holders)), unique=True))
        self.pool.share_all(blocks)
        self.holders += Counter(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release_all(self, data):
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.holders)), unique=True))
        freed = [block for block in blocks if self.holders[block] == 1]
        assert self.pool.release_all(blocks) == freed
        self.holders -= Counter(blocks)

    @precondition(lambda self: len(self.holders) < self.pool.num_blocks)
    @rule(data=st.data())
    def touch_a_free_block(self, data):
        free = sorted(set(range(self.pool.num_blocks)) - set(self.holders))
        block = data.draw(st.sampled_from(free))
        with pytest.raises(RuntimeError, match="free"):
            self.pool.share(block)
        with pytest.raises(RuntimeError, match="twice"):
            self.pool.release(block)
        with pytest.raises(RuntimeError, match="free"):
            self.pool.share_all([block])
        with pytest.raises(RuntimeError, match="twice"):
            self.pool.release_all([block])

    @invariant()
    def counts_are_right(self):
        assert self.pool.num_allocated == len(self.holders)
        assert self.pool.num_free == self.pool.num_blocks - len(self.holders)
        for block in range(self.pool.num_blocks):
            assert self.pool.ref_count(block) == self.holders[block]

    def teardown(self):
        """Nothing leaks: after everyone has let go, the whole pool can be taken again."""
        for block in list(self.holders.elements()):
            self.pool.release(block)
        taken = [self.pool.allocate() for _ in range(self.pool.num_blocks)]
        assert sorted(taken) == list(range(self.pool.num_blocks))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_a_pool_without_blocks_is_refused():
    with pytest.raises(ValueError, match="single block"):
        BlockPool(0)


def test_a_failed_operation_changes_nothing():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.release(block)
    for operation in (pool.share, pool.release):
        with pytest.raises(RuntimeError):
            operation(block)
    assert (pool.num_free, pool.num_allocated, pool.ref_count(block)) == (2, 0, 0)

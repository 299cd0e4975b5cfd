"""The bookkeeping of the caches, checked by writing to a cache of plain numbers.

A fake cache holds one number for each slot. Every sequence writes the numbers of its own tokens
where the bookkeeping says, and after every step must read back exactly these.
"""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.request import Request
from common.sampling_params import SamplingParams
from m2_batching.kv_cache import SlotCache
from m3_paged.kv_cache import PagedKVCache

NOTHING = -1


class Sequences:
    """Makes requests whose tokens are all different numbers, so that no mix-up goes unseen."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._numbers = itertools.count()
        self._names = itertools.count()

    def new(self, num_tokens: int) -> Request:
        prompt = [next(self._numbers) for _ in range(num_tokens)]
        params = SamplingParams(max_tokens=None)
        return Request(str(next(self._names)), prompt, params, max_model_len=self._longest)

    def fork(self, parent: Request) -> Request:
        """A sequence with the tokens that the parent has in the cache."""
        prompt = parent.token_ids[: parent.num_computed_tokens]
        params = SamplingParams(max_tokens=None)
        child = Request(str(next(self._names)), prompt, params, max_model_len=self._longest)
        child.num_computed_tokens = parent.num_computed_tokens
        return child

    def append(self, request: Request) -> None:
        request.append_output(next(self._numbers))


class PagedMachine(RuleBasedStateMachine):
    """Prefill, decode, fork and free in any order over a small pool of blocks."""

    LONGEST = 40

    @initialize(num_blocks=st.integers(3, 14), block_size=st.sampled_from([1, 2, 4, 8]))
    def create(self, num_blocks, block_size):
        self.cache = PagedKVCache(num_blocks, block_size)
        self.memory = np.full((num_blocks, block_size), NOTHING)
        self.sequences = Sequences(self.LONGEST)
        self.running: list[Request] = []

    @rule(num_tokens=st.integers(1, 30))
    def prefill(self, num_tokens):
        request = self.sequences.new(num_tokens)
        needed = self.cache.num_blocks_for(num_tokens)
        assert self.cache.num_new_blocks(request, num_tokens) == needed
        if needed > self.cache.pool.num_free:
            return
        free = self.cache.pool.num_free
        assert self.cache.allocate(request, num_tokens) is None
        assert self.cache.pool.num_free == free - needed
        self.running.append(request)
        self.write(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fork(self, data):
        """Costs no block at all."""
        parent = data.draw(st.sampled_from(self.running))
        free, used = self.cache.pool.num_free, self.cache.num_used
        child = self.sequences.fork(parent)
        self.cache.fork(parent, child)
        self.running.append(child)
        assert (self.cache.pool.num_free, self.cache.num_used) == (free, used)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def decode(self, data):
        """Some sequences write one token each in one step, the copies before all the writes.

        Where blocks run out, sequences that have not been planned yet lose theirs.
        """
        step = data.draw(st.lists(st.sampled_from(self.running), unique_by=id))
        planned: list[Request] = []
        copies = []
        for request in step:
            if request not in self.running or request.num_tokens == self.LONGEST:
                continue
            if request.num_tokens == request.num_computed_tokens:
                self.sequences.append(request)
            while request in self.running:
                needed = self.cache.num_new_blocks(request, request.num_tokens)
                if needed <= self.cache.pool.num_free:
                    break
                victim = next(r for r in reversed(self.running) if r not in planned)
                self.drop(victim)
            else:
                continue
            free = self.cache.pool.num_free
            copy = None
            if not (data.draw(st.booleans()) and self.cache.append([request], 0)):
                copy = self.cache.allocate(request, request.num_tokens)
            assert self.cache.pool.num_free == free - needed
            copies += [copy] if copy else []
            planned.append(request)
        # Every source is read before any target is written.
        sources = self.memory[[copy.source for copy in copies]]
        self.memory[[copy.target for copy in copies]] = sources
        for request in planned:
            self.write(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def free(self, data):
        self.drop(data.draw(st.sampled_from(self.running)))

    def write(self, request):
        """The model's part: the tokens that are not in the cache yet."""
        for place in range(request.num_computed_tokens, request.num_tokens):
            block, offset = self.slot(request, place)
            assert self.cache.pool.ref_count(block) == 1, "written while others hold it"
            self.memory[block, offset] = request.token_ids[place]
        request.num_computed_tokens = request.num_tokens

    def drop(self, request):
        self.cache.free(request)
        self.running.remove(request)

    def slot(self, request, place):
        size = self.cache.block_size
        return self.cache.table(request)[place // size], place % size

    @invariant()
    def everyone_reads_their_own_tokens(self):
        for request in self.running:
            slots = [self.slot(request, i) for i in range(request.num_computed_tokens)]
            assert [self.memory[s] for s in slots] == request.token_ids.tolist()[: len(slots)]

    @invariant()
    def counts_are_right(self):
        held = [block for request in self.running for block in self.cache.table(request)]
        for block in range(self.cache.pool.num_blocks):
            assert self.cache.pool.ref_count(block) == held.count(block)
        used = {
            self.slot(request, place)
            for request in self.running
            for place in range(request.num_computed_tokens)
        }
        assert self.cache.num_used == len(used)
        assert self.cache.num_allocated == len(set(held)) * self.cache.block_size
        for request in self.running:
            num_blocks = self.cache.num_blocks_for(request.num_computed_tokens)
            assert len(self.cache.table(request)) == num_blocks

    def teardown(self):
        for request in list(self.running):
            self.drop(request)
        assert self.cache.num_used == self.cache.num_allocated == 0


TestPagedKVCache = PagedMachine.TestCase
TestPagedKVCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class SlotMachine(RuleBasedStateMachine):
    """Sequences come, grow and leave in any order; slots are cut anew as the scheduler would."""

    @initialize(
        num_tokens=st.integers(2, 400), max_num_seqs=st.integers(1, 30), share=st.integers(1, 6)
    )
    def create(self, num_tokens, max_num_seqs, share):
        self.longest = max(2, num_tokens // share)
        self.cache = SlotCache(num_tokens, max_num_seqs, self.longest)
        self.memory = np.full(num_tokens, NOTHING)
        self.sequences = Sequences(self.longest)
        self.max_num_seqs = max_num_seqs

    @rule(num_tokens=st.integers(1, 100))
    def join(self, num_tokens):
        """A newcomer of any length, if there is room without sending anybody away."""
        request = self.sequences.new(min(num_tokens, self.longest - 1))
        lengths = [r.num_tokens for r in (*self.cache.running, request)]
        slot_len = self.cache.slot_len_for(max(lengths))
        if len(lengths) > self.cache.num_slots_at(slot_len):
            assert self.cache.running, "alone, everyone fits"
            return
        if slot_len > self.cache.slot_len or len(lengths) > self.cache.num_slots:
            self.cache.resize(slot_len)
        slot = self.cache.allocate(request)
        assert slot == len(lengths) - 1 < self.cache.num_slots

    @precondition(lambda self: self.cache.running)
    @rule(data=st.data())
    def leave(self, data):
        self.cache.free(data.draw(st.sampled_from(list(self.cache.running))))

    @rule()
    def step(self):
        """What an engine does: make room, move, write what is missing, sample a token each."""
        while self.cache.running:
            slot_len = self.cache.slot_len_for(max(r.num_tokens for r in self.cache.running))
            if slot_len <= self.cache.slot_len:
                break
            if len(self.cache.running) <= self.cache.num_slots_at(slot_len):
                self.cache.resize(slot_len)
                break
            self.cache.free(self.cache.running[0])
        for move in self.cache.take_moves():
            source = self.memory[move.source : move.source + move.num_tokens].copy()
            self.memory[move.target : move.target + move.num_tokens] = source
        assert self.cache.take_moves() == []
        for request in self.cache.running:
            start = self.cache.slot(request) * self.cache.slot_len
            for place in range(request.num_computed_tokens, request.num_tokens):
                self.memory[start + place] = request.token_ids[place]
            request.num_computed_tokens = request.num_tokens
        self.everyone_reads_their_own_tokens()
        for request in list(self.cache.running):
            if request.num_tokens == self.longest:
                self.cache.free(request)
            else:
                self.sequences.append(request)

    def everyone_reads_their_own_tokens(self):
        for request in self.cache.running:
            start = self.cache.slot(request) * self.cache.slot_len
            row = self.memory[start : start + request.num_computed_tokens]
            assert row.tolist() == request.token_ids.tolist()[: request.num_computed_tokens]

    @invariant()
    def slots_are_the_running_sequences_without_holes(self):
        cache = self.cache
        assert [cache.slot(r) for r in cache.running] == list(range(len(cache.running)))
        assert len(cache.running) <= cache.num_slots <= self.max_num_seqs
        assert cache.num_slots * cache.slot_len <= cache.num_tokens
        assert cache.num_allocated == len(cache.running) * cache.slot_len
        assert cache.num_used == sum(r.num_computed_tokens for r in cache.running)


TestSlotCache = SlotMachine.TestCase
TestSlotCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_slots_grow_with_the_longest_and_shrink_when_that_makes_room():
    """Every sequence is moved, some over the old place of another."""
    machine = SlotMachine()
    machine.create(num_tokens=128, max_num_seqs=8, share=2)
    for num_tokens in (5, 20, 5, 5):
        machine.join(num_tokens)
    machine.step()
    assert (machine.cache.slot_len, machine.cache.num_slots) == (32, 4)
    machine.cache.free(machine.cache.running[1])
    machine.join(5)
    machine.step()
    assert machine.cache.slot_len == 32  # there was room without moving anybody
    machine.join(5)
    machine.step()
    assert (machine.cache.slot_len, len(machine.cache.running)) == (16, 5)
    machine.join(17)
    machine.step()
    assert len(machine.cache.running) == 5, "six slots of 32 tokens are more than there is"


def test_samples_of_a_prompt_share_its_blocks_until_they_write():
    """Three samples of 20 tokens in blocks of 8: the two full blocks stay shared for good."""
    cache = PagedKVCache(num_blocks=16, block_size=8)
    sequences = Sequences(longest=64)
    parent = sequences.new(20)
    cache.allocate(parent, 20)
    parent.num_computed_tokens = 20
    samples = [parent, sequences.fork(parent), sequences.fork(parent)]
    for child in samples[1:]:
        cache.fork(parent, child)
    assert cache.pool.num_allocated == 3

    copies = []
    for sample in samples:
        sequences.append(sample)
        copies.append(cache.allocate(sample, 21))
        sample.num_computed_tokens = 21
    # The last to write is alone with the original block by then, and keeps it.
    assert [copy is not None for copy in copies] == [True, True, False]
    assert cache.pool.num_allocated == 5
    tables = [cache.table(sample) for sample in samples]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    assert (cache.num_used, cache.num_allocated) == (16 + 3 * 5, 40)


def test_a_full_last_block_is_never_copied():
    cache = PagedKVCache(num_blocks=8, block_size=8)
    sequences = Sequences(longest=64)
    parent = sequences.new(16)
    cache.allocate(parent, 16)
    parent.num_computed_tokens = 16
    child = sequences.fork(parent)
    cache.fork(parent, child)
    for sample in (parent, child):
        sequences.append(sample)
        assert cache.num_new_blocks(sample, 17) == 1
        assert cache.allocate(sample, 17) is None
    assert cache.pool.num_allocated == 4


def test_a_step_that_is_planned_again_counts_its_tokens_once():
    """It broke off before its tokens were known, in the middle of a block or at its beginning."""
    cache = PagedKVCache(num_blocks=4, block_size=8)
    sequences = Sequences(32)
    requests = [sequences.new(num_tokens) for num_tokens in (5, 8)]
    for request in requests:
        cache.allocate(request, request.num_tokens)
        request.num_computed_tokens = request.num_tokens
    for _ in range(3):
        assert cache.append(requests, 0) == 2
        assert (cache.num_used, cache.pool.num_allocated) == (6 + 9, 3)

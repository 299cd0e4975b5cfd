"""m6's scheduler: what it reads to find prefixes, for whom it makes way, and who goes first.

Steps are planned and taken in without a model: every sequence says 2 for ever.
"""

from __future__ import annotations

import importlib
import random
from array import array
from collections import deque

import pytest
from support import MILESTONES, new_engine, new_llm, random_prompts, run_to_end, tokens

from common.request import Request
from common.sampling_params import SamplingParams
from m6_prefix.config import PREFIX_INDEXES
from m6_prefix.kv_cache import PagedKVCache
from m6_prefix.scheduler import Scheduler, SchedulerOutput

SIZE = 16  # tokens in a block
INDEXES = tuple(name for name in PREFIX_INDEXES if name != "off")
CHUNKED = tuple(name for name in MILESTONES if name >= "m5")


class Tokens(array):
    """Token ids that count how many of them are read."""

    num_read = 0

    def __getitem__(self, place):
        taken = super().__getitem__(place)
        Tokens.num_read += len(taken) if isinstance(place, slice) else 1
        return taken

    def __iter__(self):
        Tokens.num_read += len(self)
        return super().__iter__()

    def __eq__(self, other):
        Tokens.num_read += len(self)
        return super().__eq__(other)


class Planned:
    """A scheduler over a cache, its steps read one behind."""

    def __init__(self, index="tree", num_blocks=4096, seats=256, budget=2048):
        self.cache = PagedKVCache(num_blocks, SIZE, index)
        self.scheduler = Scheduler(self.cache, seats, budget)
        self.launched: deque[SchedulerOutput] = deque()
        self.num_requests = 0

    def add(self, prompt, max_tokens=4, priority=0, **options) -> Request:
        self.num_requests += 1
        request = Request(
            str(self.num_requests), list(prompt), max_model_len=10**6, priority=priority,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options),
            arrival=self.num_requests,
        )  # fmt: skip
        request.token_ids = Tokens("I", prompt)
        self.scheduler.add(request)
        return request

    def step(self) -> dict[str, tuple[int, int]]:
        """Which tokens of whom the next step computes."""
        step = self.scheduler.schedule()
        if step is not None:
            self.launched.append(step)
        while len(self.launched) > (step is not None):
            done = self.launched.popleft()
            for request in self.scheduler.update(done, [2] * len(done.sampled)):
                if request is not None and request.is_finished:
                    self.scheduler.finish(request)
        return {} if step is None else {
            part.request.request_id: (part.start, part.end) for part in step.parts
        }  # fmt: skip

    def run(self) -> None:
        for _ in range(2000):
            if not self.scheduler.waiting and not self.scheduler.running:
                return
            self.step()
        raise AssertionError("somebody is left")


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=length)


@pytest.mark.parametrize("index", INDEXES)
class TestCost:
    """Finding prefixes costs O(tokens) for each request, however long and with whom it waits."""

    def test_a_hundred_requests_wait_behind_one_cold_prefix(self, index):
        """Each prompt is read once to be looked up; its own tail, and what it says, to be entered.

        A comparison is that of one block of 16 tokens.
        """
        planned = Planned(index, num_blocks=8192)
        base = prompt(0, 4096)
        requests = [planned.add([*base, *prompt(seed, 40)]) for seed in range(1, 101)]
        total = sum(request.num_prompt_tokens for request in requests)
        Tokens.num_read = 0
        joined = 0
        while planned.scheduler.waiting:
            before, compared = Tokens.num_read, planned.cache.prefix_stats().num_compared
            parts = planned.step()
            newcomers = sum(start == 0 or start % SIZE == 0 for start, _ in parts.values())
            joined += newcomers
            # 1.1: the head of the queue, for which there was no room any more in this step.
            assert Tokens.num_read - before <= 1.1 * 4136 * (newcomers + 1) + 2048
            compared = planned.cache.prefix_stats().num_compared - compared
            assert compared <= (4136 // SIZE + 4) * (newcomers + 1)
        planned.run()
        assert Tokens.num_read <= 1.2 * total
        stats = planned.cache.prefix_stats()
        assert stats.num_hit_tokens == 99 * 4096
        assert stats.num_compared <= 1.2 * total / SIZE

    def test_who_waits_for_a_seat_is_not_read_at_all(self, index):
        planned = Planned(index, seats=2, budget=64)
        running = [planned.add(prompt(seed, 20), max_tokens=300) for seed in (1, 2)]
        for _ in range(3):
            planned.step()
        planned.add(prompt(3, 4000))
        Tokens.num_read = 0
        for _ in range(200):
            planned.step()
        assert all(request.num_tokens > 200 for request in running)
        assert Tokens.num_read <= 2 * 2 * 200  # the others enter their blocks, looking one back

    def test_who_waits_for_room_is_read_once(self, index):
        """Though blocks are entered and given up all the time, and it is asked for in each step."""
        planned = Planned(index, num_blocks=300, budget=512)
        for seed in range(4):
            planned.add(prompt(seed, 500), max_tokens=400)
        planned.add(prompt(9, 64), max_tokens=2)  # leaves idle blocks behind
        for _ in range(12):
            planned.step()
        last = planned.add(prompt(4, 3000))
        Tokens.num_read = 0
        asked = planned.cache.index.num_changes
        for _ in range(300):
            planned.step()
        assert last in planned.scheduler.waiting
        assert planned.cache.index.num_changes > asked + 50
        # The others enter a block of 16 generated tokens every 16 steps, and look one block back.
        assert Tokens.num_read < 3000 + 4 * 3 * 300

    def test_the_same_question_is_asked_once_while_nothing_changes(self, index, monkeypatch):
        planned = Planned(index, num_blocks=64, budget=512)
        planned.add(prompt(1, 500), max_tokens=100)
        for _ in range(3):
            planned.step()
        planned.add(prompt(2, 900))
        match, asked = planned.cache.index.match, []
        monkeypatch.setattr(
            planned.cache.index, "match", lambda *args: asked.append(args) or match(*args)
        )
        for _ in range(60):
            planned.step()
        assert 0 < len(asked) <= 1 + 60 // SIZE + 1


@pytest.mark.parametrize("index", INDEXES)
class TestMakeWay:
    """Room for an urgent newcomer is counted with what it finds in the cache."""

    def fill(self, index, **options):
        """A cache of 20 blocks; 10 of them hold a prompt that an urgent sequence goes on with."""
        planned = Planned(index, num_blocks=20, **options)
        self.base = prompt(0, 160)
        planned.add(self.base, max_tokens=50, priority=-1)
        return planned

    def test_nobody_has_to_go_for_one_that_fits_thanks_to_its_hits(self, index):
        planned = self.fill(index)
        low = planned.add(prompt(1, 60), max_tokens=10, priority=1)
        for _ in range(3):
            planned.step()
        assert planned.cache.num_free == 20 - 11 - 4
        urgent = planned.add([*self.base, *prompt(2, 20)])  # 12 blocks, 10 of them shared
        assert planned.step()[urgent.request_id] == (160, 180)
        assert planned.scheduler.num_preemptions == 0
        assert low in planned.scheduler.running

    def test_one_that_fits_thanks_to_its_hits_displaces_the_less_urgent(self, index):
        """Without them it would not fit beside the more urgent one, whoever went."""
        planned = self.fill(index)
        low = planned.add(prompt(1, 100), max_tokens=10, priority=1)
        for _ in range(3):
            planned.step()
        urgent = planned.add([*self.base, *prompt(2, 50)])  # 14 blocks, 10 of them shared
        assert planned.step()[urgent.request_id] == (160, 210)
        assert planned.scheduler.num_preemptions == 1
        assert low in planned.scheduler.waiting
        planned.run()

    def test_nobody_is_displaced_in_vain(self, index):
        planned = self.fill(index)
        low = planned.add(prompt(1, 100), max_tokens=10, priority=1)
        for _ in range(3):
            planned.step()
        planned.add([*self.base, *prompt(2, 150)])
        planned.step()
        assert planned.scheduler.num_preemptions == 0
        assert low in planned.scheduler.running
        planned.run()

    def test_who_wants_all_logits_can_use_the_whole_cache(self, index):
        """It computes what is cached once more; what it does not hold must not be kept for it."""
        planned = Planned(index, num_blocks=10, seats=1, budget=16)
        base = prompt(0, 120)
        planned.add(base[:48], max_tokens=1)
        planned.run()
        asking = planned.add(base, max_tokens=40, prompt_logprobs=0)
        planned.run()
        assert asking.num_tokens == 160 and planned.scheduler.num_preemptions == 0
        assert planned.cache.prefix_stats().num_hit_tokens == 0


@pytest.mark.parametrize("name", CHUNKED)
class TestUrgent:
    def scheduler(self, name, num_blocks=2000):
        cache, scheduler = (
            importlib.import_module(f"{name}.{module}") for module in ("kv_cache", "scheduler")
        )
        return scheduler.Scheduler(cache.PagedKVCache(num_blocks, SIZE), 16, 256)

    def test_an_urgent_newcomer_does_not_wait_for_a_prompt_that_has_begun(self, name):
        """Not even for one that is just computing the prefix of both."""
        planned = Planned()
        planned.scheduler = self.scheduler(name)
        base = prompt(0, 8000)
        slow = planned.add(base, priority=1)
        for _ in range(3):
            planned.step()
        urgent = planned.add([*base[:900], *prompt(1, 100)])
        same = planned.add([*base[:900], *prompt(2, 100)], priority=1)
        ends, slow_before = [], slow.num_computed_tokens
        while urgent.num_computed_tokens < urgent.num_prompt_tokens:
            parts = planned.step()
            ends.append(parts[urgent.request_id][1])
            assert parts.keys() <= {urgent.request_id, slow.request_id}
        assert ends[-1] == 1000 and len(ends) <= 4
        assert slow.num_computed_tokens - slow_before < 256
        assert same in planned.scheduler.waiting  # not urgent: it waits, and finds the prefix
        planned.run()
        assert planned.scheduler.num_preemptions == 0


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("index", [1, 2])
def test_a_sample_that_has_run_before_may_fork(name, index):
    """It was preempted in the middle of the prompt, with a row and a table that is void by now."""
    base, other = random_prompts(0, [40, 60])
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=12, ignore_eos=True)
    options = {} if name < "m6" else {"prefix_index": "off"}
    engine = new_engine(name, block_size=8, num_kv_blocks=64, max_num_batched_tokens=33, **options)
    scheduler = engine.scheduler
    engine.add_request("a", base, params)
    samples = engine.output_processor.requests("a")
    alone = samples[index]
    others = [sample for sample in samples if sample is not alone]
    for sample in others:
        scheduler.waiting.remove(sample)
    engine.step()
    assert 0 < alone.num_computed_tokens < 40
    scheduler.requeue(alone)
    scheduler.waiting.remove(alone)
    engine.add_request("b", other, params, priority=-1)  # takes the blocks that it had
    for _ in range(4):
        engine.step()
    for sample in samples:
        scheduler.add(sample)
    outputs = run_to_end(engine)
    for output, prompt in ((outputs["a"], base), (outputs["b"], other)):
        assert tokens(output) == tokens(new_llm("m1_basic").generate(prompt, params)[0])

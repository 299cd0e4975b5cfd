"""m5's scheduler: one budget of tokens for decodes and chunks, planned one step ahead."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import new_engine
from torch.utils._python_dispatch import TorchDispatchMode

from common.model import Transformer
from common.request import Request, RequestStatus
from common.sampling_params import SamplingParams
from m5_chunked.chunk_size import FIRST_TOKENS, MIN_TOKENS, ChunkSize, StepRoom
from m5_chunked.kv_cache import PagedKVCache
from m5_chunked.model_runner import profile_step
from m5_chunked.scheduler import Scheduler, SchedulerOutput

EOS = 1
MAX_LEN = 40
PAIRS_PER_TOKEN = 15.0
SIZES = ChunkSize(1, pairs_per_token=PAIRS_PER_TOKEN)


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, aborts and steps in any order; a step's tokens come when they come.

    The model is a rule: the token after n tokens is EOS now and then, else 2.
    """

    @initialize(
        num_blocks=st.integers(10, 24),
        max_num_seqs=st.integers(1, 6),
        spare=st.integers(1, 30),
        chunk_size=st.integers(1, 30),
    )
    def start(self, num_blocks: int, max_num_seqs: int, spare: int, chunk_size: int) -> None:
        self.cache = PagedKVCache(num_blocks, block_size=4)
        self.budget = max_num_seqs + spare
        self.max_num_seqs = max_num_seqs
        self.chunk_size = chunk_size
        self.scheduler = Scheduler(
            self.cache, max_num_seqs, self.budget,
            ChunkSize(chunk_size, pairs_per_token=PAIRS_PER_TOKEN),
        )
        self.launched: list[SchedulerOutput] = []
        self.alive: dict[str, Request] = {}
        self.computed: dict[str, int] = {}  # tokens whose keys and values the cache holds
        self.num_requests = 0

    @rule(
        prompt_len=st.integers(1, MAX_LEN - 1),
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 1),
        n=st.integers(1, 3),
    )
    def arrive(self, prompt_len: int, max_tokens: int, priority: int, n: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, n=n)
        self.num_requests += 1
        for index in range(n):
            request = Request(
                str(self.num_requests), [5] * prompt_len, params, eos_token_ids=(EOS,),
                max_model_len=MAX_LEN, priority=priority, arrival=self.num_requests, index=index,
            )  # fmt: skip
            self.alive[request.key] = request
            self.scheduler.add(request)

    @rule(pick=st.randoms(use_true_random=False))
    def abort(self, pick) -> None:
        if self.alive:
            request = self.alive.pop(pick.choice(sorted(self.alive)))
            request.status = RequestStatus.FINISHED_ABORTED
            self.scheduler.finish(request)

    @rule()
    def launch(self) -> None:
        if len(self.launched) > 1:  # one step ahead, no more
            self.read(False)
        ready = [r for r in self.scheduler.running if self.is_decoding(r)]
        preempted = self.scheduler.num_preemptions
        step = self.scheduler.schedule()
        if step is None:
            # Who decodes goes on, or gives its blocks up: all others are about to end.
            assert not ready or preempted < self.scheduler.num_preemptions
            assert self.launched or not self.alive  # nobody waits for what never comes
            return
        assert 0 < step.num_tokens <= self.budget
        if step.num_decodes:
            work = sum(SIZES.work(p.start, p.end) for p in step.parts[step.num_decodes :])
            first = step.parts[step.num_decodes] if work else None
            assert work <= self.chunk_size or first.end - first.start <= MIN_TOKENS
        for place, part in enumerate(step.parts):
            request = part.request
            if part.start == 0:
                self.computed[request.key] = 0
            assert part.start == self.computed[request.key] < part.end
            assert part.end <= request.num_tokens + request.num_pending
            if place < step.num_decodes:
                assert request.num_prompt_tokens <= part.start == part.end - 1
            assert len(step.block_tables[place]) * 4 >= part.end
            self.computed[request.key] = part.end
            for sample in step.forks.get(request.key, ()):
                self.computed[sample.key] = part.end
        sampled = [request.key for request in step.sampled]
        assert len(set(sampled)) == len(sampled)
        served = {part.request.key for part in step.parts}
        if preempted == self.scheduler.num_preemptions:
            assert {r.key for r in ready} <= served  # a decode never waits
        self.nobody_writes_what_others_read(step)
        self.launched.append(step)

    @rule(ends=st.booleans())
    def read(self, ends: bool) -> None:
        if not self.launched:
            return
        step = self.launched.pop(0)
        tokens = [EOS if ends and i == 0 else 2 for i in range(len(step.sampled))]
        wanted = [r if not r.is_finished else None for r in step.sampled]
        assert self.scheduler.update(step, tokens) == wanted
        for request in step.sampled:
            assert request.num_pending >= 0
            if request.is_finished and self.alive.pop(request.key, None):
                self.scheduler.finish(request)

    @rule()
    def fail(self) -> None:
        """A step that could not be launched: its sequences hold nothing and start over."""
        step = self.scheduler.schedule()
        if step is not None:
            self.scheduler.undo(step)
            assert not {*step.requests, *step.sampled} & set(self.scheduler.running)

    def is_decoding(self, request: Request) -> bool:
        total = request.num_tokens + request.num_pending
        ends = len(request.output_token_ids) + request.num_pending >= request.max_tokens
        past_prompt = request.num_computed_tokens >= request.num_prompt_tokens
        return past_prompt and total - request.num_computed_tokens == 1 and not ends

    def nobody_writes_what_others_read(self, step: SchedulerOutput) -> None:
        tables = {r.key: self.cache.table(r) for r in self.scheduler.running}
        for part in step.parts:
            for block in tables[part.request.key][part.start // 4 :]:
                holders = [key for key, table in tables.items() if block in table]
                forks = {sample.key for sample in step.forks.get(part.request.key, ())}
                assert set(holders) <= {part.request.key, *forks}

    @invariant()
    def queues_hold_everyone_once(self) -> None:
        if not hasattr(self, "alive"):
            return
        queued = [r.key for r in (*self.scheduler.waiting, *self.scheduler.running)]
        assert sorted(queued) == sorted(self.alive)
        assert len(self.scheduler.running) <= self.max_num_seqs

    def teardown(self) -> None:
        """From any state everyone gets to the end, and every block comes back."""
        if not hasattr(self, "alive"):
            return
        for _ in range(3000):
            if not self.alive and not self.launched:
                break
            if len(self.launched) < 2:
                self.launch()
            self.read(False)
        assert not self.alive
        while self.launched:
            self.read(False)
        assert self.cache.num_used == self.cache.num_allocated == 0


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestScheduler = SchedulerMachine.TestCase


class TestChunkSize:
    def test_without_a_target_the_most_is_the_limit(self):
        size = ChunkSize(512)
        size.observe(512, 8, 10.0)
        assert size.limit == 512 and size.reason == "chunk"

    def test_it_finds_the_size_that_takes_as_long_as_asked(self):
        """Steps that take 1 ms and 10 us for each prompt token, and a target of 3 ms."""
        size = ChunkSize(4096, 0.003)
        for _ in range(40):
            size.observe(size.limit, 8, 0.001 + 1e-5 * size.limit)
        assert size.limit == pytest.approx(200, rel=0.05) and size.reason == "itl"

    def test_a_target_that_cannot_be_met_lets_prompts_advance(self):
        size = ChunkSize(4096, 0.001)
        for _ in range(40):
            size.observe(size.limit, 8, 1.0)
        assert size.limit == MIN_TOKENS

    @pytest.mark.parametrize(("work", "decodes"), [(0, 8), (100, 0)])
    def test_only_mixed_steps_count(self, work, decodes):
        size = ChunkSize(4096, 0.001)
        size.observe(work, decodes, 1.0)
        assert size.limit == FIRST_TOKENS

    def test_a_short_last_chunk_does_not_enlarge_it(self):
        size = ChunkSize(4096, 0.003)
        for _ in range(3):
            size.observe(size.limit, 8, 0.1)
        limit = size.limit
        size.observe(3, 8, 0.0005)
        assert size.limit == limit

    def test_work_is_tokens_and_the_pairs_that_they_attend_to(self):
        size = ChunkSize(1000, pairs_per_token=100)
        assert size.work(0, 1) == 1 + 1 / 100
        assert size.work(50, 53) == pytest.approx(3 + (51 + 52 + 53) / 100)
        assert ChunkSize(1000).work(50, 53) == 3

    @given(
        start=st.integers(0, 100_000), work=st.floats(1, 1e5), pairs=st.floats(1, 1e6)
    )
    def test_as_many_tokens_as_that_much_work_allows(self, start, work, pairs):
        size = ChunkSize(1000, pairs_per_token=pairs)
        count = size.num_tokens(start, work)
        assert size.work(start, start + count) <= work * (1 + 1e-6)
        assert size.work(start, start + count + 1) >= work * (1 - 1e-6)

    def test_chunks_of_a_long_prompt_are_equal_work_and_the_first_of_a_step_goes_on(self):
        size = ChunkSize(64, pairs_per_token=10)
        starts, start = [], 0
        while start < 2000:
            room = StepRoom(1000, size)
            limits = room.limits(start)
            assert min(limits, key=limits.get) == "chunk"
            starts.append(start)
            room.use(start, start + limits["chunk"])
            assert room.limits(0)["chunk"] <= 2  # what is left is for nobody
            start += limits["chunk"]
        chunks = [b - a for a, b in itertools.pairwise(starts)]
        assert chunks == sorted(chunks, reverse=True) and chunks[0] > chunks[-1] == MIN_TOKENS

    def test_without_decodes_there_is_the_budget_alone(self):
        room = StepRoom(50, None)
        room.use(0, 20)
        assert room.limits(10_000) == {"budget": 30}


def test_a_prompt_alone_has_the_whole_budget_and_beside_decodes_a_chunk():
    engine = new_engine("m5_chunked", max_num_batched_tokens=300, chunk_size=20, overlap=False)
    assert engine.scheduler.chunk_size.num_tokens(0, 20) == 19  # attention counts, too
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)
    engine.add_request("first", [5] * 100, params)
    engine.step()
    assert engine.stats()["num_prompt_tokens"] == 100
    engine.add_request("second", [7] * 50, params)
    for expected in (119, 137, 150):
        engine.step()
        assert engine.stats()["num_prompt_tokens"] == expected
    assert engine.stats()["chunk_reasons"] == {"prompt": 2, "chunk": 2}


@pytest.mark.parametrize("milestone", ["m5_chunked", "m6_prefix", "m7_gptq"])
def test_a_step_that_samples_nothing_computes_no_logits(milestone, monkeypatch):
    """The middle of a long prompt, alone: a product of no rows is nothing to ask a kernel for."""
    asked = []
    original = Transformer.compute_logits
    monkeypatch.setattr(
        Transformer,
        "compute_logits",
        lambda model, hidden: (asked.append(len(hidden)), original(model, hidden))[1],
    )
    engine = new_engine(milestone, max_num_seqs=8, max_num_batched_tokens=16)
    engine.add_request("long", [5] * 100, SamplingParams(max_tokens=3, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.stats()["num_steps"] >= 7 + 2 and set(asked) == {1}


class Allocations(TorchDispatchMode):
    """Notes the shapes of uninitialised tensors."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "empty" in str(function):
            self.shapes.append(tuple(result.shape))
        return result


def test_the_memory_of_a_step_counts_a_context_that_is_copied():
    """A chunk of 10 tokens may be the last one of a sequence of 900."""
    engine = new_engine("m5_chunked", "random:tiny-qwen3")
    with Allocations() as allocations:
        profile_step(engine.model, engine._backend, 10, 900)
    config = engine.model_config
    copied = (2, 900, config.num_kv_heads, config.head_dim)
    assert allocations.shapes.count(copied) == config.num_layers

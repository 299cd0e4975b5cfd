"""Who runs when: random workloads in caches that are too small, priorities, aborts, latecomers.

Whatever the scheduler does to a request (let it wait, preempt it, run it beside others), the
request says what it would have said alone. Who runs when is seen from outside: in the order of the
outputs, and in the engine's counters.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

import pytest
from support import (
    BATCHING,
    GREEDY,
    MILESTONES,
    VOCAB_SIZE,
    assert_cache_is_empty,
    new_engine,
    new_llm,
    random_prompts,
    run_to_end,
    small_cache,
    step_by_step,
    tokens,
)

from common.request import Request
from common.sampling_params import SamplingParams

LONGEST = 64  # tokens of prompt and output together, in all of these tests
FREE = replace(GREEDY, ignore_eos=True)
SAMPLED = replace(FREE, temperature=1.0)


@pytest.fixture(params=BATCHING)
def batching(request) -> str:
    """Every milestone that runs more than one sequence at a time."""
    return request.param


@cache
def plain_llm():
    """Runs one request after the other, so that none can disturb another."""
    return new_llm("m1_basic", max_model_len=LONGEST)


def alone(prompt: list[int], params: SamplingParams) -> list[list[int]]:
    return tokens(plain_llm().generate(prompt, params)[0])


# ---------------------------------------------------------------- random workloads


@dataclass(frozen=True)
class Arrival:
    """One request of a workload: when it comes, what it wants, and when its user gives up."""

    prompt: list[int]
    params: SamplingParams
    priority: int
    at_step: int
    abort_at_step: int | None
    expected: list[list[int]]  # what it says when nothing else runs and nothing is scarce


def random_params(rng: random.Random) -> SamplingParams:
    """Greedy or seeded, with any of the options that carry state from token to token."""
    params = replace(
        GREEDY,
        max_tokens=rng.randint(1, 36),
        ignore_eos=rng.random() < 0.8,
        n=rng.choice((1, 1, 1, 2, 3)),
        min_tokens=rng.choice((0, 0, 1)),
    )
    if rng.random() < 0.5:
        params = replace(params, temperature=1.0, seed=rng.randrange(2**40))
    if rng.random() < 0.4:
        params = replace(
            params, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2
        )
    return params


@cache
def random_workload(seed: int, num_requests: int = 10) -> list[Arrival]:
    rng = random.Random(seed)
    arrivals = []
    for _ in range(num_requests):
        params = random_params(rng)
        longest_prompt = min(LONGEST - params.max_tokens, rng.choice((4, 20, 60)))
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest_prompt))]
        at_step = rng.choice((0, rng.randrange(60)))
        arrivals.append(
            Arrival(
                prompt=prompt,
                params=params,
                priority=rng.choice((0, 0, 0, -1, 5)),
                at_step=at_step,
                abort_at_step=at_step + rng.randrange(40) if rng.random() < 0.2 else None,
                expected=alone(prompt, params),
            )
        )
    return arrivals


def play(engine, workload: list[Arrival]) -> int:
    """Run a workload and check every output; returns the number of preemptions."""
    arrivals = {f"request {place}": arrival for place, arrival in enumerate(workload)}
    num_seen = {request_id: [0] * each.params.n for request_id, each in arrivals.items()}
    finished: Counter[str] = Counter()

    def check(output):
        finished[output.request_id] += output.finished
        expected = arrivals[output.request_id].expected
        for sample, reference in zip(output.outputs, expected, strict=True):
            assert sample.token_ids == reference[: len(sample.token_ids)]
            if sample.finish_reason in ("stop", "length"):
                assert sample.token_ids == reference
        counts = [len(sample) for sample in tokens(output)]
        before = num_seen[output.request_id]
        assert all(now >= then for now, then in zip(counts, before, strict=True))
        num_seen[output.request_id] = counts

    last_event = max(max(each.at_step, each.abort_at_step or 0) for each in workload)
    step = 0
    while engine.has_unfinished_requests() or step <= last_event:
        assert step < 5000, "no end in sight"
        for request_id, each in arrivals.items():
            if each.at_step == step:
                engine.add_request(request_id, each.prompt, each.params, each.priority)
            if each.abort_at_step == step and (output := engine.abort_request(request_id)):
                assert output.finished
                assert "abort" in [sample.finish_reason for sample in output.outputs]
                check(output)
        for output in engine.step():
            check(output)
        step += 1
    # Nothing lost, nothing twice.
    assert finished == dict.fromkeys(arrivals, 1)
    assert_cache_is_empty(engine)
    return engine.stats()["num_preemptions"]


@pytest.mark.parametrize("seed", range(6))
def test_a_workload_in_a_small_cache_is_as_if_each_request_were_alone(batching, seed):
    rng = random.Random(seed)
    engine = new_engine(
        batching,
        max_model_len=LONGEST,
        max_num_seqs=rng.choice((3, 5, 16)),
        max_num_batched_tokens=rng.choice((16, 64, 1000)),
        **small_cache(batching, rng.choice((LONGEST, 80, 96))),
    )
    assert play(engine, random_workload(seed)) > 0


@pytest.mark.parametrize("seed", range(2))
def test_a_workload_in_a_large_cache_preempts_nobody(milestone, seed):
    """As long as there are places for all, even a higher priority takes none away."""
    assert play(new_engine(milestone, max_model_len=LONGEST), random_workload(seed)) == 0


# ---------------------------------------------------------------- preemption


@pytest.mark.parametrize("params", [FREE, SAMPLED, replace(SAMPLED, seed=3)])
def test_a_resumed_request_goes_on_as_if_nothing_had_happened(batching, params):
    """Its random stream too, whether the seed is its own or the engine's."""
    params = replace(params, max_tokens=40)
    prompts = random_prompts(1, [12] * 5)
    outputs = {}
    for size in (LONGEST, 10 * LONGEST):
        engine = new_engine(batching, max_model_len=LONGEST, **small_cache(batching, size))
        for place, prompt in enumerate(prompts):
            engine.add_request(str(place), prompt, params)
        outputs[size] = run_to_end(engine)
        preemptions = [output.metrics.num_preemptions for output in outputs[size].values()]
        assert sum(preemptions) == engine.stats()["num_preemptions"]
        assert any(preemptions) is (size == LONGEST)
        assert_cache_is_empty(engine)
    for request_id, output in outputs[LONGEST].items():
        assert tokens(output) == tokens(outputs[10 * LONGEST][request_id])


def test_who_came_last_is_preempted_first(batching):
    engine = new_engine(batching, max_model_len=LONGEST, **small_cache(batching, LONGEST))
    for place, prompt in enumerate(random_prompts(1, [8] * 3)):
        engine.add_request(str(place), prompt, replace(FREE, max_tokens=48))
    outputs = run_to_end(engine)
    preemptions = [outputs[str(place)].metrics.num_preemptions for place in range(3)]
    assert preemptions[0] == 0 < preemptions[2]
    finished = [outputs[str(place)].metrics.finished_time for place in range(3)]
    assert finished == sorted(finished)


def test_a_preempted_request_can_be_aborted(batching):
    """While it waits to be resumed; the tokens it had are returned."""
    first, second = random_prompts(1, [8, 8])
    params = replace(FREE, max_tokens=40)
    engine = new_engine(batching, max_num_seqs=1, max_model_len=LONGEST)
    engine.add_request("second", second, params, priority=1)
    for _ in range(5):
        engine.step()
    engine.add_request("first", first, params)
    engine.step()
    assert engine.stats()["num_preemptions"] == 1
    output = engine.abort_request("second")
    assert tokens(output) == [alone(second, params)[0][:5]]
    assert tokens(run_to_end(engine)["first"]) == alone(first, params)
    assert_cache_is_empty(engine)


@pytest.mark.parametrize("name", BATCHING)
def test_one_urgent_request_can_displace_a_thousand(name):
    """At once, and all of them come back. The scheduler alone, without a model."""
    if name == "m2_batching":
        from m2_batching.kv_cache import SlotCache
        from m2_batching.scheduler import Scheduler

        scheduler = Scheduler(SlotCache(20_000, 1200, 20_000), 100_000)
    else:
        from m3_paged.kv_cache import PagedKVCache
        from m3_paged.scheduler import Scheduler

        scheduler = Scheduler(PagedKVCache(1200, 16), 1200, 100_000)

    def request(request_id, num_tokens, **options):
        params = SamplingParams(max_tokens=2)
        return Request(str(request_id), [1] * num_tokens, params, max_model_len=20_000, **options)

    for place in range(1100):
        scheduler.add(request(place, 1, arrival=place, priority=1))
    step = scheduler.schedule()
    assert len(step.requests) == 1100
    scheduler.update(step, [1] * 1100)

    scheduler.add(request("urgent", 19_000, arrival=1100))
    finished = []
    for _ in range(10):
        if (step := scheduler.schedule()) is None:
            break
        scheduler.update(step, [1] * len(step.requests))
        for each in [each for each in step.requests if each.is_finished]:
            scheduler.finish(each)
            finished.append(each.request_id)
    assert finished[0] == "urgent"
    assert scheduler.num_preemptions > 1000
    assert len(finished) == len(set(finished)) == 1101
    assert scheduler.kv_cache.num_allocated == 0


# ---------------------------------------------------------------- priorities and order


def first_token_order(engine) -> list[str]:
    """Ids in the order in which the requests got their first token."""
    order: dict[str, None] = {}
    while engine.has_unfinished_requests():
        order.update((output.request_id, None) for output in engine.step())
    return list(order)


@pytest.mark.parametrize("name", MILESTONES)
def test_the_queue_is_sorted_by_priority_then_by_arrival(name):
    engine = new_engine(name, max_num_seqs=1)
    prompts = random_prompts(2, [5] * 6)
    for request_id, prompt, priority in zip("abcdef", prompts, (1, 0, 5, 1, -3, 0), strict=True):
        engine.add_request(request_id, prompt, FREE, priority)
    assert first_token_order(engine) == list("ebfadc")


@pytest.mark.parametrize("name", [name for name in MILESTONES if name not in BATCHING])
def test_with_one_place_and_no_preemption_whoever_runs_runs_to_the_end(name):
    engine = new_engine(name)
    prompts = random_prompts(2, [5] * 3)
    for request_id, prompt, priority in zip("abc", prompts, (5, 1, 0), strict=True):
        engine.add_request(request_id, prompt, FREE, priority)
        outputs = engine.step()
        assert [output.request_id for output in outputs] == ["a"]
    assert first_token_order(engine) == list("acb")


def test_a_higher_priority_takes_the_place_of_a_lower(batching):
    """The lower one is resumed when the higher one has finished, and says what it would have."""
    low, high = random_prompts(3, [20, 20])
    params = replace(SAMPLED, seed=1, max_tokens=12)
    engine = new_engine(batching, max_num_seqs=1, **step_by_step(batching))
    engine.add_request("low", low, params, priority=3)
    for _ in range(4):
        assert [output.request_id for output in engine.step()] == ["low"]
    engine.add_request("high", high, params, priority=2)
    for _ in range(12):
        (output,) = engine.step()
        assert output.request_id == "high"
    assert output.finished
    outputs = run_to_end(engine)
    assert outputs["low"].metrics.num_preemptions == 1
    assert tokens(outputs["low"]) == alone(low, params)
    assert tokens(output) == alone(high, params)


def test_a_higher_priority_takes_the_memory_of_a_lower(batching):
    """Places are free, memory is not; those of the same or of a higher priority are left alone."""
    engine = new_engine(
        batching, max_model_len=LONGEST, **small_cache(batching, LONGEST), **step_by_step(batching)
    )
    prompts = random_prompts(4, [8, 8, 8])
    for request_id, prompt, priority in zip("abc", prompts, (0, 1, 1), strict=True):
        engine.add_request(request_id, prompt, replace(FREE, max_tokens=4), priority)
    assert len(engine.step()) == 3
    (urgent,) = random_prompts(5, [28])
    engine.add_request("urgent", urgent, replace(FREE, max_tokens=4), priority=0)
    outputs = {output.request_id: output for output in engine.step()}
    assert "urgent" in outputs and "c" not in outputs
    outputs.update(run_to_end(engine))
    preemptions = {id_: output.metrics.num_preemptions for id_, output in outputs.items()}
    assert preemptions["a"] == preemptions["urgent"] == 0
    assert preemptions["c"] == 1
    for request_id, prompt in zip("abc", prompts, strict=True):
        assert tokens(outputs[request_id]) == alone(prompt, replace(FREE, max_tokens=4))


def test_nobody_is_displaced_by_an_equal(batching):
    engine = new_engine(batching, max_num_seqs=2)
    prompts = random_prompts(3, [5] * 4)
    for request_id, prompt in zip("abcd", prompts, strict=True):
        engine.add_request(request_id, prompt, FREE)
        engine.step()
    assert first_token_order(engine) == list("abcd")
    assert engine.stats()["num_preemptions"] == 0


def test_nobody_is_displaced_in_vain(batching):
    """Who needs more than all lower ones hold waits until there is enough."""
    engine = new_engine(
        batching, max_model_len=LONGEST, **small_cache(batching, LONGEST), **step_by_step(batching)
    )
    same, low, high = random_prompts(6, [24, 8, 50])
    engine.add_request("same", same, replace(FREE, max_tokens=8))
    engine.add_request("low", low, replace(FREE, max_tokens=8), priority=1)
    assert len(engine.step()) == 2
    engine.add_request("high", high, FREE)
    assert {output.request_id for output in engine.step()} == {"same", "low"}
    run_to_end(engine)
    assert engine.stats()["num_preemptions"] == 0


# ---------------------------------------------------------------- joining and leaving


def test_a_request_joins_and_leaves_at_every_step(batching):
    """It gets its first token in the step after it came, and is gone with its last."""
    prompts = random_prompts(7, range(3, 15))
    wishes = [replace(FREE, max_tokens=1 + place % 3) for place in range(len(prompts))]
    engine = new_engine(batching, **step_by_step(batching))
    outputs = {}
    for place, (prompt, params) in enumerate(zip(prompts, wishes, strict=True)):
        engine.add_request(str(place), prompt, params)
        # Up to m4 a step prefills or decodes, and newcomers go first; from m5 on it does both.
        *others, newcomer = engine.step()
        assert not others or batching >= "m5"
        assert newcomer.request_id == str(place)
        assert len(tokens(newcomer)[0]) == 1
        outputs.update((output.request_id, output) for output in others)
        others = engine.step() if place % 4 == 3 else []
        assert all(len(tokens(output)[0]) > 1 for output in others)
        outputs.update((output.request_id, output) for output in (newcomer, *others))
    outputs.update(run_to_end(engine))
    for place, (prompt, params) in enumerate(zip(prompts, wishes, strict=True)):
        assert tokens(outputs[str(place)]) == alone(prompt, params)
    assert_cache_is_empty(engine)


@pytest.mark.parametrize("n", [1, 3])
def test_no_more_sequences_run_than_were_asked_for(batching, n):
    llm = new_llm(batching, max_num_seqs=4)
    prompts = random_prompts(8, [6] * 10)
    params = replace(SAMPLED, n=n, seed=1)
    outputs = llm.generate(prompts, params)
    assert llm.stats()["num_running_peak"] == 4
    assert llm.stats()["num_preemptions"] == 0
    for output, prompt in zip(outputs, prompts, strict=True):
        assert tokens(output) == alone(prompt, params)


def test_more_samples_than_places(batching):
    """The rest of the samples follow when the first have finished."""
    llm = new_llm(batching, max_num_seqs=2)
    (prompt,) = random_prompts(9, [11])
    params = replace(SAMPLED, n=5, seed=8)
    assert tokens(llm.generate(prompt, params)[0]) == alone(prompt, params)
    assert_cache_is_empty(llm.engine)


def test_samples_may_end_with_their_first_token(milestone):
    """Before they ever were in a decode step; nothing of them stays behind."""
    llm = new_llm(milestone)
    (prompt,) = random_prompts(9, [20])
    params = replace(SAMPLED, n=4, seed=8, max_tokens=1)
    assert tokens(llm.generate(prompt, params)[0]) == alone(prompt, params)
    assert_cache_is_empty(llm.engine)


@pytest.mark.parametrize("batching", [name for name in BATCHING if name < "m5"])
def test_a_prefill_step_has_a_budget_of_tokens(batching):
    """Of prompts of 10 tokens two fit into 25; one that is longer than the budget goes alone."""
    engine = new_engine(batching, max_num_batched_tokens=25)
    for place, prompt in enumerate(random_prompts(10, [10, 10, 10, 40, 3])):
        engine.add_request(str(place), prompt, FREE)
    steps = [[output.request_id for output in engine.step()] for _ in range(4)]
    assert steps == [["0", "1"], ["2"], ["3"], ["4"]]
    assert len(engine.step()) == 5


def test_samples_share_the_memory_of_their_prompt():
    """m3: three samples of 40 tokens fit where one and a half prompts would."""
    (prompt,) = random_prompts(11, [41])
    params = replace(SAMPLED, n=3, seed=1, max_tokens=7)
    llm = new_llm("m3_paged", max_model_len=LONGEST, block_size=8, num_kv_blocks=8)
    assert tokens(llm.generate(prompt, params)[0]) == alone(prompt, params)
    stats = llm.stats()
    assert stats["num_preemptions"] == 0
    assert stats["num_prompt_tokens"] == 41
    # Five shared blocks and one for each sample; a shared slot counts once.
    assert stats["kv_slots_allocated_peak"] == 8 * 8
    assert stats["kv_slots_used_peak"] == 40 + 3 * 7

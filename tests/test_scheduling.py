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
    VOCAB_SIZE,
    assert_cache_is_empty,
    new_engine,
    new_llm,
    random_prompts,
    run_to_end,
    small_cache,
    tokens,
)

from common.sampling_params import SamplingParams

LONGEST = 64  # tokens of prompt and output together, in all of these tests
LONG = replace(GREEDY, max_tokens=40, ignore_eos=True)


@pytest.fixture(params=BATCHING)
def batching(request) -> str:
    """Every milestone that runs more than one sequence at a time."""
    return request.param


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
def plain_llm():
    return new_llm("m1_basic", max_model_len=LONGEST)


@cache
def random_workload(seed: int, num_requests: int = 14) -> list[Arrival]:
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
                expected=tokens(plain_llm().generate(prompt, params)[0]),
            )
        )
    return arrivals


def play(engine, workload: list[Arrival]) -> Counter:
    """Run a workload, check every output, and count what happened."""
    arrivals = {f"request {place}": arrival for place, arrival in enumerate(workload)}
    num_seen = {request_id: [0] * each.params.n for request_id, each in arrivals.items()}
    finished: Counter[str] = Counter()
    happened: Counter[str] = Counter()

    def check(output):
        finished[output.request_id] += output.finished
        expected = arrivals[output.request_id].expected
        for sample, reference in zip(output.outputs, expected, strict=True):
            assert sample.token_ids == reference[: len(sample.token_ids)]
            if sample.finish_reason in ("stop", "length"):
                assert sample.token_ids == reference
        counts = [len(sample) for sample in tokens(output)]
        before = num_seen[output.request_id]
        assert all(new >= old for new, old in zip(counts, before, strict=True))
        num_seen[output.request_id] = counts

    last_event = max(max(each.at_step, each.abort_at_step or 0) for each in workload)
    step = 0
    while engine.has_unfinished_requests() or step <= last_event:
        assert step < 5000, "no end in sight"
        for request_id, each in arrivals.items():
            if each.at_step == step:
                engine.add_request(request_id, each.prompt, each.params, each.priority)
            if each.abort_at_step == step:
                output = engine.abort_request(request_id)
                if output is not None:
                    assert output.finished
                    assert "abort" in [sample.finish_reason for sample in output.outputs]
                    check(output)
                    happened["aborts"] += 1
        for output in engine.step():
            check(output)
        step += 1
    # Nothing lost, nothing twice.
    assert finished == dict.fromkeys(arrivals, 1)
    assert_cache_is_empty(engine)
    happened["preemptions"] = engine.stats()["num_preemptions"]
    return happened


@pytest.mark.parametrize("seed", range(8))
def test_any_workload_in_a_small_cache_is_as_if_each_request_were_alone(batching, seed):
    rng = random.Random(seed)
    engine = new_engine(
        batching,
        max_model_len=LONGEST,
        max_num_seqs=rng.choice((2, 5, 16)),
        max_num_batched_tokens=rng.choice((16, 64, 1000)),
        **small_cache(batching, rng.choice((LONGEST, 96, 160))),
    )
    happened = play(engine, random_workload(seed))
    print(happened)

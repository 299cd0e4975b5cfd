"""Random requests for engines whose steps overlap, and what must hold of every run of them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import pytest
from support import (
    GREEDY,
    VOCAB_SIZE,
    assert_cache_is_empty,
    new_engine,
    new_llm,
    small_cache,
)

from common.outputs import CompletionOutput, RequestOutput
from common.sampling_params import RequestOutputKind, SamplingParams

MILESTONES = ("m5_chunked", "m6_prefix")
LONGEST = 64  # tokens of prompt and output together
EOS = 258
LETTERS = dict.fromkeys(range(ord("a"), ord("h")), 6.0)  # a bias towards readable text
FREE = SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
KINDS = tuple(RequestOutputKind)


CHOICES = {  # a milestone, and whether its steps overlap
    "m5-overlap": ("m5_chunked", True),
    "m5-no-overlap": ("m5_chunked", False),
    "m6-overlap": ("m6_prefix", True),
}


def maker(milestone: str, overlap: bool):
    """What makes engines; prompts come in chunks of 12 tokens or fewer."""

    def make(model="random:tiny-llama", **options):
        options = {"max_num_seqs": 4, "max_num_batched_tokens": 12, **options}
        return new_engine(milestone, model, max_model_len=LONGEST, overlap=overlap, **options)

    return make


def small(num_tokens: int) -> dict[str, int]:
    """A cache for so many tokens."""
    return small_cache(MILESTONES[0], num_tokens)


@cache
def plain_llm(model: str = "random:tiny-llama"):
    return new_llm("m1_basic", model, max_model_len=LONGEST)


def alone(prompt: list[int], params: SamplingParams) -> RequestOutput:
    """What a request says when nothing else runs, nothing is scarce, and no step overlaps."""
    return plain_llm().generate(prompt, params)[0]


# ---------------------------------------------------------------- a run, and what must hold of it


@dataclass(frozen=True)
class Arrival:
    """A request that comes before a step, and whose user may give up before another one."""

    prompt: list[int]
    params: SamplingParams
    expected: RequestOutput
    at_step: int = 0
    priority: int = 0
    abort_at: int | None = None


def arrival(prompt: list[int], params: SamplingParams, **options) -> Arrival:
    return Arrival(prompt, params, alone(prompt, params), **options)


def play(engine, arrivals: list[Arrival]) -> dict[str, list[RequestOutput]]:
    """Run them all and check everything; returns all outputs of each."""
    outputs = {str(place): [] for place in range(len(arrivals))}
    requests, step = [], 0
    last_event = max(max(each.at_step, each.abort_at or 0) for each in arrivals)
    while engine.has_unfinished_requests() or step <= last_event:
        assert step < 20_000, "no end in sight"
        for place, each in enumerate(arrivals):
            if each.at_step == step:
                engine.add_request(str(place), each.prompt, each.params, each.priority)
                requests += engine.output_processor.requests(str(place))
            if each.abort_at == step and (output := engine.abort_request(str(place))):
                outputs[output.request_id].append(output)
        for output in engine.step():
            outputs[output.request_id].append(output)
        step += 1
    for place, each in enumerate(arrivals):
        assert_as_alone(outputs[str(place)], each)
    assert_nothing_is_left(engine)
    assert all(request.num_pending == 0 for request in requests)
    return outputs


def assert_nothing_is_left(engine) -> None:
    """No block, no row of the sampler, no step under way, no prompt half scored."""
    assert_cache_is_empty(engine)
    runner = engine.model_runner
    assert len(runner.sampler._free_rows) == runner.sampler.num_rows - 1
    assert not runner._scored and not engine._launched


def assert_as_alone(outputs: list[RequestOutput], request: Arrival) -> None:
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    params, last = request.params, outputs[-1]
    for index, wanted in enumerate(request.expected.outputs):
        heard = [output.outputs[index] for output in outputs]
        sample = _together(heard) if params.output_kind is RequestOutputKind.DELTA else heard[-1]
        if params.output_kind is RequestOutputKind.CUMULATIVE:
            for each in heard:  # never too much, not even for a moment
                assert each.token_ids == wanted.token_ids[: len(each.token_ids)]
                assert wanted.text.startswith(each.text) or each.finish_reason == "abort"
        if sample.finish_reason == "abort":
            assert request.abort_at is not None
            assert sample.token_ids == wanted.token_ids[: len(sample.token_ids)]
            continue
        for name in ("token_ids", "text", "finish_reason", "stop_reason"):
            assert getattr(sample, name) == getattr(wanted, name), name
        assert_same_logprobs(sample.logprobs, wanted.logprobs)
    first = last.outputs[0]
    if first.finish_reason != "abort":
        assert last.prompt_token_ids == request.prompt
        assert len(last.metrics.token_times) == len(request.expected.outputs[0].token_ids)
        wanted = request.expected.prompt_logprobs
        assert (last.prompt_logprobs is None) == (wanted is None)
        if wanted is not None:
            assert last.prompt_logprobs[0] is None
            assert_same_logprobs(last.prompt_logprobs[1:], wanted[1:])


def _together(deltas: Iterable[CompletionOutput]) -> CompletionOutput:
    deltas = list(deltas)
    logprobs = None if deltas[0].logprobs is None else [e for d in deltas for e in d.logprobs]
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        logprobs=logprobs,
    )


def assert_same_logprobs(ours, expected) -> None:
    assert (ours is None) == (expected is None)
    for entries, wanted in zip(ours or (), expected or (), strict=True):
        assert list(entries) == list(wanted)
        for token, entry in entries.items():
            assert entry.rank == wanted[token].rank
            assert entry.logprob == pytest.approx(wanted[token].logprob, abs=1e-4)


# ---------------------------------------------------------------- random requests


def random_params(rng: random.Random) -> SamplingParams:
    """Any mixture of the options that decide how a request goes on and when it ends."""
    params = replace(
        GREEDY,
        max_tokens=rng.choice((1, 2, rng.randint(3, 24))),
        n=rng.choice((1, 1, 1, 2, 3)),
        ignore_eos=rng.random() < 0.3,
        include_stop_str_in_output=rng.random() < 0.5,
        logit_bias={EOS: 2.0, **(LETTERS if rng.random() < 0.6 else {})},
        output_kind=rng.choice(KINDS),
    )
    if rng.random() < 0.7:
        params = replace(params, temperature=1.0, seed=rng.randrange(2**40))
    if rng.random() < 0.4:
        letters = "".join(map(chr, LETTERS))
        stops = ["".join(rng.choices(letters, k=rng.randint(1, 2))) for _ in range(3)]
        params = replace(params, stop=stops)
    if rng.random() < 0.4:
        params = replace(params, stop_token_ids=rng.sample(range(VOCAB_SIZE), 12))
    if rng.random() < 0.3:
        params = replace(params, min_tokens=rng.randint(0, params.max_tokens))
    if rng.random() < 0.4:
        params = replace(
            params, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2
        )
    if rng.random() < 0.3:
        params = replace(params, logprobs=rng.randint(0, 3), prompt_logprobs=rng.randint(0, 3))
    return params


@cache
def some_requests(count: int = 150) -> list[Arrival]:
    """Requests to draw from, each with its answer."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        params = random_params(rng)
        length = rng.randint(1, min(LONGEST - params.max_tokens, rng.choice((4, 20, 60))))
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
        made.append(arrival(prompt, params))
    return made


def random_arrivals(rng: random.Random, count: int, spread: float) -> list[Arrival]:
    """Some of them, one every ``spread`` steps, a few urgent, a few aborted."""
    arrivals = []
    for place in range(count):
        at_step = int(place * spread * rng.random())
        arrivals.append(
            replace(
                rng.choice(some_requests()),
                at_step=at_step,
                priority=rng.choice((0, 0, 0, -1, 5)),
                abort_at=at_step + rng.randrange(30) if rng.random() < 0.2 else None,
            )
        )
    return arrivals

"""Steps that overlap, and prompts in chunks: nobody who looks from outside can tell.

A step is planned before the last one's tokens are known, so a sequence may be given a step too
many. Whatever happens in between (it ends, is aborted, preempted, fails), the user sees what the
plainest engine says of the request alone: the same tokens, text, reasons and log-probabilities.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
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

from common.outputs import CompletionOutput, RequestOutput
from common.sampling_params import RequestOutputKind, SamplingParams
from m5_chunked import engine as engine_module
from m5_chunked.model_runner import LaunchedStep

MILESTONE = "m5_chunked"
LONGEST = 64  # tokens of prompt and output together
EOS = 258
LETTERS = dict.fromkeys(range(ord("a"), ord("h")), 6.0)  # a bias towards readable text
FREE = SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
KINDS = tuple(RequestOutputKind)


@pytest.fixture(params=[False, True], ids=["overlap", "no-overlap"])
def no_overlap(request) -> bool:
    return request.param


@pytest.fixture
def new(no_overlap):
    """Engines of m5; prompts come in chunks of 12 tokens or fewer."""

    def make(model="random:tiny-llama", **options):
        options = {"max_num_seqs": 4, "max_num_batched_tokens": 12, **options}
        return new_engine(
            MILESTONE, model, max_model_len=LONGEST, no_overlap=no_overlap, **options
        )

    return make


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


def test_the_requests_end_in_every_way():
    """Else the tests below would show little."""
    samples = [sample for each in some_requests() for sample in each.expected.outputs]
    reasons = {(sample.finish_reason, type(sample.stop_reason)) for sample in samples}
    assert reasons == {
        ("length", type(None)), ("stop", type(None)), ("stop", int), ("stop", str)
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals_in_a_small_cache(new, seed):
    rng = random.Random(seed)
    engine = new(
        max_num_seqs=(seats := rng.choice((3, 5, 12))),
        max_num_batched_tokens=seats + rng.choice((1, 7, 40)),
        **small_cache(MILESTONE, rng.choice((LONGEST, 80))),
    )
    play(engine, random_arrivals(rng, 30, spread=1.5))
    assert engine.stats()["num_preemptions"] > 0


def test_as_small_a_budget_as_there_may_be(new):
    """One token of a prompt beside everyone who decodes; all of the budget without them."""
    engine = new(max_num_seqs=3, max_num_batched_tokens=4)
    play(engine, random_arrivals(random.Random(7), 16, spread=2))
    assert engine.stats()["chunk_reasons"]["budget"] > 50


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    seats=st.integers(1, 9),
    spare=st.integers(1, 60),
    num_blocks=st.integers(LONGEST // 8, 30),
    spread=st.sampled_from([0, 1, 6]),
    overlaps=st.booleans(),
)
def test_any_sizes(seed, seats, spare, num_blocks, spread, overlaps):
    engine = new_engine(
        MILESTONE,
        max_model_len=LONGEST,
        max_num_seqs=seats,
        max_num_batched_tokens=seats + spare,
        no_overlap=not overlaps,
        block_size=8,
        num_kv_blocks=num_blocks,
    )
    play(engine, random_arrivals(random.Random(seed), 10, spread))


def test_two_thousand_requests(new):
    """At any time some dozen wait; the cache is too small for those that run."""
    engine = new(max_num_seqs=16, max_num_batched_tokens=80, **small_cache(MILESTONE, 256))
    play(engine, random_arrivals(random.Random(1), 2000, spread=0.8))
    stats = engine.stats()
    assert stats["num_preemptions"] > 100
    assert stats["num_running_peak"] == 16


# ---------------------------------------------------------------- one step behind


def test_outputs_come_from_the_step_before():
    """With overlap the first step returns nothing; the tokens are the same ones, a step later."""
    (prompt,) = random_prompts(0, [5])
    steps = {}
    for no_overlap in (False, True):
        engine = new_engine(MILESTONE, no_overlap=no_overlap)
        engine.add_request("a", prompt, replace(FREE, max_tokens=4))
        steps[no_overlap] = [[tokens(output)[0] for output in engine.step()] for _ in range(5)]
    assert steps[False] == [[], *steps[True][:4]]
    assert [len(output) for (output,) in steps[True][:4]] == [1, 2, 3, 4]


def test_who_ends_by_length_is_given_no_step_too_many(new):
    """That can be foreseen. An end of sequence cannot, and then one token is nobody's."""
    engine = new()
    play(engine, [arrival(prompt, FREE) for prompt in random_prompts(1, (30, 5))])
    assert engine.stats()["num_generated_tokens"] == 40


ENDINGS = {
    "max_tokens 1": replace(FREE, max_tokens=1),
    "max_tokens 1, three samples": replace(FREE, max_tokens=1, n=3),
    "as long as the model allows": replace(FREE, max_tokens=None),
    "end of sequence": replace(FREE, ignore_eos=False, logit_bias={EOS: 4.0}),
    "end of sequence, but not yet": replace(
        FREE, ignore_eos=False, logit_bias={EOS: 7.0}, min_tokens=6, n=2
    ),
    "end of sequence at once": replace(FREE, ignore_eos=False, logit_bias={EOS: 100.0}, n=2),
    "stop token": replace(FREE, stop_token_ids=list(range(60)), n=3),
    "stop token, but not yet": replace(FREE, stop_token_ids=list(range(200)), min_tokens=5),
    "stop token, in the text": replace(
        FREE, stop_token_ids=list(range(97, 103)), logit_bias=LETTERS,
        include_stop_str_in_output=True, min_tokens=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_endings(new, ending):
    prompts = random_prompts(2, (1, 20, 9, 33, 12, 7))
    arrivals = [
        arrival(
            prompt,
            replace(ENDINGS[ending], seed=place, output_kind=KINDS[place % 3]),
            at_step=place,
        )
        for place, prompt in enumerate(prompts)
    ]
    play(new(max_num_seqs=6), arrivals)


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_is_cut_by_steps(new, kind, included):
    """Its letters come one a step, the last of them when the next step is under way."""
    (prompt,) = random_prompts(3, [30])
    params = replace(FREE, logit_bias=dict.fromkeys(LETTERS, 50.0), output_kind=kind)
    text = alone(prompt, params).outputs[0].text
    assert len(text) == 20
    arrivals = [
        arrival(
            prompt,
            replace(params, stop=text[start : start + 3], include_stop_str_in_output=included),
        )
        for start in range(18)
    ]
    for each in arrivals:
        sample = each.expected.outputs[0]
        assert sample.finish_reason == "stop" and len(sample.token_ids) <= 20
        assert sample.text.endswith(sample.stop_reason) is included
    play(new(), arrivals)


def test_a_stop_string_is_cut_by_a_preemption(new):
    """What came before it was taken out of the cache counts: it is said again in one chunk."""
    params = replace(FREE, logit_bias=dict.fromkeys(LETTERS, 50.0), max_tokens=30)
    prompts = random_prompts(4, [20] * 5)
    arrivals = []
    for place, prompt in enumerate(prompts):
        text = alone(prompt, replace(params, seed=place)).outputs[0].text
        stop = next(text[i : i + 4] for i in range(12, 26) if text.find(text[i : i + 4]) == i)
        arrivals.append(arrival(prompt, replace(params, seed=place, stop=stop)))
    engine = new(**small_cache(MILESTONE, LONGEST))
    outputs = play(engine, arrivals)
    cut = [output[-1] for output in outputs.values() if output[-1].metrics.num_preemptions]
    assert any(output.outputs[0].finish_reason == "stop" for output in cut)


@pytest.mark.parametrize("budget", [5, 12, 16, 33])
def test_logprobs_of_a_prompt_in_chunks(new, budget):
    """Of every token, those next to a cut included; the last chunk may be a single token."""
    params = replace(FREE, n=2, logprobs=2, prompt_logprobs=3, max_tokens=5)
    lengths = (1, 2, budget, budget + 1, 40, 31)
    arrivals = [
        arrival(prompt, params, at_step=2 * place)
        for place, prompt in enumerate(random_prompts(5, lengths))
    ]
    play(new(max_num_batched_tokens=budget, **small_cache(MILESTONE, LONGEST)), arrivals)


# ---------------------------------------------------------------- at any moment


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("step", range(14))
def test_aborts(new, step, n):
    """While it waits, right after its first chunk was launched, in its last step, after it."""
    params = replace(FREE, n=n, max_tokens=6, prompt_logprobs=1)
    prompts = random_prompts(6, (8, 30, 15))
    arrivals = [
        arrival(prompt, params, abort_at=step if place == 1 else None)
        for place, prompt in enumerate(prompts)
    ]
    play(new(), arrivals)


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
@pytest.mark.parametrize("step", range(8))
def test_the_id_of_an_aborted_request_is_free_at_once(new, step, prompt_logprobs):
    """Another may take it while the old one's last step is under way; they are not confused."""
    old, other = random_prompts(7, (16, 9))
    params = replace(FREE, max_tokens=5)
    engine = new()
    engine.add_request("a", old, replace(params, prompt_logprobs=2, logprobs=1))
    for _ in range(step):
        engine.step()
    engine.abort_request("a")
    wanted = arrival(other, replace(params, prompt_logprobs=prompt_logprobs))
    engine.add_request("a", other, wanted.params)
    assert_as_alone([run_to_end(engine)["a"]], replace(wanted, params=replace(
        wanted.params, output_kind=RequestOutputKind.FINAL_ONLY
    )))  # fmt: skip
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_one_comes_while_the_last_step_of_another_is_under_way(new, ignore_eos):
    """It takes its row, its blocks and its place; also after a token that is nobody's."""
    bias = {} if ignore_eos else {EOS: 100.0}
    first = arrival(
        random_prompts(8, [6])[0],
        replace(FREE, max_tokens=3, ignore_eos=ignore_eos, logit_bias=bias, min_tokens=2),
    )
    for at_step in range(1, 7):
        later = arrival(random_prompts(9, [14])[0], replace(FREE, n=2), at_step=at_step)
        engine = new(max_num_seqs=2, **small_cache(MILESTONE, LONGEST))
        play(engine, [first, later])
        assert engine.model_runner.sampler.num_rows == 3


def test_an_idle_engine_goes_on(new):
    """What was under way when the last request ended disturbs nobody who comes much later."""
    engine = new()
    request = arrival(random_prompts(10, [20])[0], ENDINGS["end of sequence"])
    for _ in range(3):
        engine.add_request("a", request.prompt, request.params)
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        assert_as_alone(outputs, request)
    assert_nothing_is_left(engine)


# ---------------------------------------------------------------- what goes wrong


def mixed_work() -> list[Arrival]:
    """Decodes and chunks at the same time for some steps."""
    params = replace(FREE, max_tokens=8, n=2, frequency_penalty=0.5)
    prompts = random_prompts(11, (5, 30, 9, 22))
    return [
        arrival(prompt, replace(params, seed=place), at_step=2 * place)
        for place, prompt in enumerate(prompts)
    ]


POISON = 7  # a token whose embedding is not a number


@pytest.mark.parametrize("in_chunk", [0, 1])
def test_not_a_number_ends_one_request(new, in_chunk):
    """Its keys and values are in blocks that others get, and a step ahead of it is under way."""
    engine = new("random:tiny-qwen3", max_num_seqs=3, **small_cache(MILESTONE, LONGEST))
    assert not engine.model_config.tie_word_embeddings
    prompts = [[token for token in prompt if token != POISON] for prompt in random_prompts(
        12, (9, 30, 14, 20, 25, 8)
    )]  # fmt: skip
    params = replace(FREE, max_tokens=10, logit_bias={POISON: -100.0})
    plain = plain_llm("random:tiny-qwen3")
    expected = [tokens(output) for output in plain.generate(prompts, params)]
    with torch.inference_mode():
        engine.model.embed_tokens[POISON] = torch.nan
    prompts[1][20 * in_chunk] = POISON
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), prompt, params)
    outputs = run_to_end(engine)
    failed = outputs.pop("1").outputs[0]
    assert failed.finish_reason == "error" and "NaN" in failed.stop_reason
    assert failed.token_ids == []
    for place, output in outputs.items():
        assert tokens(output) == expected[int(place)]
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("when", range(1, 9))
def test_no_memory_for_a_chunk(new, when, monkeypatch):
    """The step is taken back, smaller ones follow, and everyone says what they would have."""
    engine = new(max_num_batched_tokens=32)
    forward, calls = engine.model.forward, []

    def limited(input_ids, *args, **kwargs):
        calls.append(input_ids.numel())
        if len(calls) >= when and input_ids.numel() > 10:
            raise torch.OutOfMemoryError("simulated")
        return forward(input_ids, *args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", limited)
    play(engine, mixed_work())
    if any(num_tokens > 10 for num_tokens in calls[when - 1 :]):
        assert engine.scheduler.max_num_batched_tokens < 32


@pytest.mark.parametrize("when", range(1, 16, 2))
@pytest.mark.parametrize("place", ["before the model", "after the model", "after the sampler"])
def test_ctrl_c(new, place, when, monkeypatch):
    """Wherever it comes: the step has not happened, and no token of another one is lost."""
    engine = new()
    owner, name = engine.model, "forward"
    if place == "after the sampler":
        owner, name = engine.model_runner.sampler, "sample"
    original, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == when and place == "before the model":
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if len(calls) == when:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)
    play(patient(engine, monkeypatch), mixed_work())
    assert len(calls) > when


def patient(engine, monkeypatch):
    """Whose user goes on after Ctrl-C."""
    step = engine.step

    def step_again():
        try:
            return step()
        except KeyboardInterrupt:
            return step()

    monkeypatch.setattr(engine, "step", step_again)
    return engine


@pytest.mark.parametrize("when", range(1, 12))
def test_ctrl_c_while_a_step_is_awaited(new, when, monkeypatch):
    """Its tokens are read by the next call."""
    engine = new()
    read, calls = LaunchedStep.read, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == when:
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(LaunchedStep, "read", interrupted)
    play(patient(engine, monkeypatch), mixed_work())
    assert len(calls) > when


# ---------------------------------------------------------------- how long a chunk is


@pytest.mark.parametrize("target_itl_ms", [None, 4.0])
def test_chunks_follow_the_target(new, target_itl_ms, monkeypatch):
    """A step takes 1 ms and 0.1 ms for each token, by a clock that moves for nothing else."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    engine = new(max_num_seqs=32, max_num_batched_tokens=128, target_itl_ms=target_itl_ms)
    launch, mixed = engine.model_runner.launch, []

    def timed(step):
        clock.now += 1e-3 + 1e-4 * step.num_tokens
        if 0 < step.num_decodes < len(step.parts):
            mixed.append(step.num_tokens)
        return launch(step)

    monkeypatch.setattr(engine.model_runner, "launch", timed)
    prompts = random_prompts(13, [6] + [58] * 40)
    params = [replace(FREE, max_tokens=58), *[replace(FREE, max_tokens=4)] * 40]
    play(engine, [arrival(*pair) for pair in zip(prompts, params, strict=True)])
    reasons = engine.stats()["chunk_reasons"]
    assert reasons["prompt"] == 41  # everyone's last chunk
    if target_itl_ms is None:
        assert "itl" not in reasons and reasons["budget"] > 10
        assert mixed.count(128) > 10
    else:
        assert reasons["itl"] > 20
        settled = mixed[10:-5]
        assert sum(settled) / len(settled) == pytest.approx(30, rel=0.2)
        assert max(settled) < 50

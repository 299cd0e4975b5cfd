"""Steps that overlap, when one of them fails; and how long a chunk may make them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from overlap_cases import (
    CHOICES,
    FREE,
    LONGEST,
    Arrival,
    arrival,
    assert_nothing_is_left,
    maker,
    plain_llm,
    play,
    small,
)
from support import random_prompts, run_to_end, tokens


@pytest.fixture(params=CHOICES.values(), ids=CHOICES)
def choice(request):
    return request.param


@pytest.fixture
def new(choice):
    return maker(*choice)


def part(choice, name):
    """A module of the milestone under test."""
    return importlib.import_module(f"{choice[0]}.{name}")


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
    engine = new("random:tiny-qwen3", max_num_seqs=3, **small(LONGEST))
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
def test_ctrl_c_while_a_step_is_awaited(new, choice, when, monkeypatch):
    """Its tokens are read by the next call."""
    engine, launched_step = new(), part(choice, "model_runner").LaunchedStep
    read, calls = launched_step.read, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == when:
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(launched_step, "read", interrupted)
    play(patient(engine, monkeypatch), mixed_work())
    assert len(calls) > when


# ---------------------------------------------------------------- how long a chunk is


@pytest.mark.parametrize("target_itl_ms", [None, 4.0])
def test_chunks_follow_the_target(new, choice, target_itl_ms, monkeypatch):
    """A step takes 1 ms and 0.1 ms for each token, by a clock that moves for nothing else."""
    clock = SimpleNamespace(now=0.0)
    ticking = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(part(choice, "engine"), "time", ticking)
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

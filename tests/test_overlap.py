"""Steps that overlap, and prompts in chunks: nobody who looks from outside can tell.

A step is planned before the last one's tokens are known, so a sequence may be given a step too
many. Whatever happens in between (it ends, is aborted, preempted, fails), the user sees what the
plainest engine says of the request alone: the same tokens, text, reasons and log-probabilities.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from overlap_cases import (
    CHOICES,
    EOS,
    FREE,
    KINDS,
    LETTERS,
    LONGEST,
    MILESTONES,
    alone,
    arrival,
    assert_as_alone,
    assert_nothing_is_left,
    maker,
    play,
    random_arrivals,
    small,
    some_requests,
)
from support import new_engine, random_prompts, run_to_end, tokens

from common.sampling_params import RequestOutputKind


@pytest.fixture(params=CHOICES.values(), ids=CHOICES)
def choice(request):
    return request.param


@pytest.fixture
def new(choice):
    return maker(*choice)


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
        **small(rng.choice((LONGEST, 80))),
    )
    play(engine, random_arrivals(rng, 30, spread=1.5))
    assert engine.stats()["num_preemptions"] > 0


def test_as_small_a_budget_as_there_may_be(new):
    """One token of a prompt beside everyone who decodes; all of the budget without them."""
    engine = new(max_num_seqs=3, max_num_batched_tokens=4)
    play(engine, random_arrivals(random.Random(7), 16, spread=2))
    assert engine.stats()["chunk_reasons"]["budget"] > 50


@settings(max_examples=80)
@given(
    milestone=st.sampled_from(MILESTONES),
    seed=st.integers(0, 2**32),
    seats=st.integers(1, 9),
    spare=st.integers(1, 60),
    num_blocks=st.integers(LONGEST // 8, 30),
    spread=st.sampled_from([0, 1, 6]),
    overlaps=st.booleans(),
)
def test_any_sizes(milestone, seed, seats, spare, num_blocks, spread, overlaps):
    engine = new_engine(
        milestone,
        max_model_len=LONGEST,
        max_num_seqs=seats,
        max_num_batched_tokens=seats + spare,
        overlap=overlaps,
        block_size=8,
        num_kv_blocks=num_blocks,
    )
    play(engine, random_arrivals(random.Random(seed), 10, spread))


def test_two_thousand_requests():
    """At any time some dozen wait; the cache is too small for those that run."""
    engine = new_engine(
        "m5_chunked", max_model_len=LONGEST, max_num_seqs=16, max_num_batched_tokens=80,
        **small(256),
    )  # fmt: skip
    play(engine, random_arrivals(random.Random(1), 2000, spread=0.8))
    stats = engine.stats()
    assert stats["num_preemptions"] > 100
    assert stats["num_running_peak"] == 16


# ---------------------------------------------------------------- one step behind


@pytest.mark.parametrize("milestone", MILESTONES)
def test_outputs_come_from_the_step_before(milestone):
    """With overlap the first step returns nothing; the tokens are the same ones, a step later."""
    (prompt,) = random_prompts(0, [5])
    steps = {}
    for overlap in (True, False):
        engine = new_engine(milestone, overlap=overlap)
        engine.add_request("a", prompt, replace(FREE, max_tokens=4))
        steps[overlap] = [[tokens(output)[0] for output in engine.step()] for _ in range(5)]
    assert steps[True] == [[], *steps[False][:4]]
    assert [len(output) for (output,) in steps[False][:4]] == [1, 2, 3, 4]


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


def test_a_stop_string_is_cut_by_a_preemption_and_by_chunks(new):
    """What came before counts: it is out of the cache, and computed again in several chunks."""
    params = replace(FREE, logit_bias=dict.fromkeys(LETTERS, 50.0), max_tokens=30)
    prompts = random_prompts(4, [20] * 5)
    arrivals = []
    for place, prompt in enumerate(prompts):
        text = alone(prompt, replace(params, seed=place)).outputs[0].text
        stop = next(text[i : i + 4] for i in range(12, 26) if text.find(text[i : i + 4]) == i)
        arrivals.append(arrival(prompt, replace(params, seed=place, stop=stop)))
    engine = new(**small(LONGEST))
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
    play(new(max_num_batched_tokens=budget, **small(LONGEST)), arrivals)


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
        engine = new(max_num_seqs=2, **small(LONGEST))
        play(engine, [first, later])
        assert engine.model_runner.sampler.num_rows == 3


@pytest.mark.parametrize("n", [1, 3])
def test_blocks_are_freed_once_after_an_end_of_sequence_under_overlap(new, n, monkeypatch):
    """The step after it is under way by then, and others take the blocks before it is read."""
    engine = new(max_num_seqs=4, **small(LONGEST))
    kv_cache = engine.scheduler.kv_cache
    held, free, freed = [], kv_cache.free, []

    def watched(request):
        held.append(kv_cache.num_allocated)
        free(request)
        freed.append((request.key, request.status.finish_reason))
        assert request.key not in kv_cache._tables

    monkeypatch.setattr(kv_cache, "free", watched)
    params = replace(FREE, ignore_eos=False, logit_bias={EOS: 5.0}, n=n, max_tokens=25)
    prompts = random_prompts(14, [9, 20, 14, 30, 7, 25])
    play(engine, [arrival(p, params, at_step=2 * i) for i, p in enumerate(prompts)])
    ends = [key for key, reason in freed if reason is not None]
    assert len(set(ends)) == len(ends) > n * len(prompts) / 2  # preempted ones may end without any
    assert sum(reason == "stop" for _, reason in freed) > len(ends) / 2
    assert max(held) > 0 and kv_cache.num_allocated == 0


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

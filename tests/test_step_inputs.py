"""A step as arrays of integers, in m4 and in m5: what is padded computes the same numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import TINY_MODELS, new_engine, random_prompts, run_to_end, small_cache, tokens

from common.sampling import PADDING_ROW
from common.sampling_params import SamplingParams
from m4_flash.kernels.prefill_plan import round_up
from m4_flash.step_buffers import StepBuffers
from m4_flash.step_inputs import StepArrays
from m5_chunked.step_inputs import UNKNOWN, TokenField
from m5_chunked.step_inputs import StepArrays as MixedArrays

PARAMS = SamplingParams(temperature=1.0, seed=1, max_tokens=12, ignore_eos=True)


def hidden_states(runner, arrays, is_prefill):
    """What the model computes of the tokens that are sampled after, ``[samples, H]``."""
    buffers = StepBuffers(1 << 16, torch.device("cpu"))
    buffers.begin()
    inputs = arrays.upload(buffers.add, is_prefill=is_prefill)
    if is_prefill:
        runner.attention.plan_prefill(inputs.batch, buffers.add)
    else:
        runner.attention.plan_decode(inputs.batch)
    hidden = runner.model(inputs.input_ids, inputs.positions, runner.attention, inputs.rope_lens)
    assert hidden.isfinite().all()
    return hidden[inputs.last]


def assert_padding_changes_nothing(runner, is_prefill, arrays):
    """In the middle of a step. One token of a sequence is a prefill too, behind what is cached."""
    caches = runner.attention.keys, runner.attention.values
    wanted = hidden_states(runner, arrays, is_prefill)
    stored = [cache.clone() for cache in caches]
    num_tokens, num_samples = arrays.num_tokens, len(arrays.rows)
    for more in (0, 1, 13, round_up(num_tokens) - num_tokens):
        padded = arrays.padded(num_tokens + more, num_samples + more)
        hidden = hidden_states(runner, padded, is_prefill=True)
        torch.testing.assert_close(hidden[:num_samples], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(caches, tuple(stored), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_padding_changes_nothing(model, monkeypatch):
    """Prompts of which samples fork, sequences that go on after preemption, and decode steps."""
    engine = new_engine("m4_flash", model, **small_cache("m4_flash", 64))
    seen, original = [], StepArrays.of

    def checked(step, *args):
        arrays = original(step, *args)
        assert_padding_changes_nothing(engine.model_runner, step.is_prefill, arrays)
        seen.append((step, arrays))
        return arrays

    monkeypatch.setattr(StepArrays, "of", checked)
    for place, prompt in enumerate(random_prompts(2, (5, 20, 8, 11))):
        engine.add_request(str(place), prompt, replace(PARAMS, n=1 + place % 2))
    run_to_end(engine)
    prefills = [step for step, _ in seen if step.is_prefill]
    assert 1 < len(prefills) < len(seen)
    assert any(step.forks for step in prefills)
    assert any(request.output_token_ids for step in prefills for request in step.requests)
    assert any(len(arrays.query_lens) > 1 for step, arrays in seen if step.is_prefill)


def test_padding_is_one_more_sequence_that_nobody_samples():
    arrays = StepArrays(
        token_ids=np.arange(5),
        positions=np.array([0, 1, 2, 7, 8]),
        rope_lens=np.array([1, 2, 3, 8, 9]),
        slots=np.array([8, 9, 10, 23, 24]),
        last=np.array([2, 2, 4]),
        rows=np.array([3, 5, 1]),
        tables=np.array([[1, 0], [2, 3]], dtype=np.int32),
        query_lens=np.array([3, 2]),
        cached_lens=np.array([0, 7]),
    )
    assert arrays.pairs == 1 + 2 + 3 + 8 + 9
    padded = arrays.padded(8, 4)
    assert padded.num_tokens == 8
    assert padded.query_lens.tolist() == [3, 2, 3] and padded.cached_lens.tolist() == [0, 7, 0]
    assert padded.positions.tolist() == [0, 1, 2, 7, 8, 0, 1, 2]
    assert padded.slots.tolist() == [8, 9, 10, 23, 24, -1, -1, -1]
    assert padded.rows.tolist() == [3, 5, 1, PADDING_ROW]
    assert padded.last.tolist() == [2, 2, 4, 0]
    assert padded.tables.tolist() == [[1, 0], [2, 3], [0, 0], [0, 0]]
    assert all(
        getattr(padded, name).dtype == getattr(arrays, name).dtype for name in vars(arrays)
    )


# ---------------------------------------------------------------- m5: decodes before chunks


def mixed_hidden_states(runner, arrays):
    """What the model computes of the tokens that are sampled after, ``[samples, H]``."""
    buffers = StepBuffers(1 << 16, torch.device("cpu"))
    buffers.begin()
    inputs = arrays.upload(buffers.add)
    if inputs.batch.query_lens:
        runner.attention.plan_prefill(inputs.batch, buffers.add)
    else:
        runner.attention.plan_decode(inputs.batch)
    ids = inputs.input_ids(runner._pool.tokens)
    hidden = runner.model(ids, inputs.positions, runner.attention, inputs.rope_lens)
    assert hidden.isfinite().all()
    return hidden[inputs.last]


def assert_mixed_padding_changes_nothing(runner, arrays):
    caches = runner.attention.keys, runner.attention.values
    wanted = mixed_hidden_states(runner, arrays)
    stored = [cache.clone() for cache in caches]
    num_decodes, num_tokens, num_samples = (
        arrays.num_decodes, arrays.num_tokens, arrays.num_samples
    )  # fmt: skip
    for decodes, others, samples in ((0, 0, 0), (1, 0, 0), (0, 1, 2), (3, 13, 1), (7, 2, 8)):
        padded = arrays.padded(
            num_decodes + decodes, num_tokens + decodes + others, num_samples + samples
        )
        hidden = mixed_hidden_states(runner, padded)
        torch.testing.assert_close(hidden[:num_samples], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(caches, tuple(stored), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("model", TINY_MODELS)
def test_padding_changes_nothing_in_mixed_steps(model, overlap, monkeypatch):
    """Decodes whose tokens only the device knows, chunks that go on, forks, preemption."""
    engine = new_engine(
        "m5_chunked", model, max_num_seqs=6, max_num_batched_tokens=16, overlap=overlap,
        **small_cache("m5_chunked", 72),
    )  # fmt: skip
    seen, original = [], MixedArrays.of

    def checked(step, *args):
        arrays = original(step, *args)
        assert_mixed_padding_changes_nothing(engine.model_runner, arrays)
        seen.append((step, arrays))
        return arrays

    monkeypatch.setattr(MixedArrays, "of", checked)
    for place, prompt in enumerate(random_prompts(2, (5, 20, 8, 33, 7, 9))):
        engine.add_request(str(place), prompt, replace(PARAMS, n=1 + place % 2))
    run_to_end(engine)
    mixed = [(step, arrays) for step, arrays in seen if 0 < step.num_decodes < len(step.parts)]
    assert any(len(step.parts) - step.num_decodes > 1 for step, _ in mixed)
    assert any(step.forks for step, _ in mixed)
    assert any(arrays.cached_lens[-1] > 0 for _, arrays in mixed)
    ids = [arrays.tokens[TokenField.ID] for _, arrays in mixed]
    assert any((of_step == UNKNOWN).any() for of_step in ids) is overlap
    assert engine.stats()["num_preemptions"] > 0


def mixed_arrays() -> MixedArrays:
    """Two decodes, three tokens of a prompt that ends and forks, two of one that does not."""
    tokens = {
        TokenField.ID: [UNKNOWN, 9, 5, 6, 7, 11, 12],
        TokenField.ROW: [3, 1, 2, 2, 2, 5, 5],
        TokenField.POSITION: [7, 4, 0, 1, 2, 8, 9],
        TokenField.ROPE_LEN: [8, 5, 3, 3, 3, 20, 20],
        TokenField.SLOT: [15, 20, 24, 25, 26, 40, 41],
    }
    return MixedArrays(
        tokens=np.array([tokens[field] for field in TokenField]),
        samples=np.array([[0, 1, 4, 4], [3, 1, 2, 4]]),
        tables=np.array([[1, 0], [2, 0], [3, 0], [4, 5]], dtype=np.int32),
        query_lens=[1, 1, 3, 2],
        cached_lens=[7, 4, 0, 8],
        num_decodes=2,
    )


def test_decodes_are_added_behind_the_decodes():
    arrays = mixed_arrays()
    assert arrays.pairs == 8 + 5 + 1 + 2 + 3 + 9 + 10
    padded = arrays.padded(4, 12, 6)
    assert (padded.num_decodes, padded.num_tokens) == (4, 12)
    assert {field: padded.tokens[field].tolist() for field in TokenField} == {
        TokenField.ID: [UNKNOWN, 9, 0, 0, 5, 6, 7, 11, 12, 0, 0, 0],
        TokenField.ROW: [3, 1, *[PADDING_ROW] * 2, 2, 2, 2, 5, 5, *[PADDING_ROW] * 3],
        TokenField.POSITION: [7, 4, 0, 0, 0, 1, 2, 8, 9, 0, 1, 2],
        TokenField.ROPE_LEN: [8, 5, 1, 1, 3, 3, 3, 20, 20, 1, 1, 1],
        TokenField.SLOT: [15, 20, -1, -1, 24, 25, 26, 40, 41, -1, -1, -1],
    }
    assert padded.query_lens == [1, 1, 1, 1, 3, 2, 3]
    assert padded.seq_lens == [8, 5, 0, 0, 3, 10, 3]
    assert padded.samples[0].tolist() == [0, 1, 6, 6, 0, 0]
    assert padded.samples[1].tolist() == [3, 1, 2, 4, PADDING_ROW, PADDING_ROW]
    assert padded.tables[:6].tolist() == [[1, 0], [2, 0], [0, 0], [0, 0], [3, 0], [4, 5]]
    for name, array in vars(arrays).items():
        if isinstance(array, np.ndarray):
            assert getattr(padded, name).dtype == array.dtype, name


@pytest.mark.parametrize(("in_pool", "computed"), [(42, 42), (0, 0), (-1, 0)])
def test_an_unknown_token_is_the_one_last_sampled_in_its_row(in_pool, computed):
    """-1 is the sampler's word for unusable logits: what follows is nobody's, but computed."""
    buffers = StepBuffers(1 << 12, torch.device("cpu"))
    buffers.begin()
    pool = torch.tensor([100, 101, 102, in_pool, 104, 105])
    inputs = mixed_arrays().upload(buffers.add)
    assert inputs.input_ids(pool).tolist() == [computed, 9, 5, 6, 7, 11, 12]


def test_the_pool_follows_the_sampler_when_it_grows():
    """More sequences than rows at first: those that were preempted keep theirs."""
    prompts = random_prompts(3, [8] * 6)
    expected = new_engine("m1_basic")
    engine = new_engine("m5_chunked", max_num_seqs=2, max_num_batched_tokens=8)
    pool = engine.model_runner._pool
    before = len(pool.tokens)
    for place, prompt in enumerate(prompts):
        expected.add_request(str(place), prompt, PARAMS)
        engine.add_request(str(place), prompt, PARAMS, priority=-place)
        for _ in range(4):  # each displaces one that was before it
            engine.step()
    outputs, wanted = run_to_end(engine), run_to_end(expected)
    assert all(tokens(output) == tokens(wanted[place]) for place, output in outputs.items())
    assert len(pool.tokens) == engine.model_runner.sampler.num_rows > before

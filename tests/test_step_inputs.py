"""m4's step as arrays of integers: what is padded computes the same numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import TINY_MODELS, new_engine, random_prompts, run_to_end, small_cache

from common.sampling import PADDING_ROW
from common.sampling_params import SamplingParams
from m4_flash.kernels.prefill_plan import round_up
from m4_flash.step_buffers import StepBuffers
from m4_flash.step_inputs import StepArrays

MILESTONE = "m4_flash"
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
    engine = new_engine(MILESTONE, model, **small_cache(MILESTONE, 64))
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

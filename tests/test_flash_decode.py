"""Flash decode on the CPU: Triton in its interpreter, the work list, and refused arguments."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, make_inputs

pytest.importorskip("triton", reason="Triton is not installed")
from decode_cases import (
    EPS,
    FusedCase,
    check_flash_decode,
    check_flash_decode_fused,
    decode,
    plan_for,
)

from m4_flash.kernels import decode_plan
from m4_flash.kernels.decode_plan import TOKEN_UNIT, plan_decode
from m4_flash.kernels.flash_decode import flash_decode_fused

# Triton decides at its first import whether it compiles or interprets, so these run in a child.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_interpreter")


@pytest.fixture(autouse=True)
def many_items(monkeypatch):
    """Short contexts are cut up too, as if the GPU were large and merging cost nothing."""
    monkeypatch.setattr(decode_plan, "PROGRAMS_PER_MULTIPROCESSOR", 32)
    monkeypatch.setattr(decode_plan, "MIN_TOKENS", TOKEN_UNIT)


CASES = [
    Case(),
    Case(head_dim=128, group=1, num_kv_heads=1, block_size=8, lengths=(70, 0)),
    Case(head_dim=80, group=3, num_kv_heads=1, block_size=32, dtype=torch.float16),
    Case(head_dim=16, group=17, num_kv_heads=1, block_size=256, lengths=(65, 300)),
]


@in_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_flash_decode_interpreted(case):
    check_flash_decode(case)


@in_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_fused_interpreted(case, norm):
    check_flash_decode_fused(case, norm=norm)


@in_interpreter
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 260), min_size=1, max_size=4),
    block_size=st.sampled_from([8, 16, 24]),
    group=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_any_batch_interpreted(lengths, block_size, group, seed):
    case = Case(16, 1, group, block_size, lengths=tuple(lengths))
    check_flash_decode(case, seed=seed)
    check_flash_decode_fused(case, seed=seed)


@in_interpreter
def test_an_item_of_the_new_token_alone_interpreted():
    check_flash_decode_fused(Case(head_dim=16, lengths=(TOKEN_UNIT + 1, 1)))


@in_interpreter
def test_an_empty_batch_interpreted():
    case = Case(lengths=())
    inputs = make_inputs(case)
    assert decode(inputs, plan_for(case, inputs)).shape == (0, 4, 64)


@in_interpreter
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=20),
    num_kv_heads=st.sampled_from([1, 8]),
    min_tokens=st.sampled_from([1, 128]),
)
def test_items_cover_each_context_once_interpreted(lengths, num_kv_heads, min_tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_plan, "MIN_TOKENS", min_tokens)
        check_plan(lengths, num_kv_heads)


@in_interpreter
@pytest.mark.parametrize("chunk", [16, 256])
def test_items_of_a_skewed_batch_interpreted(monkeypatch, chunk):
    monkeypatch.setattr(decode_plan, "_CHUNK", chunk)  # sequences looked at in one turn
    check_plan([200] * 32 + [16384] + [200] * 7, 8)


def check_plan(lengths, num_kv_heads):
    plan = plan_decode(torch.tensor(lengths, dtype=torch.int32), 2 * num_kv_heads, num_kv_heads, 64)
    items = plan.items[: plan.num_items.item(), :5].tolist()
    found = {}
    for place, (sequence, begin, end, first, count) in enumerate(items):
        mine = found.setdefault(sequence, [])
        assert place == first + len(mine) and begin % TOKEN_UNIT == 0
        mine.append((begin, end, count))
    assert sorted(found) == list(range(len(lengths)))
    for sequence, mine in found.items():
        begins, ends, counts = zip(*mine, strict=True)
        assert set(counts) == {len(mine)}
        assert begins == (0, *ends[:-1]) and ends[-1] == lengths[sequence]
        assert len(mine) == 1 or all(begin < end for begin, end, _ in mine)
    first_sizes = [end - begin for _, begin, end, _, _ in items if begin == 0]
    assert first_sizes == sorted(first_sizes, reverse=True)
    # Evenly: no item is longer than half as much again as what would be the same for all.
    wanted = max(sum(lengths) / (len(plan.items) - len(lengths)), decode_plan.MIN_TOKENS)
    assert first_sizes[0] <= 1.5 * wanted + TOKEN_UNIT + 2


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_in_interpreter():
    import triton

    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("this Triton's interpreter cannot loop with this NumPy")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        [*command, "-k", "interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " skipped" not in child.stdout, child.stdout


# ---- refused arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lens", "heads"),
    [
        (torch.ones(3, dtype=torch.int64), 4),
        (torch.ones(3, 1, dtype=torch.int32), 4),
        (torch.ones(3, dtype=torch.int32), 5),
    ],
)
def test_lengths_that_cannot_be_planned_are_refused(lens, heads):
    with pytest.raises(ValueError, match=r"context_lens must be \[B\] int32"):
        plan_decode(lens, heads, 2, 64)


@in_interpreter
def test_a_plan_of_another_model_or_batch_is_refused_interpreted():
    case, other = Case(lengths=(5, 3)), Case(group=4, lengths=(5, 3))
    inputs = make_inputs(case)
    with pytest.raises(ValueError, match="make it with this model's shape"):
        decode(inputs, plan_for(other, make_inputs(other)))
    longer = Case(lengths=(5, 3, 1))
    with pytest.raises(ValueError, match="context_lens"):
        decode(inputs, plan_for(longer, make_inputs(longer)))


@in_interpreter
def test_a_rotation_of_the_wrong_shape_is_refused_interpreted():
    fused = FusedCase(Case(lengths=(5, 3)))
    inputs, (cos, sin) = fused.inputs, fused.rotation
    plan = plan_for(fused.case, inputs)
    caches = inputs.k_cache, inputs.v_cache, inputs.block_tables, fused.slot_mapping
    with pytest.raises(ValueError, match=r"cos must be \[2, 1, 64\]"):
        flash_decode_fused(*fused.qkv, None, None, EPS, cos[:, 0], sin, *caches, plan, 1.0)

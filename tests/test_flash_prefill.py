"""Flash prefill on the CPU: its plan, the PyTorch twin, and the Triton kernels interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_cases import Case, check_prefill, make_inputs, twin

from m4_flash.kernels import prefill_plan, prefill_reference
from m4_flash.kernels.prefill_plan import choose_pieces, plan_prefill
from m4_flash.kernels.prefill_tiles import TileShape, tile_shape

# Triton decides at its first import whether it compiles or interprets, so these run in a child.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_in_interpreter")

HEADS = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
SMALL = TileShape(rows=32, keys=16, num_warps=4, num_stages=1, programs=1)

BATCHES = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 60)), min_size=1, max_size=5)
FUZZ = {
    "batch": BATCHES,
    "head_dim": st.sampled_from([16, 24]),
    "block_size": st.sampled_from([8, 16, 24]),
    "group": st.integers(1, 4),
    "seed": st.integers(0, 2**31),
}


def fuzz_case(batch, **shape) -> Case:
    queries, contexts = zip(*batch, strict=True)
    return Case(queries, contexts, num_kv_heads=1, **shape)


# ---- the twin ------------------------------------------------------------------------------------

TWIN_CASES = [
    *[Case(head_dim=d) for d in (16, 80, 128, 256)],
    *[Case(group=g, num_kv_heads=h) for g, h in ((1, 3), (3, 3), (17, 1))],
    *[Case(block_size=b) for b in (8, 32, 256)],
    *[Case(dtype=t) for t in (torch.float16, torch.bfloat16)],
    Case(queries=(1,), contexts=(0,)),
    Case(queries=(700,), contexts=(0,)),
    Case(queries=(600,), contexts=(300,)),
    Case(queries=(1, 1, 1, 40), contexts=(0, 1, 15, 16)),
    Case(queries=(0, 0), contexts=(0, 3)),
    Case(queries=(20, 20, 20), contexts=(0, 5, 0), poisoned=(0, 2)),
]


@pytest.mark.parametrize("case", TWIN_CASES, ids=str)
def test_twin_equals_float64(case):
    check_prefill(twin, case)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_twin_does_not_depend_on_how_queries_are_cut(monkeypatch, block):
    monkeypatch.setattr(prefill_reference, "QUERY_BLOCK", block)
    check_prefill(twin, Case())


@settings(max_examples=30, deadline=None)
@given(**FUZZ)
def test_twin_on_any_batch(batch, seed, **shape):
    check_prefill(twin, fuzz_case(batch, **shape), seed=seed)


# ---- the plan ------------------------------------------------------------------------------------


def covered(case: Case, **options) -> dict[tuple[int, int], list[int]]:
    """By sequence and fresh token: the key tiles its items read, from the plan's records."""
    plan = case.plan(**options)
    items, merges, _ = (part.numpy() for part in plan.parts)
    tokens = plan.shape.rows // case.group
    found: dict[tuple[int, int], list[int]] = {}
    for record in items.reshape(-1, prefill_plan.ITEM_FIELDS):
        sequence, *_, first, last, begin, end, slot, _ = record.tolist()
        assert last - first <= tokens and begin <= end
        assert -1 <= slot < plan.num_slots
        for token in range(first, last):
            found.setdefault((sequence, token), []).extend(range(begin, end))
    by_merge = merges.reshape(-1, prefill_plan.MERGE_FIELDS)
    assert by_merge[:, 3].sum() == plan.num_slots
    return found


@settings(max_examples=100, deadline=None)
@given(batch=BATCHES, group=st.integers(1, 5), gather=st.booleans(), many=st.booleans())
def test_every_token_meets_every_key_once(batch, group, gather, many):
    case = fuzz_case(batch, group=group, head_dim=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_plan, "MIN_KEYS_PER_ITEM", 1)
        patch.setattr(prefill_plan, "MERGE_COST", 0)
        found = covered(case, shape=SMALL, gather=gather, num_multiprocessors=99 if many else 1)
    assert len(found) == sum(case.queries)
    for (sequence, token), tiles in found.items():
        context = case.contexts[sequence]
        wanted = (
            -(-(context + token + 1) // SMALL.keys)
            if gather
            else -(-context // SMALL.keys) - (-(token + 1) // SMALL.keys)
        )
        assert sorted(tiles) == list(range(len(tiles)))
        assert len(tiles) >= wanted


def plan_of(queries, contexts, **options):
    return plan_prefill(
        queries, contexts, "cpu", **{**HEADS, "num_multiprocessors": 132, **options}
    )


def test_the_longest_items_come_first():
    items = plan_of((3000, 100), (0, 5000)).parts[0].view(-1, prefill_plan.ITEM_FIELDS)
    lengths = (items[:, 9] - items[:, 8]).tolist()
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("queries", "contexts", "cut"),
    [
        ((8192,), (0,), False),
        ((512,) * 32, (0,) * 32, False),
        ((512,), (0,), False),
        ((256,), (7936,), True),
        ((1,), (32768,), True),
        ((1,) * 256, (300,) * 255 + (32000,), True),
    ],
)
def test_keys_are_cut_only_where_that_fills_the_gpu(queries, contexts, cut):
    plan = plan_of(queries, contexts, gather=False)
    assert (plan.num_merges > 0) == cut
    items = plan.parts[0].view(-1, prefill_plan.ITEM_FIELDS)
    busy = int((items[:, 9] - items[:, 8]).sum()) / 132 * HEADS["num_kv_heads"]
    longest = int((items[:, 9] - items[:, 8]).max())
    assert longest < max(1.5 * busy, prefill_plan.MIN_KEYS_PER_ITEM / plan.shape.keys + 1)


def test_pieces_are_one_each_without_work():
    assert choose_pieces([], 64, 16) == []


def test_large_tiles_for_long_prompts_and_small_ones_for_short():
    rows = {s: plan_of((s,), (0,)).shape.rows for s in (64, 512, 2048, 16384)}
    assert rows == {64: 64, 512: 64, 2048: 64, 16384: 128}
    # Keys that are read in place come in smaller pieces, and two programs beside each other.
    assert plan_of((256,), (8000,)).shape.rows == 64
    assert plan_of((16,), (8000,), num_heads=128, num_kv_heads=1).shape.rows == 128
    assert plan_of((256,), (8000,)).shape.keys < plan_of((2048,), (8000,)).shape.keys


@pytest.mark.parametrize("generation", [8, 9, 10, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_tile_holds_every_group(generation, dtype, head_dim):
    for group in range(1, 129):
        for large, paged in product((False, True), repeat=2):
            assert tile_shape(generation, large, paged, group, head_dim, dtype).rows >= group


def test_contexts_that_many_queries_share_are_gathered():
    assert plan_of((2048, 1), (5000, 300)).num_keys == 2048 + 1 + 5000
    assert plan_of((256, 1), (5000, 300)).num_copies == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_lens": (3, 4)}, "one length"),
        ({"query_lens": (-1,)}, "at least 0"),
        ({"num_heads": 9}, "evenly"),
        ({"num_heads": 1032, "num_kv_heads": 8}, "at most 128"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(change, message):
    arguments = {"query_lens": (3,), "context_lens": (0,), "device": "cpu", **HEADS}
    plan_prefill(**arguments)
    with pytest.raises(ValueError, match=message):
        plan_prefill(**{**arguments, **change})


# ---- arguments -----------------------------------------------------------------------------------

CASE = Case()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x.half(), "must be .* in the cache's"),
        ("q", lambda x: x[:5], r"q must be \[184"),
        ("q", lambda x: x[:, :3], "multiple of 2"),
        ("k", lambda x: x[:, :1], r"k must be \[184, 2, 64\]"),
        ("v", lambda x: x.mT.contiguous().mT, "contiguous"),
        ("k_cache", lambda x: x.transpose(1, 2), "must both be"),
        ("block_tables", lambda x: x.long(), "int32"),
        ("block_tables", lambda x: x[:2], "2 rows for 5"),
        ("out", lambda x: x.half(), "out must be"),
        ("scale", lambda x: -x, "positive"),
    ],
)
def test_arguments_a_kernel_would_misread_are_refused(name, change, message):
    inputs = make_inputs(CASE)
    arguments = {
        **{field: getattr(inputs, field) for field in ("q", "k", "v", "k_cache", "v_cache")},
        "block_tables": inputs.block_tables,
        "plan": CASE.plan(),
        "scale": inputs.scale,
        "out": torch.empty(inputs.q.shape),
    }
    prefill_plan.check_prefill(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        prefill_plan.check_prefill(**arguments)


# ---- Triton, interpreted -------------------------------------------------------------------------

HALF = torch.float16
OPTIONS = {
    "as planned": {},
    "gathered": {"gather": True},
    "small tiles": {"shape": SMALL},
    "cut": {"shape": SMALL, "num_multiprocessors": 99},
}


@pytest.fixture
def interpreted(monkeypatch):
    from m4_flash.kernels import flash_prefill

    monkeypatch.setattr(prefill_plan, "MIN_KEYS_PER_ITEM", 1)
    monkeypatch.setattr(prefill_plan, "MERGE_COST", 0)
    return flash_prefill


@in_interpreter
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=HALF, queries=(37, 1, 0, 70), contexts=(0, 17, 5, 40), poisoned=(0,)),
        Case((40, 9), (70, 0), head_dim=24, group=3, num_kv_heads=1, block_size=24, dtype=HALF),
    ],
    ids=str,
)
def test_prefill_interpreted(interpreted, monkeypatch, case, options, descriptors):
    monkeypatch.setattr(interpreted, "uses_descriptors", lambda k, v: descriptors)
    check_prefill(interpreted.flash_prefill, case, **options)


@in_interpreter
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float32_interpreted(interpreted, options):
    case = Case((33, 5), (20, 0), head_dim=80, group=1, block_size=8, contiguous=True)
    check_prefill(interpreted.flash_prefill, case, **options)


@in_interpreter
@settings(max_examples=12, deadline=None)
@given(**FUZZ, gather=st.booleans(), multiprocessors=st.sampled_from([1, 20]))
def test_any_batch_interpreted(batch, seed, gather, multiprocessors, **shape):
    from m4_flash.kernels import flash_prefill

    case = fuzz_case(batch, dtype=HALF, **shape)
    options = {"shape": SMALL, "gather": gather, "num_multiprocessors": multiprocessors}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_plan, "MIN_KEYS_PER_ITEM", 1)
        patch.setattr(prefill_plan, "MERGE_COST", 0)
        check_prefill(flash_prefill.flash_prefill, case, seed=seed, **options)


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_triton_in_interpreter():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, np)]
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

"""Flash prefill on a GPU, against float64 and the PyTorch twin."""

from __future__ import annotations

import random

import pytest
import torch
from prefill_cases import Case, check_prefill, make_inputs, twin

from m4_flash.kernels.prefill_plan import PrefillPlan
from m4_flash.kernels.prefill_tiles import TileShape

pytestmark = pytest.mark.gpu

HEAD_SIZES = (16, 64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 4, 8)
BLOCK_SIZES = (8, 16, 24, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RAGGED = {
    "queries": (300, 0, 1, 7, 64, 65, 1000, 128, 1, 1),
    "contexts": (0, 3, 17, 0, 15, 16, 1, 0, 5000, 1),
    "poisoned": (3,),
}
MANY = {"num_multiprocessors": 132}


@pytest.fixture(scope="module")
def flash():
    from m4_flash.kernels import flash_prefill

    return flash_prefill


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_by_head_size_and_group(flash, head_dim, dtype):
    for group in GROUPS:
        case = Case(head_dim=head_dim, group=group, dtype=dtype, **RAGGED)
        check_prefill(flash.flash_prefill, case, "cuda", **MANY)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_by_block_size(flash, block_size, gather):
    case = Case(
        head_dim=128, block_size=block_size, num_kv_heads=3, dtype=torch.bfloat16, **RAGGED
    )
    check_prefill(flash.flash_prefill, case, "cuda", gather=gather, **MANY)


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("descriptors", [True, False])
def test_by_tile(flash, monkeypatch, rows, keys, descriptors):
    if descriptors and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no tensor descriptors")
    monkeypatch.setattr(flash, "uses_descriptors", lambda k, v: descriptors)
    shape = TileShape(rows, keys, rows // 16, 2, programs=1)
    for group in (1, 2, 3):
        case = Case(head_dim=128, group=group, dtype=torch.bfloat16, **RAGGED)
        for gather in (True, False):
            check_prefill(flash.flash_prefill, case, "cuda", shape=shape, gather=gather, **MANY)


@pytest.mark.parametrize("group", [16, 17, 40, 71])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_heads_to_one_kv_head(flash, group, dtype):
    case = Case(group=group, num_kv_heads=1, dtype=dtype, **RAGGED)
    check_prefill(flash.flash_prefill, case, "cuda", **MANY)


@pytest.mark.parametrize("context", [0, 1, 15, 16, 17, 5000])
@pytest.mark.parametrize("length", [*range(1, 17), 63, 64, 65, 127, 128, 129, 2048])
def test_by_length_and_context(flash, length, context):
    case = Case((length,), (context,), head_dim=128, num_kv_heads=8, dtype=torch.bfloat16)
    check_prefill(flash.flash_prefill, case, "cuda", **MANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_any_batch(flash, seed, dtype):
    choose = random.Random(seed)
    batch = choose.randint(1, 40)
    longest = choose.choice((3, 40, 700))
    case = Case(
        tuple(choose.randint(0, longest) for _ in range(batch)),
        tuple(choose.choice((0, choose.randint(0, 2000))) for _ in range(batch)),
        head_dim=choose.choice(HEAD_SIZES),
        group=choose.choice(GROUPS),
        block_size=choose.choice(BLOCK_SIZES),
        dtype=dtype,
        poisoned=(batch // 2,),
        contiguous=choose.random() < 0.5,
    )
    check_prefill(flash.flash_prefill, case, "cuda", seed, **MANY)


def test_equals_the_twin_on_the_same_device(flash):
    case = Case(head_dim=128, **{**RAGGED, "poisoned": ()})
    inputs, plan = make_inputs(case, "cuda"), case.plan("cuda", **MANY)
    wanted = twin(*inputs.arguments(plan))
    out = flash.flash_prefill(*inputs.arguments(plan))
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_is_deterministic(flash):
    case = Case(head_dim=128, dtype=torch.bfloat16, **{**RAGGED, "poisoned": ()})
    inputs, plan = make_inputs(case, "cuda"), case.plan("cuda", **MANY)
    assert plan.num_merges > 0
    first, second = (flash.flash_prefill(*inputs.arguments(plan)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("length", "context"), [(40_000, 0), (32_768, 1000), (2048, 32_768)])
def test_long_prompts_take_little_memory(flash, length, context):
    """Beside inputs and output: gathered keys at most, never a score matrix."""
    case = Case((length,), (context,), head_dim=128, num_kv_heads=2, dtype=torch.bfloat16)
    inputs, plan = make_inputs(case, "cuda"), case.plan("cuda", **MANY)
    out = torch.empty(inputs.q.shape, dtype=case.dtype, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash.flash_prefill(*inputs.arguments(plan), out=out)
    torch.cuda.synchronize()
    key_bytes = 2 * (length + context) * case.num_kv_heads * case.head_dim * 2
    assert torch.cuda.max_memory_allocated() - before <= key_bytes + (64 << 20)
    check_prefill(flash.flash_prefill, case, "cuda", most_rows=96, **MANY)


def test_runs_on_the_current_stream_and_in_a_graph(flash):
    """A kernel on another stream would see the inputs before they are written."""
    case = Case(head_dim=128, dtype=torch.bfloat16, **{**RAGGED, "poisoned": ()})
    inputs, plan = make_inputs(case, "cuda"), case.plan("cuda", **MANY)
    wanted = flash.flash_prefill(*inputs.arguments(plan))
    torch.cuda.synchronize()
    arguments = list(inputs.arguments(plan))
    arguments[0] = torch.zeros_like(inputs.q)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        arguments[0].copy_(inputs.q)
        out = flash.flash_prefill(*arguments)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(out, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flash.flash_prefill(*arguments)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, wanted)


@pytest.mark.parametrize("gather", [True, False])
def test_slots_beyond_32_bit_offsets(flash, gather):
    """In a cache of more than 2**31 elements an offset computed in 32 bits wraps around."""
    case = Case((20,), (60,), head_dim=128, num_kv_heads=8, dtype=torch.bfloat16)
    inputs = make_inputs(case, "cuda")
    plan: PrefillPlan = case.plan("cuda", gather=gather)
    wanted = flash.flash_prefill(*inputs.arguments(plan))
    num_blocks = 2**31 // inputs.k_cache[0].numel() + 4
    shape = (num_blocks, *inputs.k_cache.shape[1:])
    caches = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    last = torch.arange(num_blocks - 4, num_blocks, dtype=torch.int32, device="cuda")[None]
    for cache, small in zip(caches, (inputs.k_cache, inputs.v_cache), strict=True):
        cache[-4:] = small[inputs.block_tables[0, :4].long()]
    q, k, v, scale = inputs.q, inputs.k, inputs.v, inputs.scale
    assert torch.equal(flash.flash_prefill(q, k, v, *caches, last, plan, scale), wanted)



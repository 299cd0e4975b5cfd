"""Flash decode on a GPU, plain and fused, with and without dependent launch, against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from decode_cases import (
    RAGGED,
    FusedCase,
    check_flash_decode,
    check_flash_decode_fused,
    decode,
    plan_for,
)
from kernel_cases import Case, make_inputs

from common.ops.launch import supports_pdl
from m4_flash.kernels import decode_plan, reference
from m4_flash.kernels.decode_plan import plan_decode
from m4_flash.kernels.flash_decode import flash_decode

pytestmark = pytest.mark.gpu

HEAD_SIZES = (16, 64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 4, 7, 8, 16, 17)
BLOCK_SIZES = (8, 16, 24, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PDL = torch.cuda.is_available() and supports_pdl(torch.device("cuda"))
both_launches = pytest.mark.parametrize("pdl", [False, True] if PDL else [False])


@pytest.fixture(params=[check_flash_decode, check_flash_decode_fused], ids=["plain", "fused"])
def check(request):
    return partial(request.param, device="cuda", pdl=PDL)


@pytest.fixture(params=[64, 10**6], ids=["cut", "whole"])
def min_tokens(request, monkeypatch):
    """Every context in as many items as it can be, or in one."""
    monkeypatch.setattr(decode_plan, "MIN_TOKENS", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_head_sizes(check, min_tokens, head_dim, dtype):
    check(Case(head_dim=head_dim, dtype=dtype, lengths=RAGGED))


@pytest.mark.parametrize("group", GROUPS)
def test_groups(check, min_tokens, group):
    case = Case(num_kv_heads=3, group=group, dtype=torch.bfloat16, lengths=RAGGED)
    check(case, pdl=False)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(check, min_tokens, block_size):
    check(Case(head_dim=128, block_size=block_size, dtype=torch.bfloat16, lengths=RAGGED))


@pytest.mark.parametrize("lengths", [(33000, 5), (1,), (0, 0, 3, 0), (5000,) * 20, (257,) * 300])
def test_batches(check, lengths):
    check(Case(dtype=torch.bfloat16, lengths=lengths))


def test_a_long_sequence_among_short_ones(check):
    check(Case(head_dim=128, dtype=torch.bfloat16, lengths=(200,) * 40 + (16384,) + (200,) * 23))


def test_any_batch(check):
    generator = torch.Generator().manual_seed(1)
    for seed in range(20):
        batch = torch.randint(1, 70, (1,), generator=generator).item()
        longest = 2 ** torch.randint(1, 13, (1,), generator=generator).item()
        lengths = torch.randint(0, longest, (batch,), generator=generator).tolist()
        check(Case(head_dim=64, dtype=torch.float16, lengths=tuple(lengths)), seed=seed)


def test_no_norm():
    check_flash_decode_fused(Case(dtype=torch.bfloat16, lengths=RAGGED), "cuda", norm=False)


def test_equals_the_twin_on_the_same_device():
    case = Case(head_dim=128, lengths=RAGGED)
    inputs = make_inputs(case, "cuda")
    wanted = reference.paged_attention(*inputs.arguments())
    torch.testing.assert_close(decode(inputs, plan_for(case, inputs)), wanted, rtol=1e-5, atol=1e-5)


def in_graph(call):
    """``call`` captured: a function that replays it and returns what the capture returned."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    return replay


@both_launches
def test_a_graph_follows_its_lengths(pdl):
    case = Case(head_dim=128, dtype=torch.bfloat16, lengths=(4000, 900, 300, 5000, 70))
    inputs = make_inputs(case, "cuda")

    def step():
        """Three layers, each with the output of the one before as its queries."""
        plan = plan_for(case, inputs)
        x = inputs.q.clone()  # an ordinary kernel between the plan and its first reader
        for _ in range(3):
            x = flash_decode(x, *inputs.arguments()[1:4], plan, inputs.scale, pdl=pdl)
        return x

    replay = in_graph(step)
    batches = ((1, 16, 17, 0, 0), case.lengths, (0, 0, 0, 0, 64), (4000, 0, 0, 5000, 1))
    for lengths in batches:
        inputs.context_lens.copy_(torch.tensor(lengths))
        replayed = replay().clone()
        assert torch.equal(replayed, step())
        assert replayed.isfinite().all()
        assert not replayed[inputs.context_lens == 0].any()


def test_a_graph_of_the_fused_kernel_writes_where_it_is_told():
    case = Case(head_dim=128, dtype=torch.bfloat16, lengths=(400, 90, 3))
    fused = FusedCase(case, "cuda")
    inputs = fused.inputs
    slots = torch.full_like(fused.slot_mapping, -1)
    replay = in_graph(lambda: fused.run(plan_for(case, inputs), slots))
    wanted, wanted_k, wanted_v = fused.expected()
    slots.copy_(fused.slot_mapping)
    out = replay()
    assert (out.double() - wanted).norm() / wanted.norm() < 1.2e-2
    assert torch.equal(inputs.v_cache.flatten(0, 1)[slots], wanted_v)
    keys = inputs.k_cache.flatten(0, 1)[slots]
    assert (keys - wanted_k).float().norm() / wanted_k.float().norm() < 1.2e-2


def test_runs_on_the_current_stream():
    """A kernel on another stream would see the inputs before they are written."""
    case = Case(head_dim=128, lengths=RAGGED)
    inputs = make_inputs(case, "cuda")
    wanted = decode(inputs, plan_for(case, inputs))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        lens = torch.zeros_like(inputs.context_lens)
        torch.cuda._sleep(20_000_000)
        lens.copy_(inputs.context_lens)
        inputs.context_lens = lens
        out = decode(inputs, plan_for(case, inputs))
        torch.cuda.current_stream().synchronize()
    assert torch.equal(out, wanted)


def test_slots_beyond_32_bit_offsets():
    """In a cache of more than 2**31 elements an offset computed in 32 bits wraps around."""
    num_kv_heads, head_dim, block_size = 8, 128, 16
    num_blocks = 2**31 // (block_size * num_kv_heads * head_dim) + 4
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    caches = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    case = Case(head_dim, num_kv_heads, group=2, dtype=torch.bfloat16, lengths=(60,))
    fused = FusedCase(case, "cuda")
    small = fused.inputs
    plan = plan_decode(small.context_lens, 2 * num_kv_heads, num_kv_heads, head_dim)
    old = small.slots[0][:-1]
    far = (num_blocks - 4) * block_size + torch.arange(60, device="cuda")
    for cache, source in zip(caches, (small.k_cache, small.v_cache), strict=True):
        cache.flatten(0, 1)[far[:-1]] = source.flatten(0, 1)[old]
    wanted = fused.run(plan, fused.slot_mapping)
    wanted_key = small.k_cache.flatten(0, 1)[small.slots[0][-1]]

    last = torch.arange(num_blocks - 4, num_blocks, dtype=torch.int32, device="cuda")[None]
    small.k_cache, small.v_cache, small.block_tables = *caches, last
    assert torch.equal(fused.run(plan, far[-1:]), wanted)
    assert torch.equal(caches[0].flatten(0, 1)[far[-1]], wanted_key)
    plain = flash_decode(small.q, *caches, last, plan, small.scale)
    assert plain.isfinite().all()

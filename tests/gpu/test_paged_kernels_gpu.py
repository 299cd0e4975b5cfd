"""The Triton and CUDA kernels on a GPU, against float64 and the PyTorch twin."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import Case, check_attention, check_reshape_and_cache, make_inputs

from m3_paged.kernels import Kernels, cuda_kernels, get_kernels

pytestmark = pytest.mark.gpu

RAGGED = (300, 0, 1, 7, 8, 9, 64, 65, 255, 1000)
HEAD_SIZES = (16, 64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 4, 8)
BLOCK_SIZES = (8, 16, 24, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", params=["triton", "cuda"])
def kernels(request) -> Kernels:
    if request.param == "cuda" and cuda_kernels.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    return get_kernels(request.param, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_attention_by_head_size_and_group(kernels, head_dim, dtype):
    for group, num_splits in itertools.product(GROUPS, (1, 3)):
        case = Case(head_dim=head_dim, group=group, dtype=dtype, lengths=RAGGED)
        check_attention(kernels, case, "cuda", num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_attention_by_block_size(kernels, block_size, dtype):
    case = Case(head_dim=128, block_size=block_size, num_kv_heads=3, dtype=dtype, lengths=RAGGED)
    for num_splits in (1, 2, 7):
        check_attention(kernels, case, "cuda", num_splits=num_splits)


@pytest.mark.parametrize("group", [16, 17, 40])
def test_attention_of_many_heads_to_one_kv_head(kernels, group):
    case = Case(group=group, num_kv_heads=1, dtype=torch.bfloat16, lengths=RAGGED)
    check_attention(kernels, case, "cuda")


@pytest.mark.parametrize("batch", [1, 2, 64, 300])
def test_attention_by_batch_size(kernels, batch):
    lengths = tuple((i * 37 + 5) % 700 for i in range(batch))
    check_attention(kernels, Case(dtype=torch.bfloat16, lengths=lengths), "cuda")
    check_attention(kernels, Case(dtype=torch.bfloat16, lengths=(5000,) * batch), "cuda")


def test_attention_equals_the_twin_on_the_same_device(kernels):
    inputs = make_inputs(Case(head_dim=128, lengths=RAGGED), "cuda")
    wanted = get_kernels("torch", "cuda").paged_attention(*inputs.arguments())
    out = kernels.paged_attention(*inputs.arguments())
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_nothing_past_the_context_is_ever_addressed(kernels):
    """A padded row's whole table is garbage, and so is the tail of every other row."""
    check_attention(kernels, Case(dtype=torch.bfloat16, lengths=(0, 0, 3, 0)), "cuda")


def test_attention_in_a_cuda_graph_follows_its_inputs(kernels):
    case = Case(head_dim=128, dtype=torch.bfloat16, lengths=(40, 900, 300))
    inputs = make_inputs(case, "cuda")
    out = torch.empty(inputs.q.shape, dtype=case.dtype, device="cuda")

    def attend() -> None:
        kernels.paged_attention(*inputs.arguments(), out=out)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for lengths in ((1, 16, 17), (40, 900, 300)):
        inputs.context_lens.copy_(torch.tensor(lengths))
        out.fill_(float("nan"))
        graph.replay()
        replayed = out.clone()
        out.fill_(float("nan"))
        attend()
        assert torch.equal(replayed, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_cache_write(kernels, head_dim, dtype):
    for num_kv_heads, block_size in ((1, 8), (3, 16), (8, 256)):
        case = Case(head_dim, num_kv_heads, group=2, block_size=block_size, dtype=dtype)
        check_reshape_and_cache(kernels, case, "cuda")


def test_kernels_run_on_the_current_stream(kernels):
    """A kernel on another stream would see the inputs before they are written."""
    inputs = make_inputs(Case(head_dim=128, lengths=RAGGED), "cuda")
    wanted = kernels.paged_attention(*inputs.arguments())
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        q = torch.zeros_like(inputs.q)
        torch.cuda._sleep(20_000_000)
        q.copy_(inputs.q)
        out = kernels.paged_attention(q, *inputs.arguments()[1:])
        torch.cuda.current_stream().synchronize()
    assert torch.equal(out, wanted)


def test_slots_beyond_32_bit_offsets(kernels):
    """In a cache of more than 2**31 elements an offset computed in 32 bits wraps around."""
    num_kv_heads, head_dim, block_size = 8, 128, 16
    num_blocks = 2**31 // (block_size * num_kv_heads * head_dim) + 4
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    case = Case(head_dim, num_kv_heads, group=2, dtype=torch.bfloat16, lengths=(60,))
    small = make_inputs(case, "cuda")
    wanted = kernels.paged_attention(*small.arguments())

    last = torch.arange(num_blocks - 4, num_blocks, dtype=torch.int32, device="cuda")[None]
    slots = (num_blocks - 4) * block_size + torch.arange(60, device="cuda")
    keys, values = (
        cache.flatten(0, 1)[small.slots[0]] for cache in (small.k_cache, small.v_cache)
    )
    kernels.reshape_and_cache(keys, values, k_cache, v_cache, slots)
    lens, scale = small.context_lens, small.scale
    out = kernels.paged_attention(small.q, k_cache, v_cache, last, lens, scale)
    assert torch.equal(out, wanted)

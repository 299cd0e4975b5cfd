"""Matrix products of a few rows on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from chain_cases import check_chain
from matmul_cases import Case, check, make_inputs, run

from common.ops.launch import supports_pdl
from common.ops.matmul import Tiling, norm_pays, skinny_linear, skinny_norm_linear

pytestmark = pytest.mark.gpu

ROWS = (1, 2, 8, 9, 16, 17, 32, 33, 64, 128)
SHAPES = ((1000, 576), (576, 1000), (192, 1536))  # no multiples of tiles
MODEL_SHAPES = ((4096, 1024), (1024, 2048), (1024, 3072))
BF16 = torch.bfloat16
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_products(shape, dtype):
    for rows in ROWS:
        check(Case(rows, *shape, dtype, bias=True, silu=True), CUDA)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_products_with_a_norm(shape, dtype):
    for rows in (1, 2, 8, 9, 16):
        check(Case(rows, *shape, dtype, norm=True, residual=True, silu=True), CUDA)


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_products_of_a_model(shape):
    for rows in ROWS:
        check(Case(rows, *shape, BF16), CUDA)
        if norm_pays(rows, *shape, BF16):
            check(Case(rows, *shape, BF16, norm=True), CUDA)


def test_many_features_and_long_rows():
    for rows in (1, 8, 16):
        check(Case(rows, 151936, 1024, BF16), CUDA)
        check(Case(rows, 4096, 12288, BF16), CUDA)
    check(Case(1, 6144, 4096, BF16, norm=True, residual=True, silu=True), CUDA)


@pytest.mark.parametrize("kernel", ["few", "many"])
def test_split_sums_do_not_depend_on_timing(kernel):
    case = Case(8, 1024, 3072, BF16, tiling=Tiling(kernel, 16, 512, 4, 2, splits=6))
    inputs = make_inputs(case, CUDA)
    first = run(case, inputs)[0].clone()
    for _ in range(50):
        assert torch.equal(run(case, inputs)[0], first)


def test_weights_beyond_32_bit_offsets():
    in_features, features = 8192, 2**31 // 8192 + 16
    weight = torch.zeros(features, in_features, dtype=BF16, device=CUDA)
    weight[-1] = 1.0
    for rows in (1, 2, 32):
        y = skinny_linear(torch.ones(rows, in_features, dtype=BF16, device=CUDA), weight)
        assert (y[:, -1] == in_features).all() and (y[:, :-1] == 0).all()


@pytest.mark.parametrize("rows", [1, 8, 16, 32])
def test_kernels_launched_early_wait_for_their_inputs(rows):
    if not supports_pdl(CUDA):
        pytest.skip("needs sm_90")
    torch.manual_seed(0)
    sizes = ((1024, 2048), (6144, 1024), (1024, 3072), (4096, 1024))
    o, gate_up, down, qkv = (torch.randn(n, k).mul_(k**-0.5).to(CUDA, BF16) for n, k in sizes)
    norm_weight = torch.rand(1024).to(CUDA, BF16)

    def layer(x, residual, *, pdl):
        x = skinny_linear(x, o, pdl=pdl)
        if rows <= 16:
            args = (x, residual, norm_weight, 1e-6, gate_up)
            x, residual = skinny_norm_linear(*args, silu_mul=True, pdl=pdl)
        else:
            x = skinny_linear(x, gate_up, silu_mul=True, pdl=pdl)
        x = skinny_linear(x, down, pdl=pdl)
        x = skinny_linear(x, qkv, pdl=pdl)[:, :2048].contiguous()
        return x / x.float().norm(dim=-1, keepdim=True).to(BF16) * 45, residual

    start = torch.randn(rows, 2048).to(CUDA, BF16)
    check_chain([layer], start, start[:, :1024].contiguous())


def test_products_in_a_graph_follow_their_inputs():
    case = Case(20, 1024, 3072, BF16)  # split: the counters are the graph's business, too
    inputs = make_inputs(case, CUDA)
    run(case, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case, inputs)[0]
    for seed in range(3):
        inputs.x.copy_(make_inputs(case, CUDA, seed).x)
        graph.replay()
        assert torch.equal(out, run(case, inputs)[0])

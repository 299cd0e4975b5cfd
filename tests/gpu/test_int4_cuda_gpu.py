"""The CUDA kernel for few rows and 4-bit weights, on a GPU: against float64, and against itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chain_cases import check_int4_chain
from int4_cases import MODEL_SHAPES, Case, make_bias, make_input, make_weight, pack
from matmul_cases import TOLERANCE

from m7_gptq.kernels import int4_cuda
from m7_gptq.kernels.int4_layout import int4_linear_reference, repack_int4

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _ready():
    reason = int4_cuda.kernel.prepare(CUDA)
    if reason:
        pytest.skip(reason)


def run(case: Case, weights, x, bias=None, cut=None):
    return int4_cuda.few_rows_linear(x, weights, bias, pdl=case.pdl, cut=cut)


def check(case: Case, seed: int = 0) -> None:
    """As near to float64 as its dtype allows, near its twin, and twice the same."""
    weight = make_weight(case, CUDA, seed)
    weights, x, bias = pack(case, weight), make_input(case, CUDA, seed), make_bias(case, CUDA)
    y = run(case, weights, x, bias)
    wanted = x.double() @ weight.dequantize().double().T
    wanted = wanted if bias is None else wanted + bias.double()
    for result in (y, int4_linear_reference(x, weights, bias)):
        error = (result.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        # not "max() <=": NaN must fail
        assert (error <= TOLERANCE[case.dtype]).all(), f"relative error {error} of {case}"
    assert torch.equal(run(replace(case, pdl=True), weights, x, bias), y)


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_ragged_products(dtype, group_size):
    for shape in ((1000, 576), (576, 1536), (50, 1000), (136, 4864), (33, 8), (200, 11008)):
        for symmetric in (True, False):
            for rows in range(1, 17):
                check(Case(rows, *shape, group_size, symmetric, bias=True, dtype=dtype))


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_products_of_a_model(shape):
    for symmetric in (True, False):
        for rows in (1, 2, 7, 8, 9, 12, 16):
            check(Case(rows, *shape, 128, symmetric, dtype=BF16))


@pytest.mark.parametrize("shape", [(4096, 12288), (1000, 4096), (96, 2048)], ids=str)
def test_every_cut_gives_the_product(shape):
    at_once = int4_cuda.kernel.require(CUDA).at_once
    for rows in (3, 16):
        case = Case(rows, *shape, dtype=BF16)
        weight = make_weight(case, CUDA)
        weights, x = pack(case, weight), make_input(case, CUDA)
        wanted = x.double() @ weight.dequantize().double().T
        tiles, windows = weights.words.shape[0], weights.words.shape[1] // 2
        cuts = int4_cuda.possible_cuts(rows, tiles, windows, 4, True, at_once)
        assert len(cuts) > 1
        for _, cut in cuts:
            slot = -(-windows // cut.size) * int4_cuda.SLOT_BYTES
            for one in (cut, replace(cut, finishers=1), replace(cut, ahead=1 << 20),
                        replace(cut, shared=3 * slot + 24 * 1024, ahead=1)):  # fmt: skip
                y = run(case, weights, x, cut=one)
                error = (y.double() - wanted).norm() / wanted.norm()
                assert error <= TOLERANCE[BF16], one
                assert torch.equal(run(case, weights, x, cut=one), y)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_scales_in_float32(dtype):
    for rows in (1, 16):
        case = Case(rows, 200, 2048, 64, symmetric=False, dtype=dtype)
        weight = make_weight(case, CUDA)
        weight.scales = weight.scales.float() * (1 + 2**-12)
        weights, x = pack(case, weight), make_input(case, CUDA)
        assert weights.scales.dtype == torch.float32
        wanted = x.double() @ weight.dequantize().double().T
        error = (run(case, weights, x).double() - wanted).norm() / wanted.norm()
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("mean", [1, 10, 100])
def test_a_large_mean_of_x_cancels(dtype, mean):
    """Groups of weights that sum to zero, so that nothing but the mean's rounding could remain."""
    half = torch.randint(1, 16, (256, 6144), device=CUDA)
    codes = torch.stack([half, 16 - half], -1).view(256, 12288)
    ones = torch.ones(256, 96, device=CUDA)
    weights = repack_int4(codes, 8 * ones.int(), ones.half(), 128, dtype)
    x = (torch.randn(8, 12288, device=CUDA) + mean).to(dtype)
    wanted = x.double() @ (codes - 8).double().T
    error = (run(Case(), weights, x).double() - wanted).norm() / wanted.norm()
    assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_results_do_not_depend_on_timing(rows):
    for shape in ((4096, 12288), (1024, 2048)):
        case = Case(rows, *shape, dtype=BF16, pdl=True)
        weights, x = pack(case, make_weight(case, CUDA)), make_input(case, CUDA)
        first = run(case, weights, x)
        for _ in range(100):
            assert torch.equal(run(case, weights, x), first)


def test_a_row_is_the_same_wherever_it_stands():
    case = Case(16, 4096, 4096, dtype=BF16)
    weights, x = pack(case, make_weight(case, CUDA)), make_input(case, CUDA)
    y = run(case, weights, x)
    assert torch.equal(run(case, weights, x.flip(0).contiguous()), y.flip(0))


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_kernels_launched_early_wait_for_their_inputs(rows):
    check_int4_chain(rows, run, CUDA)


def test_products_in_a_graph_follow_their_inputs():
    case = Case(4, 4096, 12288, bias=True, dtype=BF16, pdl=True)
    weights, x = pack(case, make_weight(case, CUDA)), make_input(case, CUDA)
    bias = make_bias(case, CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case, weights, x, bias)
    for seed in range(3):
        x.copy_(make_input(case, CUDA, seed))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, run(case, weights, x, bias))

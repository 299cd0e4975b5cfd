"""Products with 4-bit weights on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from chain_cases import check_int4_chain
from int4_cases import Case, check, make_bias, make_input, make_weight, pack, run

from common.ops.launch import supports_pdl

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
CUDA = torch.device("cuda")
ROWS = (1, 2, 8, 9, 16, 17, 32, 33, 64, 100)
RAGGED = ((1000, 576), (576, 1536), (50, 1000), (136, 4864))
MODEL_SHAPES = (
    (4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072),  # Qwen3-0.6B
    (6144, 4096), (4096, 4096), (4096, 12288),  # Qwen3-8B
)  # fmt: skip


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, -1])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_ragged_products(dtype, group_size):
    for shape in RAGGED:
        for symmetric in (True, False):
            for rows in ROWS:
                check(Case(rows, *shape, group_size, symmetric, bias=True, dtype=dtype), CUDA)


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_products_of_a_model(shape):
    for symmetric in (True, False):
        for rows in ROWS:
            check(Case(rows, *shape, 128, symmetric, dtype=BF16), CUDA)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_tilings_that_nobody_chooses(group_size):
    from m7_gptq.kernels.int4_matmul import Tiling

    for tiling in (
        Tiling(8, 8, 8, splits=4),
        Tiling(8, 2, 4, max_registers=80),
        Tiling(16, 4, 8, splits=3),
        Tiling(8, 2, 4, splits=2, stages=3),
        Tiling(16, 2, 8, splits=3, stages=5),
        Tiling(32, 2, 4, stages=2),
        Tiling(64, 2, 8, splits=2, stages=4),
        Tiling(128, 2, 8, stages=3),
    ):
        for symmetric in (True, False):
            check(Case(70, 1000, 2048, group_size, symmetric, dtype=BF16, tiling=tiling), CUDA)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_dequantized_weights(dtype):
    from m7_gptq.kernels.int4_matmul import dequantize_int4

    for shape in (*RAGGED, (24576, 4096)):
        for group_size in (32, 128, -1):
            for symmetric in (True, False):
                case = Case(1, *shape, group_size, symmetric, dtype=dtype)
                weight = make_weight(case, CUDA)
                packed = pack(case, weight)
                assert torch.equal(dequantize_int4(packed), weight.dequantize().to(dtype))


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_results_do_not_depend_on_timing(rows):
    case = Case(rows, 4096, 12288, symmetric=False, dtype=BF16)  # split among programs
    weights, x = pack(case, make_weight(case, CUDA)), make_input(case, CUDA)
    first = run(case, weights, x).clone()
    for _ in range(50):
        assert torch.equal(run(case, weights, x), first)


def test_a_row_is_the_same_wherever_it_stands():
    """With as many rows in all: the row's neighbours never matter."""
    case = Case(16, 4096, 4096, dtype=BF16)
    weights, x = pack(case, make_weight(case, CUDA)), make_input(case, CUDA)
    y = run(case, weights, x)
    assert torch.equal(run(case, weights, x.flip(0).contiguous()), y.flip(0))


def test_products_in_a_graph_follow_their_inputs():
    for rows in (1, 20):
        case = Case(rows, 4096, 12288, bias=True, dtype=BF16)  # the counters are the graph's, too
        weights, x = pack(case, make_weight(case, CUDA)), make_input(case, CUDA)
        bias = make_bias(case, CUDA)
        run(case, weights, x, bias)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(case, weights, x, bias)
        for seed in range(3):
            x.copy_(make_input(case, CUDA, seed))
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, run(case, weights, x, bias))


@pytest.mark.parametrize("rows", [1, 8, 16, 40])
def test_kernels_launched_early_wait_for_their_inputs(rows):
    if not supports_pdl(CUDA):
        pytest.skip("needs sm_90")
    check_int4_chain(rows, run, CUDA)


def test_one_way_is_as_exact_as_the_other():
    """Many rows: in one product or two, each within the rounding of its dtype."""
    from m7_gptq.kernels.int4_matmul import dequantize_int4

    case = Case(300, 4096, 4096, symmetric=False, dtype=BF16)
    weight, x = make_weight(case, CUDA), make_input(case, CUDA)
    packed = pack(case, weight)
    wanted = x.double() @ weight.dequantize().double().T
    for y in (run(case, packed, x), F.linear(x, dequantize_int4(packed))):
        assert (y.double() - wanted).norm() <= 8e-3 * wanted.norm()


def test_an_unsplit_product_needs_no_counters_and_no_memory_but_its_result():
    case = Case(1, 4096, 4096, dtype=BF16)
    weights, x = pack(case, make_weight(case, CUDA)), make_input(case, CUDA)
    run(case, weights, x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = run(case, weights, x)
    assert torch.cuda.max_memory_allocated() - before <= -(-y.nbytes // 512) * 512

"""The CUDA kernel for more rows and 4-bit weights, on a Hopper GPU: against float64 and itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chain_cases import check_int4_chain
from int4_cases import MODEL_SHAPES, Case, Quantized, make_bias, make_input, make_weight, pack
from matmul_cases import TOLERANCE, guarded
from torch import Tensor

from m7_gptq.kernels import int4_wgmma
from m7_gptq.kernels.cuda_library import SIZES, product_arguments
from m7_gptq.kernels.int4_layout import Int4Weights
from m7_gptq.kernels.int4_wgmma import MOST_GROUPS, Cut, choose_cut, possible_cuts

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
CUDA = torch.device("cuda")
ROUNDING = {BF16: 2**-8, FP16: 2**-11}  # relative, of a number: all that a result may lack
RAGGED = ((1000, 1000), (576, 1536), (50, 1000), (136, 4864), (33, 136), (200, 11008), (40, 200))


@pytest.fixture(autouse=True)
def _ready():
    reason = int4_wgmma.kernel.prepare(CUDA)
    if reason:
        pytest.skip(reason)


def run(case: Case, weights: Int4Weights, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return int4_wgmma.many_rows_linear(x, weights, bias, pdl=case.pdl, next_at_once=case.pdl)


class Example:
    """A weight, x with all the rows of a case, and what some or all of them give."""

    def __init__(self, case: Case, weight: Quantized | None = None) -> None:
        weight = weight or make_weight(case, CUDA)
        self.case = case
        self.weights, self.x, self.bias = pack(case, weight), make_input(case, CUDA), None
        exact = weight.dequantize()
        self.wanted = [self.x.double() @ w.double().T for w in (exact, exact.to(case.dtype))]
        if case.bias:
            self.bias = make_bias(case, CUDA)
            self.wanted = [y + self.bias.double() for y in self.wanted]

    @property
    def stages(self) -> int:
        return self.weights.words.shape[1] * 64 // int4_wgmma.STAGE_INPUTS

    def run(self, rows: int, cut: Cut | None = None) -> Tensor:
        x = guarded(self.x[:rows])
        return int4_wgmma.many_rows_linear(x, self.weights, self.bias, cut=cut)

    def check(self, rows: int, cut: Cut | None = None) -> Tensor:
        """As near to float64 as its dtype allows, and twice the same; returns it.

        From each number of the weight rounded once there is but the result's rounding.
        """
        y = self.run(rows, cut)
        assert y.shape == (rows, self.case.features) and y.dtype == self.case.dtype
        limits = TOLERANCE[y.dtype], ROUNDING[y.dtype]
        for wanted, limit in zip(self.wanted, limits, strict=True):
            error = (y.double() - wanted[:rows]).norm(dim=-1) / wanted[:rows].norm(dim=-1)
            # not "max() <=": NaN must fail
            assert (error <= limit).all(), f"{error.max():.2e} of {self.case}, {rows} rows, {cut}"
        for at_once in (False, True):
            early = int4_wgmma.many_rows_linear(
                self.x[:rows], self.weights, self.bias, pdl=True, next_at_once=at_once, cut=cut
            )
            assert torch.equal(early, y), (rows, cut, at_once)
        return y

    def all_cuts(self) -> list[Cut]:
        """Those too that are slow, or that nobody chooses for so many rows."""
        return [
            Cut(tokens, groups, split)
            for tokens, most in MOST_GROUPS.items()
            for groups in range(1, most + 1)
            for split in SIZES
            if split <= self.stages
        ]


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_ragged_products(dtype, group_size):
    for shape in RAGGED:
        for symmetric in (True, False):
            example = Example(Case(1000, *shape, group_size, symmetric, bias=True, dtype=dtype))
            for rows in (1, 9, 17, 31, 33, 64, 100, 129, 256, 300, 1000):
                example.check(rows)


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_products_of_a_model(shape):
    most = 5000 if shape == (6144, 4096) else 2048
    for symmetric in (True, False):
        example = Example(Case(most, *shape, 128, symmetric, dtype=BF16))
        for rows in sorted({17, 32, 64, 128, 256, 512, 2048, most}):
            example.check(rows)


@pytest.mark.parametrize(
    "case",
    [
        Case(300, 4096, 12288, dtype=BF16),
        Case(300, 1000, 4096, 32, symmetric=False, bias=True, dtype=FP16),
        Case(300, 96, 2048, 64, symmetric=False, dtype=BF16),
        Case(300, 50, 1000, bias=True, dtype=FP16),
    ],
    ids=str,
)
def test_every_cut_gives_the_product(case):
    example = Example(case)
    at_once = int4_wgmma.kernel.require(CUDA).at_once
    sizes = (example.weights.words.shape[0], example.stages, at_once)
    for rows in (17, 300):
        cuts, chosen = example.all_cuts(), choose_cut(rows, *sizes)
        possible = [cut for _, cut in possible_cuts(rows, *sizes)]
        assert chosen in possible and set(possible) <= set(cuts)
        for cut in cuts:
            y = example.check(rows, cut)
            assert torch.equal(example.run(rows, cut), y), cut
            if cut == chosen:
                assert torch.equal(example.run(rows), y)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_in_float32(dtype, symmetric):
    """With a part for each window, and zero points: nothing takes more shared memory."""
    case = Case(300, 200, 2048, 32, symmetric, dtype=dtype)
    weight = make_weight(case, CUDA)
    weight.scales = weight.scales.float() * (1 + 2**-12)
    example = Example(case, weight)
    assert example.weights.scales.dtype == torch.float32
    for cut in (None, *example.all_cuts()):
        example.check(300, cut)


def test_a_row_is_the_same_wherever_it_stands():
    """By the same cut: in another place, in another tile, in other company."""
    example = Example(Case(300, 1000, 4096, dtype=BF16))
    for cut in (None, Cut(32, 4), Cut(64, 2, 4), Cut(128, 3), Cut(256, 2, 2)):
        y = example.run(300, cut)
        for move in (lambda rows: rows.flip(0), lambda rows: rows.roll(77, 0)):
            x = guarded(move(example.x))
            moved = int4_wgmma.many_rows_linear(x, example.weights, cut=cut)
            assert torch.equal(moved, move(y)), cut
        if cut is not None:
            for rows in (1, 17, 65, 130):
                assert torch.equal(example.run(rows, cut), y[:rows])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_depends_on_itself_only(value):
    example = Example(Case(300, 1000, 1000, symmetric=False, dtype=BF16))
    for rows, row in ((17, 3), (100, 99), (300, 128)):
        y = example.run(rows)
        x = guarded(example.x[:rows])
        x[row, -1] = value
        changed = int4_wgmma.many_rows_linear(x, example.weights)
        kept = torch.arange(rows, device=CUDA) != row
        assert torch.equal(changed[kept], y[kept])
        assert not changed[row].isfinite().any()


@pytest.mark.parametrize("shape", [(50, 1000), (1001, 1536), (136, 4864), (8, 136)], ids=str)
def test_nothing_is_written_beside_the_result(shape):
    example = Example(Case(300, *shape, dtype=BF16))
    launch, at_once = int4_wgmma.kernel.launch, int4_wgmma.kernel.require(CUDA).at_once
    for rows in (1, 17, 100, 300):
        for cut in (Cut(32, 4), Cut(64, 1), Cut(128, 3), Cut(256, 2), Cut(64, 2, 2)):
            if cut.split > example.stages:
                continue
            x = guarded(example.x[:rows])
            whole = torch.full((64 + rows * shape[0] + 4096,), 7.0, dtype=BF16, device=CUDA)
            y = whole[64:-4096].view(rows, shape[0])
            given = product_arguments(x, example.weights, None, y)
            launch(CUDA, *given, cut.tokens, cut.groups, cut.split, at_once[0], False, False)
            assert torch.equal(y, example.run(rows, cut)), (rows, cut)
            assert (whole[:64] == 7).all() and (whole[-4096:] == 7).all(), (rows, cut)


@pytest.mark.parametrize("rows", [17, 256])
@pytest.mark.parametrize("shape", [(4096, 12288), (1024, 2048)], ids=str)
def test_results_do_not_depend_on_timing(shape, rows):
    case = Case(rows, *shape, symmetric=False, dtype=BF16, pdl=True)
    weights, x = pack(case, make_weight(case, CUDA)), make_input(case, CUDA)
    first = run(case, weights, x)
    for _ in range(100):
        assert torch.equal(run(case, weights, x), first)


@pytest.mark.parametrize("rows", [9, 64, 300])
def test_kernels_launched_early_wait_for_their_inputs(rows):
    check_int4_chain(rows, run, CUDA)


@pytest.mark.parametrize("rows", [20, 400])
def test_products_in_a_graph_follow_their_inputs(rows):
    case = Case(rows, 4096, 12288, bias=True, dtype=BF16, pdl=True)
    weights, x = pack(case, make_weight(case, CUDA)), make_input(case, CUDA)
    bias = make_bias(case, CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case, weights, x, bias)
    for seed in range(3):
        x.copy_(make_input(case, CUDA, seed))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, run(replace(case, pdl=False), weights, x, bias))


def test_cuts_that_there_are_not_are_refused():
    example = Example(Case(100, 96, 2048, dtype=BF16))
    bad = (Cut(48, 1), Cut(64, 0), Cut(64, 5), Cut(256, 3), *(Cut(64, 1, n) for n in (0, 3, 16)))
    for cut in bad:
        with pytest.raises(RuntimeError, match="could not be launched: invalid configuration"):
            example.run(100, cut)
    example.check(100)

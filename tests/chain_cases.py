"""Chains of kernels whose every link reads what the one before has just written, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from int4_cases import Case, make_weight, pack
from torch import Tensor

from common.ops.norm import rms_norm

Link = Callable[..., tuple[Tensor, ...]]  # (*values, pdl=) -> the next link's values


def check_chain(links: Sequence[Link], *start: Tensor) -> None:
    """Kernels launched early wait for their inputs: the first value is the same, in a graph too."""

    def chain(pdl: bool) -> Tensor:
        values = start
        for _ in range(20):
            for link in links:
                values = link(*values, pdl=pdl)
        return values[0]

    wanted = chain(pdl=False)
    assert wanted.isfinite().all()
    for _ in range(5):
        assert torch.equal(chain(pdl=True), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(pdl=True)
    for _ in range(5):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, wanted)


def check_int4_chain(rows: int, product: Callable[..., Tensor], device: torch.device) -> None:
    """``check_chain`` of 4-bit products in bfloat16, a norm before each.

    product: (case, weights, x) -> y, by a kernel that begins early where ``case.pdl`` says so.
    """

    def link(case: Case) -> Link:
        weights = pack(case, make_weight(case, device))
        ones = torch.ones(case.in_features, dtype=case.dtype, device=device)

        def apply(x: Tensor, *, pdl: bool) -> tuple[Tensor, ...]:
            x = rms_norm(x[:, : case.in_features].contiguous(), ones, 1e-6, pdl=pdl)
            return (product(replace(case, pdl=pdl), weights, x),)

        return apply

    shapes = ((1024, 2048), (6144, 1024), (1024, 3072), (4096, 1024))
    links = [link(Case(rows, *shape, 64, False, dtype=torch.bfloat16)) for shape in shapes]
    check_chain(links, torch.randn(rows, 2048).to(device, torch.bfloat16))

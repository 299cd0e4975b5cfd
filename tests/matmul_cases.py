"""Inputs and expected results for the matrix products of a decode step, on any device.

What lies around the inputs in memory is NaN: a program that reads past an end shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops.matmul import Tiling, skinny_linear, skinny_norm_linear

EPS = 1e-5
# Relative error of a row in the norm: of the result's rounding and the normalised input's.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    rows: int = 1
    features: int = 48  # with silu: gate and up together
    in_features: int = 64
    dtype: torch.dtype = torch.float32
    norm: bool = False
    residual: bool = False  # with a norm
    bias: bool = False
    silu: bool = False
    tiling: Tiling | None = None
    pdl: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("norm", "residual", "bias", "silu") if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"M{self.rows}-N{self.features}-K{self.in_features}"
        tiling = "" if self.tiling is None else f"{self.tiling.kernel}-splits{self.tiling.splits}"
        return "-".join(filter(None, [sizes, dtype, *flags, tiling]))


@dataclass
class Inputs:
    x: Tensor
    residual: Tensor | None
    norm_weight: Tensor
    weight: Tensor
    bias: Tensor | None


def guarded(values: Tensor) -> Tensor:
    """A copy with NaN before and behind it, and a start that suits vector loads."""
    whole = values.new_full((values.numel() + 64,), float("nan"))
    copy = whole[32:-32].view(values.shape)
    return copy.copy_(values)


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    torch.manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return guarded(torch.randn(shape).to(device, case.dtype))

    return Inputs(
        x=random(case.rows, case.in_features),
        residual=random(case.rows, case.in_features) if case.residual else None,
        norm_weight=random(case.in_features),
        weight=random(case.features, case.in_features),
        bias=random(case.features) if case.bias else None,
    )


def expected(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(y in float64, x + residual in the dtype)."""
    total = inputs.x if inputs.residual is None else inputs.x + inputs.residual
    x = total.double()
    if case.norm:
        x = F.rms_norm(x, x.shape[-1:], inputs.norm_weight.double(), EPS)
    y = F.linear(x, inputs.weight.double(), None if inputs.bias is None else inputs.bias.double())
    if case.silu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y, total


def run(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    options = {"silu_mul": case.silu, "pdl": case.pdl, "tiling": case.tiling}
    x, residual, norm_weight, weight, bias = vars(inputs).values()
    if case.norm:
        return skinny_norm_linear(x, residual, norm_weight, EPS, weight, bias, **options)
    return skinny_linear(x, weight, bias, **options), x


def check(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> None:
    inputs = make_inputs(case, device, seed)
    y, total = run(case, inputs)
    wanted, wanted_total = expected(case, inputs)
    assert torch.equal(total, wanted_total)
    assert y.shape == wanted.shape and y.dtype == case.dtype
    error = (y.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert (error <= TOLERANCE[case.dtype]).all(), f"relative error {error.max():.2e} of {case}"

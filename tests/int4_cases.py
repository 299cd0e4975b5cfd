"""Inputs and expected results for products with 4-bit weights, on any device.

What lies around the inputs in memory is NaN: a program that reads past an end shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from matmul_cases import TOLERANCE, guarded
from torch import Tensor

from m7_gptq.kernels.int4_layout import Int4Weights, int4_linear_reference, repack_int4

MODEL_SHAPES = (
    (4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072),  # Qwen3-0.6B
    (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288),  # Qwen3-8B
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    rows: int = 1
    features: int = 48
    in_features: int = 512
    group_size: int = 128
    symmetric: bool = True
    bias: bool = False
    dtype: torch.dtype = torch.float16
    tiling: object | None = None
    pdl: bool = False

    def __str__(self) -> str:
        sizes = f"M{self.rows}-N{self.features}-K{self.in_features}-g{self.group_size}"
        flags = ["sym" if self.symmetric else "asym", "bias" if self.bias else ""]
        if self.tiling is not None:
            how = self.tiling
            flags.append(f"m{how.tile_m}-t{how.tiles}-w{how.warps}-s{how.splits}-g{how.stages}")
        return "-".join(filter(None, [sizes, *flags]))


@dataclass
class Quantized:
    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group_size: int

    def dequantize(self) -> Tensor:
        """float32 [N, K]: the formula."""
        size = self.codes.shape[1] if self.group_size == -1 else self.group_size
        group = torch.arange(self.codes.shape[1], device=self.codes.device) // size
        return (self.codes.float() - self.zeros[:, group]) * self.scales[:, group].float()


def make_weight(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Quantized:
    torch.manual_seed(seed)
    shape = (case.features, case.in_features)
    groups = 1 if case.group_size == -1 else -(-case.in_features // case.group_size)
    zeros = torch.full((case.features, groups), 8, device=device)
    if not case.symmetric:
        zeros = torch.randint(16, zeros.shape, device=device)
    scales = (torch.rand(zeros.shape, device=device) + 0.5) * case.in_features**-0.5
    codes = torch.randint(16, shape, dtype=torch.uint8, device=device)
    return Quantized(codes, zeros, scales.half(), case.group_size)


def pack(case: Case, weight: Quantized) -> Int4Weights:
    packed = repack_int4(weight.codes, weight.zeros, weight.scales, weight.group_size, case.dtype)
    zeros = None if packed.zeros is None else guarded(packed.zeros)
    return replace(packed, scales=guarded(packed.scales), zeros=zeros)


def make_input(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    torch.manual_seed(seed + 1)
    return guarded(torch.randn(case.rows, case.in_features, device=device).to(case.dtype))


def make_bias(case: Case, device: torch.device | str = "cpu") -> Tensor | None:
    return guarded(torch.randn(case.features).to(device, case.dtype)) if case.bias else None


def run(case: Case, weights: Int4Weights, x: Tensor, bias: Tensor | None = None) -> Tensor:
    from m7_gptq.kernels.int4_matmul import int4_linear

    return int4_linear(x, weights, bias, pdl=case.pdl, tiling=case.tiling)


def check(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> None:
    """The kernel is as near to float64 as its dtype allows, and near its twin."""
    weight = make_weight(case, device, seed)
    weights, x, bias = pack(case, weight), make_input(case, device, seed), make_bias(case, device)
    y = run(case, weights, x, bias)
    wanted = x.double() @ weight.dequantize().double().T
    wanted = wanted if bias is None else wanted + bias.double()
    assert y.shape == wanted.shape and y.dtype == case.dtype
    for result in (y, int4_linear_reference(x, weights, bias)):
        error = (result.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        # not "max() <=": NaN must fail
        assert (error <= TOLERANCE[case.dtype]).all(), f"relative error {error} of {case}"

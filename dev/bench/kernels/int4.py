"""Suite ``int4``: products with weights of 4 bits, in few rows and in many.

Speed is against the library's product with the same weight in the dtype; GB/s are of the 4-bit
weight, its scales and zero points, x and y, whoever multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dev.bench.kernels.named import NamedCase
from dev.bench.kernels.setting import Setting
from dev.bench.kernels.suite import Subject
from dev.bench.kernels.timing import Call
from dev.bench.roofline import Cost
from m7_gptq.kernels.int4_layout import Int4Weights, int4_linear_reference, repack_int4, unpack_int4

KINDS = ("int4", "int4_asymmetric")
MANY_ROWS = 64  # from which it is worth asking whether dequantizing first is faster
FUSED_ROWS = 1024  # up to which it is worth asking whether it is not

# [N, K] of Qwen3-8B (qkv, o, gate_up, down) and of Qwen3-0.6B.
SHAPES = ("6144x4096", "4096x4096", "24576x4096", "4096x12288",
          "4096x1024", "1024x2048", "6144x1024", "1024x3072")
ROWS = (1, 2, 4, 8, 16, 32, 64, 512, 2048)


@dataclass(frozen=True)
class Product:
    """x ``[M, K]``; the weight ``[N, K]``, in 4 bits and in the dtype of x."""

    x: Tensor
    packed: Int4Weights
    weight: Tensor


class Int4Suite:
    """``torch``: the weight in the dtype; ``int4``: unpacked on the way, by Triton; ``cuda``: the
    same by the CUDA kernels; ``dequantized``: first."""

    name: ClassVar[str] = "int4"
    default_cases: ClassVar[dict[str, tuple[str, ...]]] = {
        "cuda": (
            *(f"int4:{rows}x{shape}x128" for shape in SHAPES for rows in ROWS),
            *(f"int4_asymmetric:{rows}x24576x4096x{g}" for g in (128, 32) for rows in (1, 16)),
        ),
        "cpu": ("int4:1x1024x512x128", "int4_asymmetric:8x1024x512x32"),
    }

    def __init__(self, setting: Setting, backends: Sequence[str] = ()) -> None:
        """``backends``: "triton" or "cuda", what is not PyTorch's; all unless there are some."""
        self.setting = setting
        self._backends = backends or ("triton", "cuda")

    def parse(self, text: str) -> NamedCase:
        return NamedCase.parse(text, KINDS, "MNKG")

    def cost(self, case: NamedCase) -> Cost:
        """Half a byte a weight, a scale and perhaps a zero point a group; x and y."""
        rows, out_features, in_features, group = case.sizes
        groups = out_features * -(-in_features // group)
        size = self.setting.dtype.itemsize
        per_group = 2 + (size if case.measure == "int4_asymmetric" else 0)
        weight = out_features * in_features // 2 + groups * per_group
        numbers = rows * (in_features + out_features)
        return Cost(weight + numbers * size, 2 * rows * out_features * in_features)

    def inputs(self, case: NamedCase) -> list[Product]:
        rows, out_features, in_features, group = case.sizes
        setting, device = self.setting, self.setting.device
        groups = -(-in_features // group)

        def integers(*shape: int) -> Tensor:
            return torch.randint(16, shape, dtype=torch.uint8, device=device)

        def product() -> Product:
            zeros = integers(out_features, groups)
            if case.measure == "int4":
                zeros.fill_(8)
            scales = torch.rand(out_features, groups, device=device).mul_(in_features**-0.5)
            packed = repack_int4(
                integers(out_features, in_features), zeros, scales.half(), group, setting.dtype
            )
            weight = unpack_int4(packed).to(setting.dtype)
            return Product(setting.random(rows, in_features), packed, weight)

        return [product() for _ in range(setting.copies(self.cost(case).bytes))]

    def subjects(self, case: NamedCase) -> Iterable[Subject]:
        rows = case.sizes[0]
        yield _subject("torch", lambda one: F.linear(one.x, one.weight))
        if not self.setting.on_gpu:
            yield _subject("int4", lambda one: int4_linear_reference(one.x, one.packed))
            return
        from m7_gptq.kernels import int4_cuda, int4_wgmma
        from m7_gptq.kernels.int4_matmul import dequantize_int4, int4_linear

        early = self.setting.starts_early(rows)
        if rows <= int4_cuda.MAX_ROWS:
            kernel, in_cuda = int4_cuda.kernel, partial(int4_cuda.few_rows_linear, pdl=early)
        else:
            kernel = int4_wgmma.kernel
            in_cuda = partial(int4_wgmma.many_rows_linear, pdl=True, next_at_once=early)
        if "cuda" in self._backends and kernel.prepare(self.setting.device) is None:
            yield _subject("cuda", lambda one: in_cuda(one.x, one.packed))
        if "triton" not in self._backends:
            return
        if rows <= FUSED_ROWS:
            yield _subject("int4", lambda one: int4_linear(one.x, one.packed, pdl=early))
        if rows >= MANY_ROWS:
            scratch = torch.empty(
                case.sizes[1:3], dtype=self.setting.dtype, device=self.setting.device
            )
            yield _subject(
                "dequantized", lambda one: F.linear(one.x, dequantize_int4(one.packed, scratch))
            )


def _subject(name: str, operation: Callable[[Product], Tensor]) -> Subject:
    def calls(inputs: Sequence[Product]) -> list[Call]:
        return [partial(operation, one) for one in inputs]

    return Subject(name, calls)

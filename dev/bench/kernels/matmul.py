"""Suite ``matmul``: the products of a decode step, few rows times a large weight.

``norm_linear`` is add + norm + product, ``norm_gate_up`` the same with silu(gate) * up behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from common.layers import Ops
from dev.bench.kernels.named import NamedCase
from dev.bench.kernels.setting import EPS, Setting
from dev.bench.kernels.suite import Subject
from dev.bench.kernels.timing import Call
from dev.bench.roofline import Cost

# [N, K] of Qwen3-0.6B (qkv, o, down, lm_head; gate_up below) and of Qwen3-8B.
LINEAR = ("4096x1024", "1024x2048", "6144x1024", "1024x3072", "151936x1024",
          "6144x4096", "4096x4096", "24576x4096", "4096x12288")
NORM_LINEAR = ("4096x1024", "6144x4096")
NORM_GATE_UP = ("6144x1024", "24576x4096")


def _cases(rows: Sequence[int], norm_rows: Sequence[int]) -> tuple[str, ...]:
    return tuple(
        f"{name}:{m}x{shape}"
        for name, shapes, counts in (
            ("linear", LINEAR, rows),
            ("norm_linear", NORM_LINEAR, norm_rows),
            ("norm_gate_up", NORM_GATE_UP, norm_rows),
        )
        for shape in shapes
        for m in counts
    )


@dataclass(frozen=True)
class Product:
    """x, residual ``[M, K]``, the norm's weight ``[K]`` and the weight ``[N, K]``."""

    x: Tensor
    residual: Tensor
    norm_weight: Tensor
    weight: Tensor


class MatmulSuite:
    """``torch``: cuBLAS between plain operations; ``fused``: between ours; ``skinny``: all ours."""

    name: ClassVar[str] = "matmul"
    default_cases: ClassVar[dict[str, tuple[str, ...]]] = {
        "cuda": _cases((1, 8, 16, 32, 64, 128), (1, 8, 16, 32, 64)),
        "cpu": ("linear:1x1024x512", "norm_linear:8x1024x512", "norm_gate_up:8x1024x512"),
    }

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def parse(self, text: str) -> NamedCase:
        return NamedCase.parse(text, ("linear", "norm_linear", "norm_gate_up"), "MNK")

    def cost(self, case: NamedCase) -> Cost:
        """The weight, what goes in and what comes out, once each."""
        rows, out_features, in_features = case.sizes
        numbers = out_features * in_features + rows * (in_features + out_features)
        if case.measure == "norm_gate_up":
            numbers -= rows * out_features // 2
        if case.measure != "linear":
            numbers += 2 * rows * in_features  # the residual, read and written
        return Cost(
            numbers * self.setting.dtype.itemsize, 2 * rows * out_features * in_features
        )

    def inputs(self, case: NamedCase) -> list[Product]:
        (rows, out_features, in_features), random = case.sizes, self.setting.random
        return [
            Product(
                random(rows, in_features),
                random(rows, in_features),
                random(in_features),
                self.setting.weight(out_features, in_features),
            )
            for _ in range(self.setting.copies(self.cost(case).bytes))
        ]

    def subjects(self, case: NamedCase) -> Iterable[Subject]:
        plain = Plain(Ops())
        yield _subject("torch", plain, case.measure)
        if self.setting.on_gpu:
            from common.ops.fused import FusedOps

            rows, early = case.sizes[0], self.setting.starts_early(case.sizes[0])
            if case.measure != "linear":
                yield _subject("fused", Plain(FusedOps()), case.measure)
            if rows <= _max_rows():
                yield _subject("skinny", Skinny(early), case.measure)


class Plain:
    """The library's product between some operations."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def linear(self, one: Product) -> Tensor:
        return F.linear(one.x, one.weight)

    def norm_linear(self, one: Product) -> tuple[Tensor, Tensor]:
        y, total = self._ops.add_rms_norm(one.x, one.residual, one.norm_weight, EPS)
        return F.linear(y, one.weight), total

    def norm_gate_up(self, one: Product) -> tuple[Tensor, Tensor]:
        gate_up, total = self.norm_linear(one)
        return self._ops.silu_mul(gate_up), total


class Skinny:
    """Our products; the norm is part of them where `common.ops.matmul` says that it pays."""

    def __init__(self, early: bool) -> None:
        self._early = early

    def linear(self, one: Product) -> Tensor:
        from common.ops.matmul import skinny_linear

        return skinny_linear(one.x, one.weight, pdl=self._early)

    def norm_linear(self, one: Product, *, silu_mul: bool = False) -> tuple[Tensor, Tensor]:
        from common.ops import matmul
        from common.ops.norm import add_rms_norm

        if matmul.norm_pays(len(one.x), *one.weight.shape, one.x.dtype):
            return matmul.skinny_norm_linear(
                one.x, one.residual, one.norm_weight, EPS, one.weight, silu_mul=silu_mul,
                pdl=self._early,
            )  # fmt: skip
        y, total = add_rms_norm(one.x, one.residual, one.norm_weight, EPS, pdl=self._early)
        y = matmul.skinny_linear(y, one.weight, silu_mul=silu_mul, pdl=self._early)
        return y, total

    def norm_gate_up(self, one: Product) -> tuple[Tensor, Tensor]:
        return self.norm_linear(one, silu_mul=True)


def _max_rows() -> int:
    from common.ops.matmul import MAX_ROWS

    return MAX_ROWS


def _subject(name: str, operations: Plain | Skinny, operation: str) -> Subject:
    def calls(inputs: Sequence[Product]) -> list[Call]:
        return [partial(getattr(operations, operation), one) for one in inputs]

    return Subject(name, calls)

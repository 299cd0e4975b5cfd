"""Suite ``ops``: the small operations of a layer, bound by memory or by their own start."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from common.layers import Ops
from dev.bench.kernels.named import NamedCase
from dev.bench.kernels.setting import EPS, Setting
from dev.bench.kernels.suite import Subject
from dev.bench.kernels.timing import Call
from dev.bench.roofline import Cost
from m3_paged.kernels import ReshapeAndCache, get_kernels

Arguments = tuple[Tensor | float, ...]


def _norm_arguments(setting: Setting, rows: int) -> Arguments:
    width = setting.hidden_size
    return (setting.random(rows, width), setting.random(rows, width), setting.random(width), EPS)


def _gate_arguments(setting: Setting, rows: int) -> Arguments:
    return (setting.random(rows, 2 * setting.intermediate_size),)


def _rope_arguments(setting: Setting, rows: int) -> Arguments:
    pool = setting.pool
    slots = torch.randperm(pool.num_blocks * pool.block_size)[:rows].to(setting.device)
    weights = setting.random(setting.head_dim), setting.random(setting.head_dim)
    return (*setting.packed_qkv(rows), *weights, EPS, *setting.rotation(rows),
            pool.keys, pool.values, slots)


def _plain_qk_norm_rope(
    q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | float
) -> tuple[Tensor, Tensor]:
    *norm_and_rotation, keys, values, slots = rest
    q, k = Ops().qk_norm_rope(q, k, *norm_and_rotation)
    _cache_writer(keys.device)(k, v, keys, values, slots)
    return q, k


@cache
def _cache_writer(device: torch.device) -> ReshapeAndCache:
    return get_kernels("auto", device).reshape_and_cache


def _fused(name: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The operation of ``common.ops`` (which needs Triton) on the arguments of the plain one."""
    module, _, name = name.partition(".")
    operation = getattr(importlib.import_module(f"common.ops.{module}"), name)
    if name != "qk_norm_rope":
        return operation

    def with_cache(*arguments: Tensor | float, pdl: bool) -> tuple[Tensor, Tensor]:
        *first, keys, values, slots = arguments
        return operation(*first, k_cache=keys, v_cache=values, slot_mapping=slots, pdl=pdl)

    return with_cache


@dataclass(frozen=True)
class SmallOp:
    """An operation, what it is called with, and how much memory it touches."""

    numbers_per_row: Callable[[Setting], int]  # read and written, once each
    arguments: Callable[[Setting, int], Arguments]  # of so many rows
    plain: Callable[..., Tensor | tuple[Tensor, ...]]
    fused: str


OPERATIONS = {
    "add_rms_norm": SmallOp(
        lambda setting: 4 * setting.hidden_size,  # x and residual; both results
        _norm_arguments,
        Ops().add_rms_norm,
        "norm.add_rms_norm",
    ),
    "qk_norm_rope": SmallOp(
        # q, k, v, cos and sin; q and k rotated; k and v in the cache
        lambda setting: (2 * setting.num_heads + 5 * setting.num_kv_heads + 2) * setting.head_dim,
        _rope_arguments,
        _plain_qk_norm_rope,
        "rope.qk_norm_rope",
    ),
    "silu_mul": SmallOp(
        lambda setting: 3 * setting.intermediate_size,
        _gate_arguments,
        Ops().silu_mul,
        "activation.silu_mul",
    ),
}
ROWS = {"cuda": (1, 8, 64, 256, 8192), "cpu": (1, 64)}


class OpsSuite:
    """``torch`` is what stages before m4 run, m3's kernel for the cache included."""

    name: ClassVar[str] = "ops"
    default_cases: ClassVar[dict[str, tuple[str, ...]]] = {
        device: tuple(f"{name}:{count}" for name in OPERATIONS for count in rows)
        for device, rows in ROWS.items()
    }

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def parse(self, text: str) -> NamedCase:
        return NamedCase.parse(text, tuple(OPERATIONS), "R")

    def cost(self, case: NamedCase) -> Cost:
        numbers = case.sizes[0] * OPERATIONS[case.measure].numbers_per_row(self.setting)
        return Cost(numbers * self.setting.dtype.itemsize, 0)

    def inputs(self, case: NamedCase) -> list[Arguments]:
        arguments, (rows,) = OPERATIONS[case.measure].arguments, case.sizes
        count = self.setting.copies(self.cost(case).bytes)
        return [arguments(self.setting, rows) for _ in range(count)]

    def subjects(self, case: NamedCase) -> Iterable[Subject]:
        operation, (rows,) = OPERATIONS[case.measure], case.sizes
        yield _subject("torch", operation.plain)
        if self.setting.on_gpu:
            early = self.setting.starts_early(rows)
            yield _subject("fused", partial(_fused(operation.fused), pdl=early))


def _subject(name: str, operation: Callable[..., object]) -> Subject:
    def calls(inputs: Sequence[Arguments]) -> list[Call]:
        return [partial(operation, *arguments) for arguments in inputs]

    return Subject(name, calls)

"""Inputs and expected results for flash prefill, hostile on purpose, on any device.

Every cache slot that no context covers is NaN, every table entry past a context is a huge block id
(following it would crash), outputs start as NaN, and q, k, v are slices of one packed tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m4_flash.kernels import prefill_reference
from m4_flash.kernels.prefill_plan import PrefillPlan, plan_prefill

GARBAGE_BLOCK = 2**30
# Relative error in the norm: rounding of the result, and of the softmax weights to the dtype.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

Prefill = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    queries: tuple[int, ...] = (37, 1, 0, 16, 130)
    contexts: tuple[int, ...] = (0, 17, 5, 100, 0)
    head_dim: int = 64
    num_kv_heads: int = 2
    group: int = 2  # query heads of one KV head
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    poisoned: tuple[int, ...] = ()  # sequences of nothing but NaN
    contiguous: bool = False  # q, k, v are tensors of their own

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"D{self.head_dim}-Hkv{self.num_kv_heads}-G{self.group}-block{self.block_size}-"
            f"{dtype}-B{len(self.queries)}-T{sum(self.queries)}"
        )

    def plan(self, device: torch.device | str = "cpu", **options: Any) -> PrefillPlan:
        plan = plan_prefill(
            self.queries,
            self.contexts,
            device,
            num_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            **options,
        )
        return plan.to(device)


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    slots: list[Tensor]  # of each sequence's cached tokens, in order
    scale: float

    def arguments(self, plan: PrefillPlan) -> tuple[Any, ...]:
        """What ``flash_prefill`` takes, in its order."""
        caches = self.k_cache, self.v_cache
        return self.q, self.k, self.v, *caches, self.block_tables, plan, self.scale


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(case.dtype)

    heads = case.num_kv_heads * case.group
    packed = random(sum(case.queries), heads + 2 * case.num_kv_heads, case.head_dim)
    starts = [sum(case.queries[:i]) for i in range(len(case.queries))]
    for i in case.poisoned:
        packed[starts[i] : starts[i] + case.queries[i]] = float("nan")
    q, k, v = packed.split([heads, case.num_kv_heads, case.num_kv_heads], dim=1)
    if case.contiguous:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()

    counts = [-(-context // case.block_size) for context in case.contexts]
    ids = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.full((len(counts), max(counts, default=0) + 2), GARBAGE_BLOCK).int()
    shape = (len(ids), case.block_size, case.num_kv_heads, case.head_dim)
    caches = [torch.full(shape, float("nan"), dtype=case.dtype, device=device) for _ in range(2)]
    slots = []
    for i, (count, context) in enumerate(zip(counts, case.contexts, strict=True)):
        blocks = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int64)
        tables[i, :count] = blocks
        positions = torch.arange(context)
        mine = blocks[positions // case.block_size] * case.block_size + positions % case.block_size
        slots.append(mine.to(device))
        for cache in caches:
            cache.flatten(0, 1)[slots[-1]] = random(context, *shape[2:])
    return Inputs(q, k, v, *caches, tables.to(device), slots, case.head_dim**-0.5)


def twin(*arguments: Any, out: Tensor | None = None) -> Tensor:
    """The reference, called as ``flash_prefill`` is."""
    *tensors, plan, scale = arguments
    return prefill_reference.paged_prefill(
        *tensors, plan.query_lens, plan.context_lens, scale, out=out
    )


def expected_prefill(case: Case, inputs: Inputs, sequence: int, rows: slice) -> Tensor:
    """Softmax attention of some of a sequence's fresh tokens, in float64: ``[rows, Hq, D]``."""
    first = sum(case.queries[:sequence])
    fresh = slice(first, first + case.queries[sequence])
    keys, values = (
        torch.cat([cache.flatten(0, 1)[inputs.slots[sequence]], new[fresh]])
        .double()
        .repeat_interleave(case.group, dim=1)
        for cache, new in ((inputs.k_cache, inputs.k), (inputs.v_cache, inputs.v))
    )
    positions = torch.arange(len(keys), device=keys.device)
    scores = torch.einsum("qhd,shd->hqs", inputs.q[fresh][rows].double(), keys) * inputs.scale
    own = positions[case.contexts[sequence] :][rows]
    scores = scores.masked_fill(positions > own[:, None], float("-inf"))
    return torch.einsum("hqs,shd->qhd", scores.softmax(-1), values)


def check_prefill(
    prefill: Prefill,
    case: Case,
    device: torch.device | str = "cpu",
    seed: int = 0,
    most_rows: int = 10**9,
    **options: Any,
) -> None:
    """Run ``prefill`` on ``case`` and compare every sequence that is not poisoned with float64.

    Of long sequences, ``most_rows`` are compared: the first ones, the last ones, some between.
    ``options`` go to ``plan_prefill``.
    """
    inputs = make_inputs(case, device, seed)
    out = torch.full(inputs.q.shape, float("nan"), dtype=case.dtype, device=device)
    result = prefill(*inputs.arguments(case.plan(device, **options)), out=out)
    assert result is out
    first = 0
    for sequence, length in enumerate(case.queries):
        rows = out[first : first + length].double()
        first += length
        if length == 0 or sequence in case.poisoned:
            continue
        step = max(1, most_rows // 3)
        begins = range(length) if length <= most_rows else (0, length // 2, length - step)
        spans = [(0, length)] if length <= most_rows else [(b, b + step) for b in begins]
        for begin, end in spans:
            mine = rows[begin:end]
            wanted = expected_prefill(case, inputs, sequence, slice(begin, end))
            where = f"sequence {sequence}, tokens {begin} to {end} of {length}"
            assert mine.isfinite().all(), where
            error = (mine - wanted).norm() / wanted.norm().clamp_min(1e-30)
            assert error < TOLERANCE[case.dtype], f"{where}: {error}"
            by_row = (mine - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
            assert by_row.max() < 4 * TOLERANCE[case.dtype], f"{where}: {by_row.max()}"

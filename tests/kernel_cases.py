"""Inputs and expected results for the paged kernels, hostile on purpose, on any device.

Every cache slot that no context covers is NaN, every table entry past a context is a huge block id
(following it would crash), outputs start as NaN, and q, k, v are slices of one packed tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3_paged.kernels import Kernels

GARBAGE_BLOCK = 2**30
# Relative error in the norm: rounding of the result, and of the softmax weights to the dtype.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True)
class Case:
    head_dim: int = 64
    num_kv_heads: int = 2
    group: int = 2  # query heads of one KV head
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (37, 0, 1, 16, 130)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"D{self.head_dim}-Hkv{self.num_kv_heads}-G{self.group}-block{self.block_size}-"
            f"{dtype}-B{len(self.lengths)}"
        )


@dataclass
class Inputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    slots: list[Tensor]  # of each sequence's tokens, in order
    scale: float

    def arguments(self) -> tuple[Any, ...]:
        """What ``paged_attention`` takes, in its order."""
        tables, lens = self.block_tables, self.context_lens
        return self.q, self.k_cache, self.v_cache, tables, lens, self.scale


def packed_qkv(case: Case, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random q ``[T, Hq, D]``, k, v ``[T, Hkv, D]``: slices of one tensor, as the model has."""
    heads = case.num_kv_heads * case.group
    packed = torch.randn(tokens, heads + 2 * case.num_kv_heads, case.head_dim)
    packed = packed.to(device, case.dtype)
    return packed.split([heads, case.num_kv_heads, case.num_kv_heads], dim=1)


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    device = torch.device(device)
    counts = [-(-length // case.block_size) for length in case.lengths]
    ids = torch.randperm(sum(counts) + 3).tolist()  # three blocks stay unused
    tables = torch.full((len(counts), max(counts, default=0) + 2), GARBAGE_BLOCK).int()
    shape = (len(ids), case.block_size, case.num_kv_heads, case.head_dim)
    k_cache, v_cache = (
        torch.full(shape, float("nan"), dtype=case.dtype, device=device) for _ in range(2)
    )
    slots = []
    for sequence, (count, length) in enumerate(zip(counts, case.lengths, strict=True)):
        blocks = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int64)
        tables[sequence, :count] = blocks
        positions = torch.arange(length)
        mine = blocks[positions // case.block_size] * case.block_size + positions % case.block_size
        slots.append(mine.to(device))
        for cache in (k_cache, v_cache):
            values = torch.randn(length, *shape[2:]).to(device, case.dtype)
            cache.flatten(0, 1)[slots[-1]] = values
    q, _, _ = packed_qkv(case, len(counts), device)
    lens = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    return Inputs(q, k_cache, v_cache, tables.to(device), lens, slots, case.head_dim**-0.5)


def expected_attention(case: Case, inputs: Inputs) -> Tensor:
    """Softmax attention of each sequence over its own tokens, in float64."""
    out = torch.zeros(inputs.q.shape, dtype=torch.float64, device=inputs.q.device)
    for sequence, slots in enumerate(inputs.slots):
        if len(slots) == 0:
            continue
        keys, values = (
            cache.flatten(0, 1)[slots].double().repeat_interleave(case.group, dim=1)
            for cache in (inputs.k_cache, inputs.v_cache)
        )
        scores = torch.einsum("hd,shd->hs", inputs.q[sequence].double(), keys) * inputs.scale
        out[sequence] = torch.einsum("hs,shd->hd", scores.softmax(-1), values)
    return out


def check_attention(
    kernels: Kernels, case: Case, device: torch.device | str = "cpu", seed: int = 0, **options: Any
) -> None:
    """Run ``paged_attention`` on ``case`` and compare every sequence with float64."""
    inputs = make_inputs(case, device, seed)
    out = torch.full(inputs.q.shape, float("nan"), dtype=case.dtype, device=device)
    result = kernels.paged_attention(*inputs.arguments(), out=out, **options)
    assert result is out
    expected = expected_attention(case, inputs)
    for sequence, length in enumerate(case.lengths):
        mine, wanted = out[sequence].double(), expected[sequence]
        assert mine.isfinite().all(), f"sequence {sequence} of length {length}"
        error = (mine - wanted).norm() / wanted.norm().clamp_min(1e-30)
        assert error < TOLERANCE[case.dtype], f"sequence {sequence} of length {length}: {error}"


def check_reshape_and_cache(
    kernels: Kernels, case: Case, device: torch.device | str = "cpu", seed: int = 0
) -> None:
    """Every token lands in its slot, -1 nowhere, and no other slot changes."""
    torch.manual_seed(seed)
    tokens, num_slots = 13, 4 * case.block_size
    _, k, v = packed_qkv(case, tokens, torch.device(device))
    slots = torch.randperm(num_slots)[:tokens]
    slots[::4] = -1
    shape = (4, case.block_size, case.num_kv_heads, case.head_dim)
    k_cache, v_cache = (torch.randn(shape).to(device, case.dtype) for _ in range(2))
    wanted_k, wanted_v = k_cache.clone(), v_cache.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted_k.flatten(0, 1)[slot] = k[token]
            wanted_v.flatten(0, 1)[slot] = v[token]
    kernels.reshape_and_cache(k, v, k_cache, v_cache, slots.to(device))
    assert torch.equal(k_cache, wanted_k)
    assert torch.equal(v_cache, wanted_v)

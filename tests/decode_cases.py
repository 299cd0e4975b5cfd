"""Flash decode against float64, on any device, with the hostile inputs of ``kernel_cases``."""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import TOLERANCE, Case, Inputs, expected_attention, make_inputs, packed_qkv
from torch import Tensor

from common.layers import Ops
from m4_flash.kernels.decode_plan import DecodePlan, plan_decode
from m4_flash.kernels.flash_decode import flash_decode, flash_decode_fused

RAGGED = (300, 0, 1, 7, 8, 9, 64, 65, 255, 1000)
EPS = 1e-6


def plan_for(case: Case, inputs: Inputs, is_long: bool = True) -> DecodePlan:
    heads = case.num_kv_heads * case.group
    lens = inputs.context_lens
    return plan_decode(lens, heads, case.num_kv_heads, case.head_dim, is_long=is_long)


def variants(case: Case) -> tuple[bool, ...]:
    """Values of ``is_long`` that mean different kernels."""
    return (True,) if case.dtype == torch.float32 else (True, False)


def decode(inputs: Inputs, plan: DecodePlan, **options: Any) -> Tensor:
    tables, scale = inputs.block_tables, inputs.scale
    return flash_decode(inputs.q, inputs.k_cache, inputs.v_cache, tables, plan, scale, **options)


def assert_close(out: Tensor, wanted: Tensor, case: Case) -> None:
    for sequence, length in enumerate(case.lengths):
        mine, theirs = out[sequence].double(), wanted[sequence].double()
        assert mine.isfinite().all(), f"sequence {sequence} of length {length}"
        error = (mine - theirs).norm() / theirs.norm().clamp_min(1e-30)
        assert error < TOLERANCE[case.dtype], f"sequence {sequence} of length {length}: {error}"


def check_flash_decode(
    case: Case, device: torch.device | str = "cpu", seed: int = 0, pdl: bool = False
) -> None:
    """Right, and the same when the plan is used again, as the next layer does."""
    for is_long in variants(case):
        inputs = make_inputs(case, device, seed)
        plan = plan_for(case, inputs, is_long)
        out = torch.full(inputs.q.shape, float("nan"), dtype=case.dtype, device=device)
        assert decode(inputs, plan, out=out, pdl=pdl) is out
        assert_close(out, expected_attention(case, inputs), case)
        assert not plan.arrivals.any()
        assert torch.equal(decode(inputs, plan, pdl=pdl), out)


def rotation(batch: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin ``[B, 1, D]`` of random angles: slices of one row, as the model has."""
    angles = torch.rand(batch, head_dim // 2) * 6.28
    cos, sin = angles.cos(), angles.sin()
    row = torch.cat((cos, cos, -sin, sin), dim=-1).to(like)
    return row.unsqueeze(1).chunk(2, dim=-1)


class FusedCase:
    """What ``flash_decode_fused`` takes: each sequence's last token is new, its slot still NaN."""

    def __init__(
        self, case: Case, device: torch.device | str = "cpu", seed: int = 0, norm: bool = True
    ) -> None:
        self.case = case
        self.inputs = inputs = make_inputs(case, device, seed)
        batch = len(case.lengths)
        self.qkv = packed_qkv(case, batch, torch.device(device))
        weights = (torch.rand(2, case.head_dim) + 0.5).to(inputs.q)
        self.norm_weights = tuple(weights) if norm else (None, None)
        self.rotation = rotation(batch, case.head_dim, inputs.q)
        self.slot_mapping = torch.full((batch,), -1, device=device)
        for sequence, slots in enumerate(inputs.slots):
            if len(slots) > 0:
                self.slot_mapping[sequence] = slots[-1]
                inputs.k_cache.flatten(0, 1)[slots[-1]] = float("nan")
                inputs.v_cache.flatten(0, 1)[slots[-1]] = float("nan")

    def run(self, plan: DecodePlan, slot_mapping: Tensor, **options: Any) -> Tensor:
        inputs, (q, k, v) = self.inputs, self.qkv
        return flash_decode_fused(
            q, k, v, *self.norm_weights, EPS, *self.rotation, inputs.k_cache, inputs.v_cache,
            inputs.block_tables, slot_mapping, plan, inputs.scale, **options,
        )  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """The output in float64, and keys and values ``[B, Hkv, D]`` that go into the cache."""
        inputs, (q, k, v) = self.inputs, self.qkv
        q, k = Ops().qk_norm_rope(q, k, *self.norm_weights, EPS, *self.rotation)
        written = self.slot_mapping >= 0
        k_cache, v_cache = inputs.k_cache.clone(), inputs.v_cache.clone()
        k_cache.flatten(0, 1)[self.slot_mapping[written]] = k[written]
        v_cache.flatten(0, 1)[self.slot_mapping[written]] = v[written]
        tables, lens, slots = inputs.block_tables, inputs.context_lens, inputs.slots
        whole = Inputs(q, k_cache, v_cache, tables, lens, slots, inputs.scale)
        return expected_attention(self.case, whole), k, v


def check_flash_decode_fused(
    case: Case,
    device: torch.device | str = "cpu",
    seed: int = 0,
    norm: bool = True,
    pdl: bool = False,
) -> None:
    """Output right with or without the write; written is what belongs there, and nothing else."""
    for is_long in variants(case):
        _check_fused(FusedCase(case, device, seed, norm), is_long, pdl)


def _check_fused(fused: FusedCase, is_long: bool, pdl: bool) -> None:
    case, inputs = fused.case, fused.inputs
    plan = plan_for(case, inputs, is_long)
    wanted, wanted_k, wanted_v = fused.expected()
    before = [cache.clone() for cache in (inputs.k_cache, inputs.v_cache)]
    kept = fused.slot_mapping.clone()
    kept[::3] = -1
    out = fused.run(plan, kept, pdl=pdl)
    assert_close(out, wanted, case)
    assert not plan.arrivals.any()
    caches = (inputs.k_cache, inputs.v_cache)
    stored = kept >= 0
    for cache, old, new in zip(caches, before, (wanted_k, wanted_v), strict=True):
        mine = cache.flatten(0, 1)[kept[stored]]
        error = (mine - new[stored]).float().norm() / new[stored].float().norm().clamp_min(1e-30)
        assert error < (TOLERANCE[case.dtype] if cache is inputs.k_cache else 1e-30)
        old.flatten(0, 1)[kept[stored]] = mine
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)
    # Its own writes change nothing: the new token is not read back.
    assert torch.equal(fused.run(plan, fused.slot_mapping, pdl=pdl), out)

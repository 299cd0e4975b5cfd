"""Inputs and expected results for the fused operations, on any device.

Every result is compared with the same mathematics in float64, and with the plain operation. What
lies around the inputs in memory is NaN, and so are cache slots before they are written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import ModelConfig
from common.layers import Ops
from common.ops.activation import silu_mul
from common.ops.norm import add_rms_norm, rms_norm
from common.ops.rope import qk_norm_rope
from common.rope import RotaryEmbedding

EPS = 1e-6
# Relative error of a row in the norm: of up to four roundings to the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
PLAIN = Ops()


def guarded(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Random values with NaN before and behind them."""
    whole = torch.full((shape[0] + 2, *shape[1:]), float("nan"), dtype=dtype, device=device)
    x = whole[1:-1]
    x.copy_(torch.randn(shape))
    return x


def assert_rows_close(out: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Every row of the last dimension is as near as its dtype allows."""
    assert out.shape == wanted.shape and out.dtype == dtype
    out, wanted = out.double(), wanted.double()
    assert out.isfinite().all()
    error = (out - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
    assert error.max() < TOLERANCE[dtype], f"relative error {error.max():.2e}"


def norm_in_double(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def check_norms(
    leading: tuple[int, ...], n: int, dtype: torch.dtype, device: str = "cpu", pdl: bool = False
) -> None:
    """`rms_norm` and `add_rms_norm` of [*leading, n]."""
    x, residual = (guarded(*leading, n, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(n).to(device, dtype)
    before = x.clone(), residual.clone()

    out = rms_norm(x, weight, EPS, pdl=pdl)
    assert_rows_close(out, norm_in_double(x, weight), dtype)
    assert_rows_close(out, PLAIN.rms_norm(x, weight, EPS), dtype)

    out, total = add_rms_norm(x, residual, weight, EPS, pdl=pdl)
    assert torch.equal(total, x + residual)
    assert_rows_close(out, norm_in_double(total, weight), dtype)
    assert_rows_close(out, PLAIN.add_rms_norm(x, residual, weight, EPS)[0], dtype)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def check_silu_mul(
    leading: tuple[int, ...], inner: int, dtype: torch.dtype, device: str = "cpu", pdl: bool = False
) -> None:
    """`silu_mul` of [*leading, 2 inner]."""
    gate_up = guarded(*leading, 2 * inner, dtype=dtype, device=device) * 3
    gate_up[..., 0], gate_up[..., -1] = -300.0, 3.0  # where exp overflows and silu is 0
    out = silu_mul(gate_up, pdl=pdl)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_rows_close(out, gate / (1 + (-gate).exp()) * up, dtype)
    assert_rows_close(out, PLAIN.silu_mul(gate_up), dtype)


@dataclass(frozen=True)
class RopeCase:
    """T tokens of one model's attention."""

    tokens: int = 5
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    norm: bool = True
    packed: bool = True  # q, k, v are slices of one tensor, as the model has them

    def __str__(self) -> str:
        name = f"T{self.tokens}-H{self.num_heads}-Hkv{self.num_kv_heads}-D{self.head_dim}"
        return f"{name}-{str(self.dtype).removeprefix('torch.')}{'-norm' if self.norm else ''}"

    def rope(self, device: str) -> RotaryEmbedding:
        config = ModelConfig.from_dict(
            {
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 8,
                "hidden_size": self.num_heads * self.head_dim,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": self.num_heads,
                "num_key_value_heads": self.num_kv_heads,
                "head_dim": self.head_dim,
                "max_position_embeddings": 4096,
                "rms_norm_eps": EPS,
            }
        )
        return RotaryEmbedding(config, max_positions=4096, dtype=self.dtype, device=device)


def rope_in_double(case: RopeCase, x: Tensor, weight: Tensor | None, positions: Tensor) -> Tensor:
    x = x.double() if weight is None else norm_in_double(x, weight)
    half = case.head_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=x.device) * 2 / case.head_dim
    angles = positions.double()[:, None, None] / 10_000.0**exponents
    pairs = torch.complex(x[..., :half], x[..., half:])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def check_qk_norm_rope(case: RopeCase, device: str = "cpu", pdl: bool = False) -> None:
    """Rotation, with and without a cache: every token in its slot, -1 nowhere, no other changes."""
    dtype, tokens, kv_heads = case.dtype, case.tokens, case.num_kv_heads
    heads = (case.num_heads, kv_heads, kv_heads)
    q, k, v = guarded(tokens, sum(heads), case.head_dim, dtype=dtype, device=device).split(heads, 1)
    if not case.packed:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    weights = (None, None)
    if case.norm:
        weights = tuple(torch.randn(case.head_dim).to(device, dtype) for _ in range(2))
    # Angles in float32 are exact enough for float64's only while positions are small.
    positions = torch.randint(0, 30 if dtype == torch.float32 else 4096, (tokens,), device=device)
    cos, sin = case.rope(device)(positions)
    arguments = (*weights, EPS, cos, sin)

    rotated = qk_norm_rope(q, k, v, *arguments, pdl=pdl)
    twins = PLAIN.qk_norm_rope(q, k, *arguments)
    for out, twin, x, weight in zip(rotated, twins, (q, k), weights, strict=True):
        assert out.is_contiguous()
        assert_rows_close(out, rope_in_double(case, x, weight, positions), dtype)
        assert_rows_close(out, twin, dtype)

    block_size, num_blocks = 8, tokens // 8 + 3
    slots = torch.randperm(num_blocks * block_size, device=device)[:tokens]
    slots[::4] = -1
    shape = (num_blocks, block_size, kv_heads, case.head_dim)
    k_cache, v_cache = (torch.randn(shape).to(device, dtype) for _ in range(2))
    wanted_k, wanted_v = k_cache.clone(), v_cache.clone()
    kept = slots >= 0
    wanted_k.flatten(0, 1)[slots[kept]] = rotated[1][kept]
    wanted_v.flatten(0, 1)[slots[kept]] = v[kept]
    cached = qk_norm_rope(
        q, k, v, *arguments, k_cache=k_cache, v_cache=v_cache, slot_mapping=slots, pdl=pdl
    )
    assert all(torch.equal(a, b) for a, b in zip(cached, rotated, strict=True))
    assert torch.equal(k_cache, wanted_k)
    assert torch.equal(v_cache, wanted_v)

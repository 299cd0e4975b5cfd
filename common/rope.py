"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) with the scalings of long contexts.

    rope = RotaryEmbedding(config, max_positions=8192, dtype=torch.float32, device="cpu")
    cos, sin = rope(positions)              # [...] -> twice [..., 1, D]
    q = rotate(q, cos, sin)                 # [..., Hq, D]

A head is D / 2 pairs (x[i], x[i + D/2]); pair i of the token at position p is turned by the angle
p * inv_freq[i]. Every scaling only chooses other frequencies; yarn scales cos and sin as well.
Frequencies and the order of operations follow transformers' `modeling_rope_utils`, so that float32
results agree to the last bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common.config import ModelConfig, RopeConfig


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of x[..., heads, D]; cos, sin: [..., 1, D] as `RotaryEmbedding` gives them."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RotaryEmbedding(nn.Module):
    """cos and sin by position: from a table, or computed anew where frequencies move (dynamic)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """`max_positions`: how many positions the table covers; it takes 2 D values for each."""
        super().__init__()
        self.config = config.rope
        self.head_dim = config.head_dim
        self.original_len = config.max_position_embeddings
        self.dtype = dtype
        self.is_dynamic = config.rope.rope_type == "dynamic"
        self.register_buffer("table", None, persistent=False)
        if not self.is_dynamic:
            inv_freq, scale = inverse_frequencies(config)
            positions = torch.arange(max_positions, dtype=torch.float32, device=device)
            angles = positions[:, None] * inv_freq.to(device)
            self.table = _cos_sin(angles, scale, dtype)  # [max_positions, 2 D]

    def forward(self, positions: Tensor, rope_lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """positions[...] int64 -> cos, sin [..., 1, D] in the model's dtype.

        The first half of sin is negated: (x1, x2) turns into x * cos + (x2, x1) * sin, so that
        swapping the halves of x is all that is left to do.

        rope_lens[...] int64 matters to the dynamic type only: the length of the sequence each
        token is rotated for (default: as long as the token is deep, positions + 1).
        """
        if self.is_dynamic:
            lens = positions + 1 if rope_lens is None else rope_lens
            inv_freq = dynamic_frequencies(self.config, self.head_dim, self.original_len, lens)
            cos_sin = _cos_sin(positions[..., None].float() * inv_freq, 1.0, self.dtype)
        else:
            cos_sin = self.table[positions]
        cos, sin = cos_sin.unsqueeze(-2).chunk(2, dim=-1)
        return cos, sin


def _cos_sin(angles: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """angles[..., D/2] -> [..., 2D]: cos for a whole head, then sin with its first half negated."""
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos, -sin, sin), dim=-1).to(dtype)


def _exponents(head_dim: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Frequencies [D/2] float32 in radians per position, and the factor on cos and sin."""
    rope, params = config.rope, config.rope.params
    inv_freq = 1.0 / rope.theta ** _exponents(config.head_dim)
    if rope.rope_type == "linear":
        return inv_freq / params["factor"], 1.0
    if rope.rope_type == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn(config)
    return inv_freq, 1.0


def dynamic_frequencies(rope: RopeConfig, head_dim: int, original_len: int, lens: Tensor) -> Tensor:
    """NTK-aware scaling that grows with the sequence: lens[...] -> frequencies [..., D/2] float32.

    Up to the original length nothing is scaled; beyond it the base grows, which stretches slow
    pairs by up to `factor * len / original - (factor - 1)` and leaves the fastest untouched.
    """
    factor = rope.params["factor"]
    growth = factor * lens.clamp(min=original_len) / original_len - (factor - 1)
    base = rope.theta * growth ** (head_dim / (head_dim - 2))
    return 1.0 / base[..., None] ** _exponents(head_dim, lens.device)


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: slow pairs are slowed by `factor`, fast ones kept, a smooth passage between."""
    params = rope.params
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    # Full turns that each pair makes within the original context.
    turns = params["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / params["factor"] + kept * inv_freq


def _yarn(config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolate slow pairs, extrapolate fast ones."""
    rope, params, dim = config.rope, config.rope.params, config.head_dim
    original_len = params["original_max_position_embeddings"]
    factor = params["factor"]
    if factor is None:
        factor = config.max_position_embeddings / original_len

    def pair_with_turns(turns: float) -> float:
        """The pair, as a real number, that makes so many full turns in the original context."""
        return dim * math.log(original_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = pair_with_turns(params.get("beta_fast") or 32)
    last = pair_with_turns(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # a passage of no width would divide by zero
    interpolated = ((torch.arange(dim // 2).float() - first) / (last - first)).clamp(0, 1)

    wavelength = rope.theta ** _exponents(dim)
    extrapolated = 1 - interpolated
    inv_freq = 1 / (factor * wavelength) * (1 - extrapolated) + 1 / wavelength * extrapolated
    return inv_freq, _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: RopeConfig, factor: float) -> float:
    """The factor on cos and sin, by which attention's temperature falls as the context grows."""
    given = rope.params.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all_dim = rope.params.get("mscale"), rope.params.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)

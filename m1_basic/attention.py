"""Attention of new tokens to everything the cache holds.

Prefill and decode are the same computation with different shapes: T new tokens (the whole prompt,
or one) against S cached ones, T of which are themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import KVCache


class CachedAttention:
    """The ``attend`` that the model calls in every layer; ``plan`` says for which tokens."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._start = 0
        self._mask: Tensor | None = None  # [T, S], True where a query may look

    def plan(self, start: int, positions: Tensor) -> None:
        """Prepare one forward pass over tokens at ``positions`` ``[T]``, the first at ``start``."""
        self._start = start
        keys = torch.arange(start + len(positions), device=positions.device)
        # One rule says it all: the query at position p sees the keys at positions up to p.
        self._mask = keys <= positions[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: ``[T, Hq, D]``; k, v: ``[T, Hkv, D]``, stored first. Returns ``[T, Hq, D]``."""
        keys, values = self._cache.append(layer, self._start, k, v)  # [S, Hkv, D]
        # SDPA wants heads before time: [1, Hq, T, D] against [1, Hkv, S, D]
        q, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, keys, values))
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=self._mask, enable_gqa=True
        )
        return out.squeeze(0).transpose(0, 1)

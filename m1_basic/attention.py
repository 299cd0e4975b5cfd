"""Attention of new tokens to everything the cache holds.

Prefill and decode are the same computation with different shapes: T new tokens (the whole prompt,
or one) against S cached ones, T of which are themselves.
"""

from __future__ import annotations

from torch import Tensor

from common.attention import causal_mask, masked_attention

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
        self._mask = causal_mask(positions, start + len(positions))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: ``[T, Hq, D]``; k, v: ``[T, Hkv, D]``, stored first. Returns ``[T, Hq, D]``."""
        keys, values = self._cache.append(layer, self._start, k, v)  # [S, Hkv, D]
        return masked_attention(q[None], keys[None], values[None], self._mask[None])[0]

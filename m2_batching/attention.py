"""Attention of a padded batch: one row per sequence, all rows as long as the longest.

The rows of a step are neighbouring slots of the cache, so keys and values are read in place: a
slice ``[first_slot : first_slot + B, :S]`` of the cache, never a copy of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.attention import causal_mask, masked_attention
from common.config import ModelConfig
from common.memory import allocate_kv_cache

from .kv_cache import Move


class SlotAttention:
    """The cache's tensors, and the ``attend`` that the model calls in every layer.

    The storage is ``[L, 2, num_tokens, Hkv, D]`` (2: keys, values); ``plan`` views it as slots.
    """

    def __init__(
        self, model: ModelConfig, num_tokens: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (model.num_layers, 2, num_tokens, model.num_kv_heads, model.head_dim)
        # It must begin as zeros: a short row reads slots nobody wrote, masked, but NaN * 0 is NaN.
        self._storage = allocate_kv_cache(shape, dtype, device)
        self._slots = self._storage  # [L, 2, B, slot_len, Hkv, D] once planned
        self._positions: Tensor | None = None  # [B, T]
        self._rows: Tensor | None = None  # [B, 1]
        self._mask: Tensor | None = None  # [B, T, S], True where a query may look

    def move(self, moves: list[Move]) -> None:
        """Copy sequences to their new slots; source and target may overlap."""
        for move in moves:
            source = self._storage[:, :, move.source : move.source + move.num_tokens]
            self._storage[:, :, move.target : move.target + move.num_tokens] = source.clone()

    def wipe(self, row: int) -> None:
        """Fill the slot of a row of the last plan with zeros again."""
        self._slots[:, :, row] = 0

    def plan(self, first_slot: int, slot_len: int, positions: Tensor, context_len: int) -> None:
        """Prepare one forward pass.

        Args:
            first_slot: slot of row 0; row i is in slot ``first_slot + i``.
            slot_len: length of a slot in tokens.
            positions: ``[B, T]``, where each row's tokens stand in their sequence.
            context_len: S, one more than the largest position of a real token.
        """
        num_rows = positions.shape[0]
        start = first_slot * slot_len
        layers, two, _, *heads = self._storage.shape
        self._slots = self._storage[:, :, start : start + num_rows * slot_len].view(
            layers, two, num_rows, slot_len, *heads
        )
        self._positions = positions
        self._rows = torch.arange(num_rows, device=positions.device)[:, None]
        # A row's padding stands behind its tokens, so by the same rule that keeps a token from
        # seeing the future no real token ever sees it; the next real token overwrites it.
        self._mask = causal_mask(positions, context_len)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: ``[B, T, Hq, D]``; k, v: ``[B, T, Hkv, D]``, stored first. Returns as q."""
        keys, values = self._slots[layer]  # [B, slot_len, Hkv, D]
        keys[self._rows, self._positions] = k
        values[self._rows, self._positions] = v
        num_keys = self._mask.shape[-1]
        return masked_attention(q, keys[:, :num_keys], values[:, :num_keys], self._mask)

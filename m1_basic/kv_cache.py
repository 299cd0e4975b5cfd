"""The KV cache of one sequence: one contiguous piece of memory, sized up front.

Keys and values of past tokens never change, because attention is causal: computing them once and
keeping them turns a decode step from a pass over the whole sequence into a pass over one token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.config import ModelConfig
from common.memory import allocate_kv_cache


class KVCache:
    """Room for ``max_model_len`` tokens in every layer.

    ``keys`` and ``values``: ``[L, max_model_len, Hkv, D]``. Reserving for the longest sequence is
    simple and wasteful: a request of 100 tokens uses 100 of its slots.
    """

    def __init__(
        self, model: ModelConfig, max_model_len: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (model.num_layers, max_model_len, model.num_kv_heads, model.head_dim)
        self.keys = allocate_kv_cache(shape, dtype, device)
        self.values = allocate_kv_cache(shape, dtype, device)

    @property
    def num_slots(self) -> int:
        return self.keys.shape[1]

    def append(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of tokens ``start`` to ``start + T`` and return all so far.

        Args:
            k, v: ``[T, Hkv, D]``.

        Returns:
            Keys and values of tokens 0 to ``start + T``: views ``[S, Hkv, D]``, nothing is copied.
        """
        end = start + k.shape[0]
        self.keys[layer, start:end] = k
        self.values[layer, start:end] = v
        return self.keys[layer, :end], self.values[layer, :end]

"""Attention by PyTorch alone: what the other backends must compute, and the CPU path."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..attention import Attention
from ..kernels import prefill_reference, reference


class TorchAttention(Attention):
    """Copies keys and values out of their blocks and hands them to SDPA."""

    name = "torch"

    @staticmethod
    def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values, batch = self.keys[layer], self.values[layer], self._batch
        reference.reshape_and_cache(k, v, keys, values, batch.slot_mapping)
        if not batch.query_lens:
            return reference.paged_attention(
                q, keys, values, batch.block_tables, batch.seq_lens, self.scale
            )
        return prefill_reference.paged_prefill(
            q, k, v, keys, values, batch.block_tables, batch.query_lens, batch.cached_lens,
            self.scale,
        )

"""m3's attention: decode reads the blocks in place, prefill computes all scores under a mask.

Here to be compared with: what this milestone gains is the distance to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.attention import causal_self_attention

from ..attention import Attention
from ..kernels import prefill_reference, triton_kernels


class PagedAttention(Attention):
    """The Triton kernels of the milestone before."""

    name = "paged"
    supports_graphs = True

    @staticmethod
    def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_self_attention(q, k, v)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values, batch = self.keys[layer], self.values[layer], self._batch
        triton_kernels.reshape_and_cache(k, v, keys, values, batch.slot_mapping)
        if not batch.query_lens:
            return triton_kernels.paged_attention(
                q, keys, values, batch.block_tables, batch.seq_lens, self.scale
            )
        if any(batch.cached_lens):  # m3 never met this
            return prefill_reference.paged_prefill(
                q, k, v, keys, values, batch.block_tables, batch.query_lens, batch.cached_lens,
                self.scale,
            )
        parts = zip(*(x.split(batch.query_lens) for x in (q, k, v)), strict=True)
        return torch.cat([causal_self_attention(*part) for part in parts])

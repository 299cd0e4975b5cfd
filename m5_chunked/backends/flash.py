"""Our flash attention: scores live and die on the chip, keys are read through the block table."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from common.config import ModelConfig
from common.ops.launch import num_multiprocessors, supports_pdl
from common.ops.rope import qk_norm_rope

from ..attention import Attention, AttentionBatch, Upload
from ..kernels import triton_kernels
from ..kernels.decode_plan import LONG_CONTEXT, DecodePlan, plan_decode
from ..kernels.flash_decode import flash_decode, flash_decode_fused
from ..kernels.flash_prefill import flash_prefill
from ..kernels.prefill_plan import PrefillPlan, plan_prefill


class FlashAttention(Attention):
    """Norm, rotation and the write into the cache are part of its kernels."""

    name = "flash"
    supports_graphs = True
    supports_prefill_graphs = True
    takes_unrotated = True

    def __init__(
        self,
        model: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(model, num_blocks, block_size, dtype=dtype, device=device)
        self._prefill: PrefillPlan | None = None
        self._decode: DecodePlan | None = None
        self._pdl = supports_pdl(device)

    @staticmethod
    def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)  # beside its result it takes no memory to speak of

    def plan_prefill(
        self, batch: AttentionBatch, upload: Upload, *, padded: bool = False
    ) -> Hashable:
        super().plan_prefill(batch, upload)
        num_decodes = batch.num_decodes
        plan = plan_prefill(
            [*[0] * num_decodes, *batch.query_lens[num_decodes:]],  # decodes have their own kernel
            [*[0] * num_decodes, *batch.cached_lens[num_decodes:]],
            self.keys.device,
            num_heads=self.num_heads,
            num_kv_heads=self.keys.shape[3],
            head_dim=self.keys.shape[4],
            dtype=self.keys.dtype,
            num_multiprocessors=num_multiprocessors(self.keys.device),
            gather=False if padded else None,
            padded=padded,
        )
        self._prefill = plan.with_table(upload(plan.table.numpy()))
        return plan.launch_key

    def decode_variant(self, mean_len: float) -> Hashable:
        return mean_len >= LONG_CONTEXT

    def plan_decode(self, batch: AttentionBatch, variant: Hashable = None) -> None:
        super().plan_decode(batch)
        heads = self.num_heads, *self.keys.shape[3:]
        lens = batch.seq_lens[: batch.num_decodes]
        self._decode = plan_decode(lens, *heads, is_long=bool(variant))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values, batch = self.keys[layer], self.values[layer], self._batch
        triton_kernels.reshape_and_cache(k, v, keys, values, batch.slot_mapping)
        return self._attend(layer, q, k, v, keys, values)

    def rotate_and_attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """As ``__call__``, with q and k as they come from the projection."""
        keys, values, batch = self.keys[layer], self.values[layer], self._batch
        slots, tables = batch.slot_mapping, batch.block_tables
        if not batch.query_lens:
            return flash_decode_fused(
                q, k, v, q_weight, k_weight, eps, cos, sin, keys, values, tables, slots,
                self._decode, self.scale, pdl=self._pdl,
            )  # fmt: skip
        q, k = qk_norm_rope(
            q, k, v, q_weight, k_weight, eps, cos, sin,
            k_cache=keys, v_cache=values, slot_mapping=slots, check=layer == 0,
        )  # fmt: skip
        return self._attend(layer, q, k, v, keys, values)

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Decodes and chunks, each by their kernel, into one result."""
        batch, out = self._batch, torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tables, num_decodes, check = batch.block_tables, batch.num_decodes, layer == 0
        rest = out
        if num_decodes:
            flash_decode(
                q[:num_decodes], keys, values, tables[:num_decodes], self._decode, self.scale,
                out=out[:num_decodes], check=check,
            )  # fmt: skip
            q, k, v, rest = (x[num_decodes:] for x in (q, k, v, out))
        if batch.query_lens:
            flash_prefill(
                q, k, v, keys, values, tables, self._prefill, self.scale, out=rest, check=check
            )
        return out

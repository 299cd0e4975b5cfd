"""Attention over a paged cache: packed prompts in a prefill step, block tables in a decode step.

A prefill step packs prompts of any length behind each other, so no padding is computed; each
attends to itself only, and the keys it needs have just been made. A decode step has one query per
sequence, whose keys lie scattered over the blocks: that is what the kernels are for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.attention import causal_self_attention
from common.config import ModelConfig
from common.memory import allocate_kv_cache

from .kernels import Kernels
from .kv_cache import BlockCopy


class PagedAttention:
    """The cache's tensors, and the ``attend`` that the model calls in every layer.

    ``keys`` and ``values``: ``[L, num_blocks, block_size, Hkv, D]``.
    """

    def __init__(
        self,
        model: ModelConfig,
        num_blocks: int,
        block_size: int,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (model.num_layers, num_blocks, block_size, model.num_kv_heads, model.head_dim)
        self.keys = allocate_kv_cache(shape, dtype, device)
        self.values = allocate_kv_cache(shape, dtype, device)
        self._kernels = kernels
        self._scale = model.head_dim**-0.5
        self._slot_mapping: Tensor | None = None  # [T]
        self._prompt_lens: Sequence[int] = ()  # of the packed prompts; empty in a decode step
        self._block_tables: Tensor | None = None  # [B, max_blocks] int32
        self._context_lens: Tensor | None = None  # [B] int32

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks in every layer; all sources are read before a target is written."""
        if not copies:
            return
        source = torch.tensor([copy.source for copy in copies], device=self.keys.device)
        target = torch.tensor([copy.target for copy in copies], device=self.keys.device)
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def plan_prefill(self, slot_mapping: Tensor, prompt_lens: Sequence[int]) -> None:
        """Prepare a pass over packed prompts.

        Args:
            slot_mapping: ``[T]`` int64, where each token's keys and values go.
            prompt_lens: lengths of the prompts, in order; their sum is T.
        """
        self._slot_mapping = slot_mapping
        self._prompt_lens = prompt_lens

    def plan_decode(self, slot_mapping: Tensor, block_tables: Tensor, context_lens: Tensor) -> None:
        """Prepare a pass over one token of each of B sequences.

        Args:
            slot_mapping: ``[B]`` int64, where each token's keys and values go.
            block_tables: ``[B, max_blocks]`` int32; entries past a context are never read.
            context_lens: ``[B]`` int32, tokens to attend to, the new one included.
        """
        self._slot_mapping = slot_mapping
        self._prompt_lens = ()
        self._block_tables = block_tables
        self._context_lens = context_lens

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: ``[T, Hq, D]``; k, v: ``[T, Hkv, D]``, stored first. Returns ``[T, Hq, D]``."""
        keys, values = self.keys[layer], self.values[layer]
        self._kernels.reshape_and_cache(k, v, keys, values, self._slot_mapping)
        if self._prompt_lens:
            return self._prefill(q, k, v)
        return self._kernels.paged_attention(
            q, keys, values, self._block_tables, self._context_lens, self._scale
        )

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        spans = zip(*(x.split(self._prompt_lens) for x in (q, k, v, out)), strict=True)
        for q_one, k_one, v_one, out_one in spans:
            out_one.copy_(causal_self_attention(q_one, k_one, v_one))
        return out

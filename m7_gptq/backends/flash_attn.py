"""Attention by the flash-attn library (Dao et al.), where it is installed.

    pip install flash-attn --no-build-isolation

Both interfaces are served: ``flash_attn_interface`` (FlashAttention-3, Hopper) if it is there, else
``flash_attn`` (FlashAttention-2), whose paged cache wants blocks of a multiple of 256 tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attention, AttentionBatch, Upload
from ..kernels import triton_kernels

_FIRST_PAGED_VERSION = (2, 5)
_FA2_BLOCK = 256  # tokens; FlashAttention-2 reads pages in multiples of this
_INSTEAD = "or use attention_backend='flash', which needs no library"


@lru_cache
def _library() -> tuple[ModuleType, bool]:
    """The module, and whether it is FlashAttention-3."""
    if find_spec("flash_attn_interface") is not None:
        return importlib.import_module("flash_attn_interface"), True
    if find_spec("flash_attn") is not None:
        return importlib.import_module("flash_attn"), False
    raise RuntimeError(
        "attention backend 'flash_attn' needs the library: "
        f"pip install flash-attn --no-build-isolation, {_INSTEAD}"
    )


class FlashAttnAttention(Attention):
    """The library's kernels on our cache."""

    name = "flash_attn"
    supports_graphs = True

    @staticmethod
    def require(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
        """Check that the library can serve this.

        Raises:
            RuntimeError: it is missing, or has no paged cache yet.
            ValueError: dtype, head size or block size are not among what it serves.
        """
        library, is_version_3 = _library()
        version = getattr(library, "__version__", "0")
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if not is_version_3 and numbers < _FIRST_PAGED_VERSION:
            raise RuntimeError(
                f"flash-attn {version} cannot read a paged cache: install 2.5 or newer, {_INSTEAD}"
            )
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"flash-attn serves float16 and bfloat16, not {dtype}: {_INSTEAD}")
        if head_dim > 256 or head_dim % 8:
            raise ValueError(
                f"flash-attn serves head sizes up to 256 in steps of 8, not {head_dim}: {_INSTEAD}"
            )
        if not is_version_3 and block_size % _FA2_BLOCK:
            raise ValueError(
                f"flash-attn {version} reads blocks of a multiple of {_FA2_BLOCK} tokens, "
                f"not {block_size}: use --block-size {_FA2_BLOCK}, {_INSTEAD}"
            )

    @staticmethod
    def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    def plan_prefill(
        self, batch: AttentionBatch, upload: Upload, *, padded: bool = False
    ) -> Hashable:
        super().plan_prefill(batch, upload)
        key_lens = np.add(batch.query_lens, batch.cached_lens)
        self._query_starts = upload(_starts(batch.query_lens))
        self._key_starts = upload(_starts(key_lens))
        self._longest = int(max(batch.query_lens)), int(key_lens.max())
        return None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values, batch = self.keys[layer], self.values[layer], self._batch
        library, is_version_3 = _library()
        triton_kernels.reshape_and_cache(k, v, keys, values, batch.slot_mapping)
        options: dict[str, Any] = {"softmax_scale": self.scale, "causal": True}
        if not batch.query_lens:
            table = "page_table" if is_version_3 else "block_table"
            out = library.flash_attn_with_kvcache(
                q[:, None],
                keys,
                values,
                cache_seqlens=batch.seq_lens,
                **{table: batch.block_tables},
                **options,
            )
            return out[:, 0]
        if not any(batch.cached_lens):
            return self._varlen(library, q, k, v, self._query_starts, **options)
        if is_version_3:
            return library.flash_attn_with_kvcache(
                q,
                keys,
                values,
                cache_seqlens=batch.seq_lens,
                page_table=batch.block_tables,
                cu_seqlens_q=self._query_starts,
                max_seqlen_q=self._longest[0],
                **options,
            )
        options["block_table"] = batch.block_tables
        return self._varlen(library, q, keys, values, self._key_starts, **options)

    def _varlen(
        self,
        library: ModuleType,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_starts: Tensor,
        **options: Any,
    ) -> Tensor:
        longest_query, longest_key = self._longest
        out = library.flash_attn_varlen_func(
            q, k, v, self._query_starts, key_starts, longest_query, longest_key, **options
        )
        return out[0] if isinstance(out, tuple) else out


def _starts(lens: Any) -> np.ndarray:
    """Where each sequence begins among the packed ones, and where the last one ends: int32."""
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)

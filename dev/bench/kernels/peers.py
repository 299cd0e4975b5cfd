"""Attention of others: FlashAttention-3, the flash_attn library, torch's SDPA."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

DecodeAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""attention(q[B, Hq, D], keys, values, block_tables, context_lens, scale) -> [B, Hq, D]."""


@dataclass(frozen=True)
class Prompts:
    """Packed prompts of equal length, each behind a context of equal length in a paged cache.

    q: ``[T, Hq, D]``; k, v: ``[T, Hkv, D]``, which the cache holds too.
    keys, values: ``[num_blocks, block_size, Hkv, D]``.
    table: ``[B, max_blocks]`` int32, for context and prompt together.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    query_len: int
    context_len: int
    scale: float

    @property
    def batch(self) -> int:
        return len(self.table)

    @property
    def query_lens(self) -> list[int]:
        return [self.query_len] * self.batch

    @property
    def context_lens(self) -> list[int]:
        return [self.context_len] * self.batch

    @property
    def key_len(self) -> int:
        return self.context_len + self.query_len

    def starts(self, length: int) -> Tensor:
        """``[B + 1]`` int32: 0, length, 2 length, ..."""
        starts = [0, *accumulate([length] * self.batch)]
        return torch.tensor(starts, dtype=torch.int32, device=self.q.device)


PrefillAttention = Callable[[Prompts], Callable[[], Tensor]]
"""Prepares and returns the call that computes [T, Hq, D]."""


class FlashAttention3:
    """FlashAttention-3 by the extension library that vLLM's wheel brings: decode when called."""

    name = "FlashAttention-3"

    def __init__(self, library: Path) -> None:
        """ValueError: the file cannot be loaded."""
        try:
            torch.ops.load_library(str(library.resolve()))
        except OSError as error:
            raise ValueError(f"cannot load {library}: {error}") from error
        self._operator = torch.ops._vllm_fa3_C.fwd

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lens: Tensor, scale: float
    ) -> Tensor:
        """Decode attention over a paged cache."""
        longest = tables.shape[1] * keys.shape[1]
        out = self._forward(
            q[:, None], keys, values, None, None, lens, 1, longest, tables, scale
        )
        return out[:, 0]

    def prefill(self, prompts: Prompts) -> Callable[[], Tensor]:
        """Varlen: keys as they are packed, or out of the cache where there is a context."""
        one, starts = prompts, prompts.starts(prompts.query_len)
        if not one.context_len:
            return lambda: self._forward(
                one.q, one.k, one.v, starts, starts, None, one.query_len, one.query_len, None,
                one.scale,
            )
        lens = torch.full_like(starts[1:], one.key_len)
        return lambda: self._forward(
            one.q, one.keys, one.values, starts, None, lens, one.query_len, one.key_len, one.table,
            one.scale,
        )

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_starts: Tensor | None,
        key_starts: Tensor | None,
        key_lens: Tensor | None,
        longest_query: int,
        longest_key: int,
        tables: Tensor | None,
        scale: float,
    ) -> Tensor:
        # What is left out: new keys, rotation, descaling and the like; the zero before the end is
        # "split as you see fit".
        out, *_ = self._operator(
            q, k, v, *(None,) * 4, query_starts, key_starts, None, None, key_lens, longest_query,
            longest_key, tables, *(None,) * 8, scale, True, -1, -1, 0.0, True, None, 0, None, 0,
            None, 1, 0, None,
        )  # fmt: skip
        return out


def flash_attention_3(library: Path) -> FlashAttention3:
    """FlashAttention-3 out of ``_vllm_fa3_C.abi3.so``; ValueError where that cannot be loaded."""
    return FlashAttention3(library)


class FlashAttnLibrary:
    """The flash_attn package: decode when called. It says itself which block sizes it reads."""

    name = "flash_attn"

    def __init__(self, library: ModuleType) -> None:
        self._library = library

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lens: Tensor, scale: float
    ) -> Tensor:
        out = self._library.flash_attn_with_kvcache(
            q[:, None], keys, values, cache_seqlens=lens, block_table=tables, softmax_scale=scale,
            causal=True,
        )  # fmt: skip
        return out[:, 0]

    def prefill(self, prompts: Prompts) -> Callable[[], Tensor]:
        one, paged = prompts, prompts.context_len > 0
        k, v, table = (one.keys, one.values, one.table) if paged else (one.k, one.v, None)
        starts, key_starts = one.starts(one.query_len), one.starts(one.key_len)
        return lambda: self._library.flash_attn_varlen_func(
            one.q, k, v, starts, key_starts, one.query_len, one.key_len, softmax_scale=one.scale,
            causal=True, block_table=table,
        )


def sdpa(prompts: Prompts) -> Callable[[], Tensor]:
    """torch's own choice for a causal batch; contexts are gathered beforehand, outside the time."""
    one = prompts
    q, k, v = (x.unflatten(0, (one.batch, -1)) for x in (one.q, one.k, one.v))
    if one.context_len:
        k, v = (
            cache[one.table.long()].flatten(1, 2)[:, : one.key_len]
            for cache in (one.keys, one.values)
        )
        # `is_causal` lets the first query see the first key; here the last sees the last.
        options = {"attn_mask": causal_lower_right(one.query_len, one.key_len)}
    else:
        options = {"is_causal": True}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Tensor:
        out = F.scaled_dot_product_attention(
            q, k, v, scale=one.scale, enable_gqa=True, **options
        )
        return out.transpose(1, 2).flatten(0, 1)

    return call


Library = FlashAttention3 | FlashAttnLibrary


def libraries(flash_attn_3: Path | None) -> Iterator[Library]:
    """The libraries that are here."""
    if flash_attn_3 is not None:
        yield flash_attention_3(flash_attn_3)
    if torch.cuda.is_available() and find_spec("flash_attn") is not None:
        yield FlashAttnLibrary(importlib.import_module("flash_attn"))

"""What ``flash_prefill`` computes, in plain PyTorch: its twin, and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 256  # queries whose scores may exist at a time where the whole row is kept


def paged_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed sequences, each with any number of cached tokens before it.

    A token attends to all of its sequence's cached tokens, and to the fresh ones up to itself.
    Memory beside the arguments grows with the tokens, not with their pairs.

    Args:
        q: ``[T, Hq, D]``, the sequences one after the other; head ``h`` reads KV head
            ``h // (Hq // Hkv)``. Rows may be strided, as in packed QKV.
        k, v: ``[T, Hkv, D]``, keys and values of the same tokens, rows strided or not.
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]``, the dtype of ``q``. Only cached
            tokens are read: whether the fresh ones are stored already does not matter.
        block_tables: ``[B, max_blocks]`` int32. Entries past a context are never followed.
        query_lens: fresh tokens of each sequence, in order; their sum is T. 0 is allowed.
        context_lens: tokens of each sequence in the cache; the fresh ones follow them.
        scale: positive factor on the scores before the softmax.
        out: ``[T, Hq, D]`` contiguous, to write to; allocated when None.

    Returns:
        ``[T, Hq, D]``, the dtype of ``q``.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    first = 0
    for i, (length, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        if length == 0:
            continue
        rows = slice(first, first + length)
        first += length
        keys, values = k[rows], v[rows]
        if context:
            block_size = k_cache.shape[1]
            blocks = block_tables[i, : -(-context // block_size)]
            keys, values = (
                torch.cat([cache.index_select(0, blocks).flatten(0, 1)[:context], fresh])
                for cache, fresh in ((k_cache, keys), (v_cache, values))
            )
        _attend(q[rows], keys, values, scale, out[rows])
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """Attention of the last T of S tokens: q, out ``[T, Hq, D]``, k, v ``[S, Hkv, D]``."""
    # SDPA wants [batch, heads, tokens, D].
    query, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    num_queries, num_keys = len(q), len(k)
    if num_queries == 1:
        # The heads of one KV head stand where SDPA expects query positions: no mask, and the
        # keys are not repeated.
        grouped = q.view(1, k.shape[1], -1, q.shape[-1])
        attended = F.scaled_dot_product_attention(grouped, keys, values, scale=scale)
        out.copy_(attended.reshape(out.shape))
        return
    if num_queries == num_keys and q.device.type == "cpu":
        attended = F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
        out.copy_(attended[0].transpose(0, 1))
        return
    positions = torch.arange(num_keys, device=q.device)
    for begin in range(0, num_queries, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, num_queries)
        visible = num_keys - num_queries + end  # keys that the block's last query sees
        mask = positions[:visible] <= positions[visible - (end - begin) : visible, None]
        attended = F.scaled_dot_product_attention(
            query[:, :, begin:end],
            keys[:, :, :visible],
            values[:, :, :visible],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        out[begin:end] = attended[0].transpose(0, 1)

"""The paged KV cache's two operations in PyTorch: what the GPU kernels must compute; the CPU path.

The cache is ``[num_blocks, block_size, Hkv, D]`` for keys and again for values. A *slot* is the
place of one token: ``block * block_size + offset``. A sequence's *block table* lists its blocks in
order: token ``i`` lives in block ``table[i // block_size]`` at offset ``i % block_size``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reshape_and_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Store new keys and values in their slots.

    Args:
        k, v: ``[T, Hkv, D]``, the dtype of the caches.
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]``, written in place.
        slot_mapping: ``[T]`` int64, each token's slot; -1 skips the token.
    """
    kept = slot_mapping >= 0
    if not kept.all():
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Decode attention: one query token a sequence attends to all of its cached tokens.

    Args:
        q: ``[B, Hq, D]``; head ``h`` reads KV head ``h // (Hq // Hkv)``.
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]``, the dtype of ``q``.
        block_tables: ``[B, max_blocks]`` int32. Entries past a context are never read.
        context_lens: ``[B]`` int32, tokens to attend to; 0 marks a padded row: its output is zeros.
        scale: factor on the scores before the softmax.
        out: ``[B, Hq, D]`` to write to; allocated when None.

    Returns:
        ``[B, Hq, D]``, the dtype of ``q``.
    """
    _, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    # The query heads of one KV head stand where SDPA expects query positions: [1, Hkv, G, D]
    # against [1, Hkv, S, D] is grouped-query attention without repeating a key.
    grouped = (1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    # One sequence at a time: its keys and values are gathered as whole blocks, stay in the CPU's
    # cache while they are used, and need neither padding nor mask.
    for sequence, length in enumerate(context_lens.tolist()):
        if length == 0:
            out[sequence] = 0
            continue
        blocks = block_tables[sequence, : -(-length // block_size)]
        keys, values = (
            cache.index_select(0, blocks).flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0)
            for cache in (k_cache, v_cache)
        )
        query = q[sequence].view(grouped)
        attended = F.scaled_dot_product_attention(query, keys, values, scale=scale)
        out[sequence] = attended.view(num_heads, head_dim)
    return out

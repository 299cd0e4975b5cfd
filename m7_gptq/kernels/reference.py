"""The paged KV cache's two operations in PyTorch: what the GPU kernels must compute; the CPU path.

The cache is ``[num_blocks, block_size, Hkv, D]`` for keys and again for values. A *slot* is the
place of one token: ``block * block_size + offset``. A sequence's *block table* lists its blocks in
order: token ``i`` lives in block ``table[i // block_size]`` at offset ``i % block_size``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Keys are copied out of their blocks before they are used. Of at most this many tokens at a time,
# so that the copy is still in the CPU's cache when it is read, and padding stays bounded.
GATHERED_TOKENS = 4096


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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lengths = context_lens.tolist()
    for first, last in _groups(lengths):
        rows = slice(first, last)
        keys, values, mask = _gather(
            k_cache, v_cache, block_tables[rows], context_lens[rows], lengths[rows]
        )
        # The query heads of one KV head stand where SDPA expects query positions: [n, Hkv, G, D]
        # against [n, Hkv, S, D] is grouped-query attention without repeating a key.
        query = q[rows].unflatten(1, (k_cache.shape[2], -1))
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        out[rows] = attended.flatten(1, 2)
    if 0 in lengths:
        out[context_lens == 0] = 0
    return out


def _groups(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Cut the batch into runs ``[first, last)`` of at most ``GATHERED_TOKENS`` padded tokens."""
    first, longest = 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > first and longest * (i + 1 - first) > GATHERED_TOKENS:
            yield first, i
            first, longest = i, length
    if lengths:
        yield first, len(lengths)


def _gather(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Copy the keys and values of some sequences out of their blocks, padded to the longest.

    Returns:
        keys and values ``[n, Hkv, S, D]`` and the mask ``[n, 1, 1, S]`` of the tokens that are
        there, or None when all are. What is not there is zero, whatever the cache holds.
    """
    block_size, longest = k_cache.shape[1], max(lengths)
    blocks = block_tables[:, : -(-longest // block_size)]
    mask = None
    if min(lengths) < longest:
        positions = torch.arange(blocks.shape[1] * block_size, device=blocks.device)
        mask = positions < context_lens[:, None]  # [n, S]
        # A block is in use when its first token is; an entry past the context is never followed.
        blocks = blocks.where(mask[:, ::block_size], 0)
        outside = (~mask).flatten().nonzero().squeeze(1)
    gathered = []
    for cache in (k_cache, v_cache):
        tokens = cache.index_select(0, blocks.flatten())
        if mask is not None:
            tokens.flatten(0, 1).index_fill_(0, outside, 0)  # 0 * NaN would be NaN
        padded = tokens.view(len(lengths), -1, *cache.shape[2:])
        gathered.append((padded if mask is not None else padded[:, :longest]).transpose(1, 2))
    return gathered[0], gathered[1], None if mask is None else mask[:, None, None]

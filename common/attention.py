"""Attention as the textbook has it: a mask that says who sees whom, and softmax(q·kᵀ)·v under it.

The stages before m4 use it for whatever their own kernels do not do. An explicit mask keeps them
simple, one rule serves prefill, decode and padding alike, and costs what m4 is about: on a GPU the
scores of all pairs go through memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# cuDNN prepares a plan for every new shape, tens of milliseconds, and here every step has a new
# one: the context has grown. The other implementations behind SDPA need no preparation.
torch.backends.cuda.enable_cudnn_sdp(False)


def causal_mask(positions: Tensor, num_keys: int) -> Tensor:
    """``[..., T, S]``, True where the query at a position may see the key at another.

    Args:
        positions: ``[..., T]``, where each query stands in its sequence.
        num_keys: S; keys stand at positions 0 to S-1.
    """
    return torch.arange(num_keys, device=positions.device) <= positions[..., None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention of every query to the keys its row of the mask shows.

    Args:
        q: ``[B, T, Hq, D]``; head h reads KV head ``h // (Hq // Hkv)``.
        k, v: ``[B, S, Hkv, D]``, of any strides.
        mask: ``[B, T, S]``, True where a query may look.

    Returns:
        ``[B, T, Hq, D]``.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    mask = mask[:, None]  # the same for all heads
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # SDPA wants heads before time: [B, Hkv, S, D]
    if num_queries == 1:
        # The query heads of one KV head stand where SDPA expects query positions: the same result
        # from a plain product, several times faster than its grouped path for a single position.
        grouped = q.view(batch, k.shape[1], -1, head_dim)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
        return out.reshape(batch, 1, num_heads, head_dim)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2)


def causal_self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one prompt to itself; q ``[T, Hq, D]``, k and v ``[T, Hkv, D]``."""
    mask = causal_mask(torch.arange(len(q), device=q.device), len(q))
    return masked_attention(q[None], k[None], v[None], mask[None])[0]

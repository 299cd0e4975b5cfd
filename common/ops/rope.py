"""Query/key norm, rotary embedding and the write into the paged KV cache, in one pass.

    q, k = qk_norm_rope(q, k, v, q_weight, k_weight, eps, cos, sin)
    q, k = qk_norm_rope(..., k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)

The twins are `common.layers.Ops.qk_norm_rope` and, of the cache, `reshape_and_cache` in a
milestone's kernels/reference.py. A head is held in registers as its two halves, which is all that
rotation asks for: (x1, x2) turns into (x1 cos - x2 sin, x2 cos + x1 sin).
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.launch import launch
from common.ops.layout import aligned_rows

MAX_HEADS = 8  # of one program
VALUES_PER_THREAD = 8  # of each half: one 16-byte load


@triton.jit
def normed_and_rotated(
    first,  # [HEADS, HALF], the first halves of some heads, in the model's dtype
    second,  # [HEADS, HALF], their second halves
    first_weight,  # [HEADS, HALF], of the norm; only if NORM
    second_weight,  # [HEADS, HALF]
    cos,  # [HEADS, HALF]
    sin,  # [HEADS, HALF], not negated
    eps,  # float32
    D: tl.constexpr,
    NORM: tl.constexpr,
):
    """Both halves after norm and rotation. Lanes beyond D / 2 must be, and stay, zero."""
    dtype: tl.constexpr = first.dtype
    x1, x2 = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        mean_square = tl.sum(x1 * x1 + x2 * x2, axis=1) / D
        scale = tl.rsqrt(mean_square + eps)[:, None]
        # Rounded to the dtype before the rotation, as the twin does.
        x1 = (x1 * scale * first_weight.to(tl.float32)).to(dtype).to(tl.float32)
        x2 = (x2 * scale * second_weight.to(tl.float32)).to(dtype).to(tl.float32)
    cos = cos.to(tl.float32)
    sin = sin.to(tl.float32)
    return (x1 * cos - x2 * sin).to(dtype), (x2 * cos + x1 * sin).to(dtype)


@triton.jit
def qk_norm_rope_kernel(
    q,  # [T, HQ, D], tokens Q_STRIDE apart
    k,  # [T, HKV, D], tokens K_STRIDE apart
    v,  # [T, HKV, D], tokens V_STRIDE apart; only if CACHE
    q_weight,  # [D], of the norms; only if NORM
    k_weight,  # [D]
    cos,  # [T, D], tokens COS_STRIDE apart
    sin,  # [T, D], tokens SIN_STRIDE apart, the first half of each negated
    q_out,  # [T, HQ, D]
    k_out,  # [T, HKV, D]
    k_cache,  # [num_slots, HKV, D]; only if CACHE
    v_cache,  # [num_slots, HKV, D]
    slot_mapping,  # [T] int64, -1 = keep this token out of the cache
    eps,  # float32
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    COS_STRIDE: tl.constexpr,
    SIN_STRIDE: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_HALF: tl.constexpr,  # the power of two from D / 2 up
    HEADS: tl.constexpr,  # of one program
    NORM: tl.constexpr,
    CACHE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program serves up to HEADS heads of one token: of q, of k, or (if CACHE) of v."""
    HALF: tl.constexpr = D // 2
    Q_GROUPS: tl.constexpr = (HQ + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (HKV + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    # Programs of q come first, then those of k, then those of v.
    is_q = group < Q_GROUPS
    is_v = group >= Q_GROUPS + KV_GROUPS
    group_start = 0 if is_q else (Q_GROUPS + KV_GROUPS if is_v else Q_GROUPS)
    head = ((group - group_start) * HEADS + tl.arange(0, HEADS))[:, None]
    half = tl.arange(0, PADDED_HALF)[None, :]
    inside = (head < (HQ if is_q else HKV)) & (half < HALF)
    offset = head * D + half

    # What the heads share is read once for each of them: a row in shared memory would cost every
    # program several barriers, and a second read of these few bytes comes from the L1 cache.
    shared = tl.broadcast_to(half, [HEADS, PADDED_HALF])
    weight = q_weight if is_q else k_weight
    first_weight = tl.load(weight + shared, mask=inside, other=0.0)
    second_weight = tl.load(weight + HALF + shared, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    turn_cos = tl.load(cos + token * COS_STRIDE + shared, mask=inside, other=0.0)
    turn_sin = tl.load(sin + token * SIN_STRIDE + HALF + shared, mask=inside, other=0.0)
    slot = tl.load(slot_mapping + token) if CACHE else -1
    x = q + token * Q_STRIDE if is_q else (v + token * V_STRIDE if is_v else k + token * K_STRIDE)
    first = tl.load(x + offset, mask=inside, other=0.0)
    second = tl.load(x + HALF + offset, mask=inside, other=0.0)
    if not is_v:
        first, second = normed_and_rotated(
            first, second, first_weight, second_weight, turn_cos, turn_sin, eps, D, NORM
        )
        out = q_out + token * (HQ * D) if is_q else k_out + token * (HKV * D)
        tl.store(out + offset, first, mask=inside)
        tl.store(out + HALF + offset, second, mask=inside)
    if CACHE and not is_q and slot >= 0:
        cache = (v_cache if is_v else k_cache) + slot * (HKV * D)
        tl.store(cache + offset, first, mask=inside)
        tl.store(cache + HALF + offset, second, mask=inside)


@dataclass(frozen=True)
class Tiling:
    """How a token's heads are dealt out."""

    heads: int  # of one program, a power of two
    q_groups: int  # programs that share the heads of q
    kv_groups: int  # and those of k, or of v
    padded_half: int  # lanes of half a head
    warps: int  # of one program


@lru_cache
def choose_tiling(num_heads: int, num_kv_heads: int, head_dim: int) -> Tiling:
    """As many heads to a program as k has, so that it is filled by q and by k alike."""
    heads = min(MAX_HEADS, triton.next_power_of_2(min(num_heads, num_kv_heads)))
    padded_half = triton.next_power_of_2(head_dim // 2)
    warps = max(1, heads * padded_half // (32 * VALUES_PER_THREAD))
    q_groups, kv_groups = triton.cdiv(num_heads, heads), triton.cdiv(num_kv_heads, heads)
    return Tiling(heads, q_groups, kv_groups, padded_half, warps)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    pdl: bool = False,
    check: bool = True,
) -> tuple[Tensor, Tensor]:
    """q and k normalised by head (where weights are given) and rotated; k and v also cached.

    Args:
        q: ``[T, Hq, D]``; k, v: ``[T, Hkv, D]``, slices of packed qkv or tensors of their own.
        q_weight, k_weight: ``[D]`` of the norms; None: no norm (Llama, Qwen2).
        cos, sin: ``[T, 1, D]`` as `common.rope.RotaryEmbedding` gives them.
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]``, written in place; None: nothing is
            cached, and v is not read.
        slot_mapping: ``[T]`` int64, each token's place in the caches; -1 skips the token.
        pdl: begin before the previous kernel has ended (see `common.ops.launch`).
        check: whether to look at the arguments, which differ between layers in nothing but values.

    Returns:
        New contiguous q ``[T, Hq, D]`` and k ``[T, Hkv, D]``.

    Raises:
        ValueError: shapes or dtypes do not belong together.
    """
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if check:
        _check(q, k, v, cos, sin, k_cache, v_cache, slot_mapping)
    q, k, cos, sin = aligned_rows(q), aligned_rows(k), aligned_rows(cos), aligned_rows(sin)
    q_out = torch.empty((tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    k_out = torch.empty((tokens, num_kv_heads, head_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return q_out, k_out
    norm, cache = q_weight is not None, k_cache is not None
    # No kernel parameter may be None: what is not there is never read.
    if not norm:
        q_weight = k_weight = cos
    if cache:
        v = aligned_rows(v)
    else:
        k_cache = v_cache = v = k
        slot_mapping = cos
    tiling = choose_tiling(num_heads, num_kv_heads, head_dim)
    groups = tiling.q_groups + (2 if cache else 1) * tiling.kv_groups
    launch(
        qk_norm_rope_kernel,
        (tokens, groups, 1),
        (q, k, v, q_weight, k_weight, cos, sin, q_out, k_out, k_cache, v_cache, slot_mapping, eps),
        (
            *(q.stride(0), k.stride(0), v.stride(0), cos.stride(0), sin.stride(0)),
            *(num_heads, num_kv_heads, head_dim, tiling.padded_half, tiling.heads),
            *(norm, cache, pdl),
        ),
        num_warps=tiling.warps,
        pdl=pdl,
    )
    return q_out, k_out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    slot_mapping: Tensor | None,
) -> None:
    """Raise ValueError on arguments that the kernel would misread."""
    tokens, _, head_dim = q.shape
    if head_dim % 2:
        raise ValueError(f"heads are rotated by halves: their size must be even, not {head_dim}")
    if k.shape[0] != tokens or k.shape[2] != head_dim:
        raise ValueError(f"k {list(k.shape)} does not belong to q {list(q.shape)}")
    if not cos.shape == sin.shape == (tokens, 1, head_dim):
        raise ValueError(
            f"cos and sin must be [{tokens}, 1, {head_dim}], "
            f"not {list(cos.shape)} and {list(sin.shape)}"
        )
    if k_cache is None:
        return
    if v_cache is None or slot_mapping is None:
        raise ValueError("k_cache, v_cache and slot_mapping go together")
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        row = (tokens, *cache.shape[2:])
        if x.shape != row or x.dtype != cache.dtype or not cache.is_contiguous():
            raise ValueError(
                f"{name}_cache must be contiguous [num_blocks, block_size, Hkv, D] for {name} "
                f"{list(x.shape)} in {x.dtype}, not {list(cache.shape)} in {cache.dtype}"
            )
    if slot_mapping.shape != (tokens,) or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"slot_mapping must be [{tokens}] int64, "
            f"not {list(slot_mapping.shape)} {slot_mapping.dtype}"
        )

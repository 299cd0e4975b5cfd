"""Decode attention over a paged cache: split by a work list, combined by whoever comes last.

Flash-Decoding (Dao et al. 2023) with three changes to m3's kernel, whose inner loop it keeps:

* Work is cut by a list made from the lengths of the batch (``decode_plan``), not into equally many
  splits a sequence, so that neither a ragged batch nor a single sequence leaves the GPU waiting.
* There is no second kernel for the results of the items: the last program of a sequence that
  arrives at a counter merges them, always in the same order, so that results are reproducible.
* ``flash_decode_fused`` also computes what comes before attention: q/k norm, rotation, the write
  into the cache. Every program does so for its own query; the new key and value, which only the
  last item of a sequence attends to, go straight into the softmax's state, not through memory.

With programmatic dependent launch, programs begin while the kernel before is still running. They
read the plan, the block tables and old keys and values (into L2) before ``gdc_wait``, which is safe
if a kernel launched *without* ``pdl`` stands between whatever writes those and the first attention
of a step. The embedding lookup is one. Everything else is read or written behind the wait.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers)

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.launch import launch
from common.ops.layout import aligned_rows, power_of_2

from .decode_parts import (
    attend_to_cache,
    finish,
    normed_and_rotated,
    places,
    prefetch,
    read_item,
    weigh,
)
from .decode_plan import ENTRY, HEAD_ROWS, DecodePlan
from .launch import check_paged_attention, check_reshape_and_cache


class Tiling(NamedTuple):
    """How a program walks through its tokens: in tiles of so many, by so many warps."""

    tokens: int
    warps: int
    stages: int  # of the pipeline: one tile is computed while stages - 1 are being loaded
    early: bool = False  # fused: read the first tile before q and k are there
    prefetch: int = 0  # launched early: tokens that are brought to the L2 cache meanwhile


def choose_tiling(batch: int, is_long: bool, padded_head_dim: int, dtype: torch.dtype) -> Tiling:
    """What was fastest on an H200 (dev/milestone_4.md), several programs to a multiprocessor.

    Long contexts ask for tiles that keep the memory busy, short ones for little to wait for: with
    few sequences the first tile is read early, with very many the programs are small.
    """
    if dtype == torch.float32:  # on plain cores, operands in registers: tiles of 8 KB
        return Tiling(max(16, min(64, 2048 // padded_head_dim)), 4, 2)
    wide, narrow = (max(16, min(n, n * 128 // padded_head_dim)) for n in (64, 32))
    if is_long:
        return Tiling(narrow, 2, 4, prefetch=128) if batch < 48 else Tiling(wide, 4, 2)
    if batch < 24:
        return Tiling(wide, 4, 3, early=True)
    if batch < 64:
        return Tiling(wide, 4, 2, early=True, prefetch=64)
    return Tiling(wide, 4, 2, prefetch=64) if batch < 192 else Tiling(narrow, 2, 3)


@triton.jit(do_not_specialize=["table_stride"])
def flash_decode_kernel(
    q,  # [B, HQ, D], sequences Q_STRIDE apart
    k_cache,  # [num_blocks, BLOCK_SIZE, HKV, D]
    v_cache,  # [num_blocks, BLOCK_SIZE, HKV, D]
    block_tables,  # [B, max_blocks] int32, rows table_stride apart
    items,  # [N, ENTRY] int32, and the rest of a DecodePlan
    num_items,  # [1] int32
    arrivals,  # [B, programs] int32
    partial,  # float32 [N, HQ, D]
    log_sums,  # float32 [N, HQ]
    out,  # [B, HQ, D]
    scale_log2,  # softmax scale * log2(e): exponentials are powers of two
    table_stride,
    Q_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one KV head
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,  # the next power of two
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # query heads of one program, GROUP of them used
    USED_ROWS: tl.constexpr,
    TILE: tl.constexpr,  # tokens read in one turn
    ENTRY: tl.constexpr,
    PREFETCH: tl.constexpr,  # tokens
    PDL: tl.constexpr,
):
    """Attention of up to ROWS query heads of one KV head over one item of the plan."""
    item = tl.program_id(1)
    sequence, begin, end, first_item, count = read_item(items, item, ENTRY)
    if item >= tl.load(num_items):
        return
    PARTS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    kv_head = tl.program_id(0) // PARTS
    first_row = (tl.program_id(0) % PARTS) * ROWS
    k_head = k_cache + kv_head * D
    v_head = v_cache + kv_head * D
    table = block_tables + sequence * table_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch(k_head, v_head, table, begin, end, HKV, D, PADDED_D, BLOCK_SIZE, PREFETCH)
        tl.extra.cuda.gdc_wait()

    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_D)
    query = tl.load(
        q + sequence * Q_STRIDE + (kv_head * GROUP + row)[:, None] * D + column[None, :],
        mask=(row < GROUP)[:, None] & (column < D)[None, :],
        other=0.0,
    )
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, PADDED_D], tl.float32)
    maximum, total, weighted = attend_to_cache(
        query, maximum, total, weighted, k_head, v_head, table, begin, end, scale_log2,
        HKV, D, PADDED_D, BLOCK_SIZE, TILE,
    )  # fmt: skip
    finish(
        maximum, total, weighted, arrivals, partial, log_sums, out,
        sequence, item, first_item, count, kv_head, first_row,
        GROUP, HKV, D, PADDED_D, ROWS, USED_ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride"])
def flash_decode_fused_kernel(
    q,  # [B, HQ, D], sequences Q_STRIDE apart, before norm and rotation
    k,  # [B, HKV, D], sequences K_STRIDE apart, likewise
    v,  # [B, HKV, D], sequences V_STRIDE apart
    q_weight,  # [D], of the norms; only if NORM
    k_weight,  # [D]
    cos,  # [B, D], sequences COS_STRIDE apart
    sin,  # [B, D], sequences SIN_STRIDE apart, the first half of each negated
    k_cache,  # [num_blocks, BLOCK_SIZE, HKV, D]
    v_cache,  # [num_blocks, BLOCK_SIZE, HKV, D]
    block_tables,  # [B, max_blocks] int32, rows table_stride apart
    slot_mapping,  # [B] int64, -1 = do not store
    items,  # [N, ENTRY] int32, and the rest of a DecodePlan
    num_items,  # [1] int32
    arrivals,  # [B, programs] int32
    partial,  # float32 [N, HQ, D]
    log_sums,  # float32 [N, HQ]
    out,  # [B, HQ, D]
    eps,  # float32
    scale_log2,  # softmax scale * log2(e): exponentials are powers of two
    table_stride,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    COS_STRIDE: tl.constexpr,
    SIN_STRIDE: tl.constexpr,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one KV head
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,  # the next power of two
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # query heads of one program, GROUP of them used
    USED_ROWS: tl.constexpr,
    TILE: tl.constexpr,  # tokens read in one turn
    ENTRY: tl.constexpr,
    PREFETCH: tl.constexpr,  # tokens
    PDL: tl.constexpr,
    EARLY: tl.constexpr,  # whether the first tile is read before gdc_wait
):
    """The same, with norm and rotation before it and the new token from k and v."""
    item = tl.program_id(1)
    sequence, begin, end, first_item, count = read_item(items, item, ENTRY)
    if item >= tl.load(num_items):
        return
    # The sequence's last token is the new one, which is not in the cache yet.
    has_new = (item - first_item == count - 1) & (end > 0)
    end_cached = end - has_new.to(tl.int32)
    PARTS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    kv_head = tl.program_id(0) // PARTS
    first_row = (tl.program_id(0) % PARTS) * ROWS
    k_head = k_cache + kv_head * D
    v_head = v_cache + kv_head * D
    table = block_tables + sequence * table_stride
    ahead = begin
    if EARLY:
        first_token = begin + tl.arange(0, TILE)
        first_block = tl.load(
            table + first_token // BLOCK_SIZE, mask=first_token < end_cached, other=0
        )
        place, inside = places(
            first_block, first_token, end_cached, HKV, D, PADDED_D, BLOCK_SIZE
        )
        first_key = tl.load(k_head + place, mask=inside, other=0.0)
        first_value = tl.load(v_head + place, mask=inside, other=0.0)
        ahead += TILE
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch(
                k_head, v_head, table, ahead, end_cached, HKV, D, PADDED_D, BLOCK_SIZE, PREFETCH
            )
        tl.extra.cuda.gdc_wait()

    # All loads in tiles of one shape, and before anything is done with them: one wait for all.
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_D)
    inside = (column < D)[None, :]
    used = (row < GROUP)[:, None] & inside
    same = tl.broadcast_to(column[None, :], [ROWS, PADDED_D])  # one vector in all rows
    swapped = tl.broadcast_to(((column + D // 2) % D)[None, :], [ROWS, PADDED_D])
    cos_row = tl.load(cos + sequence * COS_STRIDE + same, mask=inside, other=0.0)
    sin_row = tl.load(sin + sequence * SIN_STRIDE + same, mask=inside, other=0.0)
    query_row = q + sequence * Q_STRIDE + (kv_head * GROUP + row)[:, None] * D
    query = tl.load(query_row + same, mask=used, other=0.0)
    query_partner = tl.load(query_row + swapped, mask=used, other=0.0)
    key_row = k + sequence * K_STRIDE + kv_head * D
    new_key = tl.load(key_row + same, mask=inside, other=0.0)
    key_partner = tl.load(key_row + swapped, mask=inside, other=0.0)
    new_value = tl.load(v + sequence * V_STRIDE + kv_head * D + same, mask=inside, other=0.0)
    if NORM:
        q_own = tl.load(q_weight + same, mask=inside, other=0.0)
        q_partner = tl.load(q_weight + swapped, mask=inside, other=0.0)
        k_own = tl.load(k_weight + same, mask=inside, other=0.0)
        k_partner = tl.load(k_weight + swapped, mask=inside, other=0.0)
    else:
        q_own, q_partner, k_own, k_partner = query, query, query, query
    slot = tl.load(slot_mapping + sequence)
    query = normed_and_rotated(
        query, query_partner, q_own, q_partner, cos_row, sin_row, eps, D, NORM
    )
    new_key = normed_and_rotated(
        new_key, key_partner, k_own, k_partner, cos_row, sin_row, eps, D, NORM
    )

    # The softmax begins with the new token in the item that has it: its exponential is 1.
    score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1) * scale_log2
    maximum = tl.where(has_new, score, float("-inf"))
    total = tl.where(has_new, tl.full([ROWS], 1.0, tl.float32), 0.0)
    weighted = tl.where(has_new, new_value.to(tl.float32), 0.0)
    if EARLY:
        maximum, total, weights, shrink = weigh(
            query, first_key, first_token < end_cached, maximum, total, scale_log2
        )
        weighted = weighted * shrink[:, None] + tl.dot(
            weights.to(first_value.dtype), first_value, input_precision="ieee"
        )
    maximum, total, weighted = attend_to_cache(
        query, maximum, total, weighted, k_head, v_head, table, ahead, end_cached, scale_log2,
        HKV, D, PADDED_D, BLOCK_SIZE, TILE,
    )  # fmt: skip
    if has_new & (slot >= 0) & (first_row == 0):
        once = (row == 0)[:, None] & inside
        tl.store(k_head + slot * (HKV * D) + same, new_key, mask=once)
        tl.store(v_head + slot * (HKV * D) + same, new_value, mask=once)
    finish(
        maximum, total, weighted, arrivals, partial, log_sums, out,
        sequence, item, first_item, count, kv_head, first_row,
        GROUP, HKV, D, PADDED_D, ROWS, USED_ROWS,
    )  # fmt: skip


def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    plan: DecodePlan,
    scale: float,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
    check: bool = True,
) -> Tensor:
    """See ``reference.paged_attention``, the twin; the lengths are those of the plan.

    Args:
        plan: of this batch and this model, see ``decode_plan.plan_decode``.
        check: whether to look at the arguments, which differ between layers in nothing but values.
        pdl: begin before the previous kernel has ended; see above what that asks for.

    Raises:
        ValueError: shapes, dtypes or strides that the kernel would misread.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if check:
        check_paged_attention(q, k_cache, v_cache, block_tables, plan.context_lens, out)
    if len(q) == 0:
        return out
    q = aligned_rows(q)
    _launch(
        flash_decode_kernel,
        (q, k_cache, v_cache, block_tables),
        (scale * math.log2(math.e), block_tables.stride(0)),
        (q.stride(0),),
        k_cache, plan, out, pdl,
    )  # fmt: skip
    return out


def flash_decode_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    slot_mapping: Tensor,
    plan: DecodePlan,
    scale: float,
    *,
    pdl: bool = False,
) -> Tensor:
    """Norm and rotate q and k, store k and v, attend to all tokens including the new one.

    The twin is ``Ops.qk_norm_rope``, ``reference.reshape_and_cache`` and
    ``reference.paged_attention`` one after the other.

    Args:
        q: ``[B, Hq, D]``; k, v: ``[B, Hkv, D]``: slices of packed qkv, one token a sequence.
        q_weight, k_weight: ``[D]`` of the norms; None: no norm (Llama, Qwen2).
        cos, sin: ``[B, 1, D]`` as `common.rope.RotaryEmbedding` gives them.
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]``; the new token is written in place.
        block_tables: ``[B, max_blocks]`` int32. Entries past a context are never read.
        slot_mapping: ``[B]`` int64, the new token's slot; -1: it is attended to but not stored.
        plan: of lengths that count the new token; 0 marks a padded row: its output is zeros.
        scale: factor on the scores before the softmax.
        pdl: begin before the previous kernel has ended; see above what that asks for.

    Returns:
        ``[B, Hq, D]``, the dtype of ``q``.

    Raises:
        ValueError: shapes, dtypes or strides that the kernel would misread.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_paged_attention(q, k_cache, v_cache, block_tables, plan.context_lens, out)
    check_reshape_and_cache(k, v, k_cache, v_cache, slot_mapping)
    _check_rotation(q, cos, sin)
    if len(q) == 0:
        return out
    q, k, v, cos, sin = (aligned_rows(x) for x in (q, k, v, cos, sin))
    norm = q_weight is not None
    if not norm:
        q_weight = k_weight = cos  # no kernel parameter may be None; these are not read
    _launch(
        flash_decode_fused_kernel,
        (q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, block_tables, slot_mapping),
        (eps, scale * math.log2(math.e), block_tables.stride(0)),
        (*(x.stride(0) for x in (q, k, v, cos, sin)), norm),
        k_cache, plan, out, pdl,
    )  # fmt: skip
    return out


def _launch(
    kernel: triton.JITFunction,
    inputs: tuple[Tensor, ...],
    numbers: tuple[float | int, ...],
    constants: tuple[int | bool, ...],
    k_cache: Tensor,
    plan: DecodePlan,
    out: Tensor,
    pdl: bool,
) -> None:
    """Launch either kernel with its own parameters and those that both have."""
    _, num_heads, head_dim = out.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    group = num_heads // num_kv_heads
    programs = num_kv_heads * -(-group // HEAD_ROWS)
    if plan.partial.shape[1:] != out.shape[1:] or plan.programs != programs:
        raise ValueError(
            f"the plan is for heads {list(plan.partial.shape[1:])} and {plan.programs} programs, "
            f"not for {[num_heads, head_dim]} and {programs}: make it with this model's shape"
        )
    padded_head_dim = max(16, power_of_2(head_dim))
    tiling = choose_tiling(len(out), plan.is_long, padded_head_dim, out.dtype)
    workspace = (plan.items, plan.num_items, plan.arrivals, plan.partial, plan.log_sums)
    with torch.cuda.device_of(out):
        launch(
            kernel,
            (programs, len(plan.items), 1),
            (*inputs, *workspace, out, *numbers),
            (
                *constants, group, num_kv_heads, head_dim, padded_head_dim, block_size, HEAD_ROWS,
                min(power_of_2(group), HEAD_ROWS), tiling.tokens, ENTRY,
                tiling.prefetch, pdl,
                *((tiling.early,) if kernel is flash_decode_fused_kernel else ()),
            ),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            pdl=pdl,
        )  # fmt: skip


def _check_rotation(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    batch, _, head_dim = q.shape
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape != (batch, 1, head_dim) or x.stride(2) != 1 or x.dtype != q.dtype:
            raise ValueError(
                f"{name} must be [{batch}, 1, {head_dim}] in {q.dtype} with its last dimension "
                f"contiguous, got {list(x.shape)} in {x.dtype} with strides {x.stride()}"
            )

"""Flash prefill in Triton: causal attention of packed prompts, cached context in front or not.

FlashAttention (Dao et al. 2022, 2023): a program keeps one tile of queries and walks over the keys,
a tile at a time, with a running maximum and sum, so that scores never leave the multiprocessor and
memory grows with the tokens, not with their pairs. What decides the speed here:

* A tile holds some tokens with all query heads of one KV head. The heads share what is read, and
  the tile spans fewer tokens, so that less of the diagonal is computed in vain.
* Fresh keys are contiguous: on Hopper and later tensor descriptors (TMA) bring whole tiles without
  a single address computed by the threads. Cached keys lie in pages, which takes a pointer a row.
* Only tiles on the diagonal are masked, and the one that the context ends in. Those behind a
  sequence's end may hold a neighbour's NaN, and 0 * NaN is NaN: the last tile alone has its values
  cleared.
* Long items are started first; where they are few, keys are cut and partial results merged. Where
  many queries share a long context, copying its pages together first costs less than the pointers.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from common.ops.launch import launch, supports_pdl
from common.ops.layout import ALIGNMENT, power_of_2

from .prefill_parts import MERGE_ROWS, gather_kernel, merge_kernel
from .prefill_plan import COPY_TOKENS, PrefillPlan, check_prefill


@triton.jit
def load_rows(
    x,  # [rows, HKV, D]: pointer to the first row, or descriptor of [HKV, rows, D]
    kv_head,
    row,  # first row, int32
    end,  # rows from here on belong to others
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    STRIDE: tl.constexpr,  # elements between rows
    TILE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    CLEAR: tl.constexpr,  # by descriptor: whether to zero rows from `end` on; else they always are
):
    """TILE rows of one KV head, [TILE, PADDED_D]."""
    rows = row + tl.arange(0, TILE)
    if DESCRIPTOR:
        tile = tl.reshape(x.load([kv_head, row, 0]), [TILE, PADDED_D])
        if CLEAR:
            tile = tl.where((rows < end)[:, None], tile, 0.0)
    else:
        column = tl.arange(0, PADDED_D)
        place = rows.to(tl.int64)[:, None] * STRIDE + column[None, :]
        inside = (rows < end)[:, None] & (column < D)[None, :]
        tile = tl.load(x + kv_head * D + place, mask=inside, other=0.0)
    return tile


@triton.jit
def key_places(tile, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Of each key of a tile: its block's place in the table, and its own in that block, [TILE]."""
    index = tl.arange(0, TILE)
    if TILE % BLOCK_SIZE == 0:  # then the second one is the same in every tile
        place = tile * (TILE // BLOCK_SIZE) + index // BLOCK_SIZE
        in_block = index % BLOCK_SIZE
    else:
        place = (tile * TILE + index) // BLOCK_SIZE
        in_block = (tile * TILE + index) % BLOCK_SIZE
    return place, in_block


@triton.jit
def accumulate(scores, value, maximum, total, weighted, scale_log2, EMPTY: tl.constexpr):
    """One turn of the online softmax: the new maximum, sum of weights, and weighted values.

    total: [ROWS], or [ROWS, 8] to add it up at the end: the threads that share a row then exchange
        nothing but its maximum.
    EMPTY: whether a row may have seen no key yet.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale_log2)
    finite = new_maximum
    if EMPTY:  # such a row keeps -inf; a finite stand-in makes its weights zero, not NaN
        finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores * scale_log2 - finite[:, None])
    shrink = tl.exp2(maximum - finite)
    if len(total.shape) == 2:
        eighths = weights.reshape([weights.shape[0], weights.shape[1] // 8, 8])
        total = total * shrink[:, None] + tl.sum(eighths, axis=1)
    else:
        total = total * shrink + tl.sum(weights, axis=1)
    weighted = weighted * shrink[:, None]
    # "ieee": a float32 product in full precision, not in the tensor cores' tf32
    weighted = tl.dot(weights.to(value.dtype), value, weighted, input_precision="ieee")
    return new_maximum, total, weighted


@triton.jit(do_not_specialize=["table_stride"])
def flash_prefill_kernel(
    q,  # [T, HKV * GROUP, D], rows Q_STRIDE apart
    k,  # [rows, HKV, D], rows K_STRIDE apart: pointer or descriptor
    v,  # [rows, HKV, D], rows V_STRIDE apart: pointer or descriptor
    k_cache,  # [num_blocks, BLOCK_SIZE, HKV, D]
    v_cache,  # [num_blocks, BLOCK_SIZE, HKV, D]
    block_tables,  # [B, max_blocks] int32, rows table_stride apart
    items,  # [N, 12] int32, see prefill_plan
    out,  # [T, HKV * GROUP, D]
    partial,  # float32 [num_slots, HKV, ROWS, D]
    log_sums,  # float32 [num_slots, HKV, ROWS], log2 of the sum of exponentials
    scale_log2,  # softmax scale * log2(e): exponentials are powers of two
    table_stride,
    GROUP: tl.constexpr,  # query heads of one KV head
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,  # the next power of two
    BLOCK_SIZE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,  # queries of a tile
    TILE: tl.constexpr,  # keys of a tile
    DESCRIPTOR: tl.constexpr,
    PAGED: tl.constexpr,  # whether any item reads cached keys
    SPLIT: tl.constexpr,  # whether any item is one of several of its tile
    PDL: tl.constexpr,  # whether the merge may come and wait before this has ended
):
    """Attention of one tile of queries, for one KV head, to some tiles of keys."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0)
    item = items + tl.program_id(1) * 12
    sequence = tl.load(item)
    query_start = tl.load(item + 1)  # the sequence's first row in q
    cached = tl.load(item + 2)  # keys that are read through the block table
    key_start = tl.load(item + 3)  # the sequence's first row in k and v
    offset = tl.load(item + 4)  # of these rows, how many come before the fresh ones
    num_keys = tl.load(item + 5)  # how many there are in all
    first = tl.load(item + 6)  # the tile's first token, counted in the sequence's fresh ones
    last = tl.load(item + 7)
    begin = tl.load(item + 8)  # tiles of keys, cached ones before the others
    end = tl.load(item + 9)
    slot = tl.load(item + 10)  # of a partial result; -1: the result is complete
    cached_tiles = tl.load(item + 11)

    index = tl.arange(0, ROWS)
    token = first + index // GROUP
    used = (token < last) & (index < ROWS // GROUP * GROUP)
    column = tl.arange(0, PADDED_D)
    head = kv_head * GROUP + index % GROUP
    query_row = (query_start + token).to(tl.int64)
    in_tile = used[:, None] & (column < D)[None, :]
    query = tl.load(
        q + query_row[:, None] * Q_STRIDE + (head * D)[:, None] + column[None, :],
        mask=in_tile,
        other=0.0,
    )  # [ROWS, PADDED_D]

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, PADDED_D], tl.float32)

    if PAGED:
        table = block_tables + sequence.to(tl.int64) * table_stride
        ROW: tl.constexpr = HKV * D  # elements between two tokens of a block
        in_row = kv_head * D + column[None, :]
        in_head = column[None, :] < D
        # Tiles that the context fills: no masks, which would be many of a turn's instructions.
        # Block ids are read a turn ahead, or every turn would begin by waiting for them.
        num_filled = tl.minimum(end, cached // TILE)
        # By eighths, where registers allow that: Hopper and later, common head sizes.
        EIGHTHS: tl.constexpr = DESCRIPTOR and PADDED_D <= 128
        totals = tl.zeros([ROWS, 8] if EIGHTHS else [ROWS], tl.float32)
        entry, _ = key_places(begin, TILE, BLOCK_SIZE)
        block = tl.load(table + entry, mask=begin < num_filled, other=0)
        for tile in range(begin, num_filled):
            entry, _ = key_places(tl.minimum(tile + 1, num_filled - 1), TILE, BLOCK_SIZE)
            next_block = tl.load(table + entry)
            _, in_block = key_places(tile, TILE, BLOCK_SIZE)
            offset_in_block = in_block[:, None] * ROW + in_row
            block_start = block.to(tl.int64)[:, None] * (BLOCK_SIZE * ROW)
            key = tl.load(k_cache + offset_in_block + block_start, mask=in_head, other=0.0)
            value = tl.load(v_cache + offset_in_block + block_start, mask=in_head, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            maximum, totals, weighted = accumulate(
                scores, value, maximum, totals, weighted, scale_log2, False
            )
            block = next_block
        total = tl.sum(totals, axis=1) if EIGHTHS else totals
        # The tile that the context ends in. (A branch would keep all of it in registers.)
        for tile in range(tl.maximum(begin, cached // TILE), tl.minimum(end, cached_tiles)):
            exists = tile * TILE + tl.arange(0, TILE) < cached
            # A block id past the context is garbage: `other` stands in, no key is read through it.
            entry, in_block = key_places(tile, TILE, BLOCK_SIZE)
            block = tl.load(table + entry, mask=exists, other=0)
            row_start = (block.to(tl.int64) * BLOCK_SIZE + in_block) * ROW
            inside = exists[:, None] & in_head
            key = tl.load(k_cache + row_start[:, None] + in_row, mask=inside, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            scores = tl.where(exists[None, :], scores, float("-inf"))
            value = tl.load(v_cache + row_start[:, None] + in_row, mask=inside, other=0.0)
            maximum, total, weighted = accumulate(
                scores, value, maximum, total, weighted, scale_log2, False
            )

    # From here on keys are counted from key_start; query `token` sees those up to offset + token.
    visible = offset + token
    begin_key = tl.maximum(begin - cached_tiles, 0) * TILE
    end_key = tl.minimum(tl.maximum(end - cached_tiles, 0) * TILE, offset + last)
    # Every tile but a sequence's last one is full. Behind its end stand the next sequence's keys:
    # a load by pointers leaves them out, a descriptor knows no sequences, and a turn of its own
    # clears them.
    whole = num_keys // TILE * TILE if DESCRIPTOR else end_key
    stop = key_start + num_keys
    for here in range(begin_key, tl.minimum(end_key, whole), TILE):
        row = key_start + here
        key = load_rows(k, kv_head, row, stop, D, PADDED_D, K_STRIDE, TILE, DESCRIPTOR, False)
        value = load_rows(v, kv_head, row, stop, D, PADDED_D, V_STRIDE, TILE, DESCRIPTOR, False)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if here + TILE > offset + first + 1:  # on the diagonal
            seen = (here + tl.arange(0, TILE))[None, :] <= visible[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        maximum, total, weighted = accumulate(
            scores, value, maximum, total, weighted, scale_log2, True
        )
    if DESCRIPTOR:
        here = tl.maximum(begin_key, whole)
        if here < end_key:
            row = key_start + here
            key = load_rows(k, kv_head, row, stop, D, PADDED_D, K_STRIDE, TILE, True, True)
            value = load_rows(v, kv_head, row, stop, D, PADDED_D, V_STRIDE, TILE, True, True)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            seen = (here + tl.arange(0, TILE))[None, :] <= visible[:, None]
            scores = tl.where(seen, scores, float("-inf"))
            maximum, total, weighted = accumulate(
                scores, value, maximum, total, weighted, scale_log2, True
            )

    total = tl.where(total > 0, total, 1.0)  # a row that is not used, or sees no key of this item
    result = weighted / total[:, None]
    if SPLIT and slot >= 0:
        target = (slot.to(tl.int64) * HKV + kv_head) * ROWS + index
        tl.store(log_sums + target, maximum + tl.log2(total))
        tl.store(partial + target[:, None] * D + column[None, :], result, mask=in_tile)
    else:
        target = query_row * (HKV * GROUP) + head
        place = target[:, None] * D + column[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=in_tile)


def flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    plan: PrefillPlan,
    scale: float,
    *,
    out: Tensor | None = None,
    check: bool = True,
) -> Tensor:
    """See ``prefill_reference.paged_prefill``; the lengths stand in ``plan``.

    Args:
        plan: of ``plan_prefill``, its table on the device of ``q``.
        check: whether to look at the arguments, which differ between layers in nothing but values.

    Raises:
        ValueError: arguments that the kernel would misread.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if check:
        check_prefill(q, k, v, k_cache, v_cache, block_tables, plan, scale, out)
    if plan.num_items == 0:
        return out
    _, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    padded_head_dim = max(16, power_of_2(head_dim))
    heads = num_heads // num_kv_heads, num_kv_heads, head_dim, padded_head_dim
    items, merges, copies = plan.parts
    shape = plan.shape
    with torch.cuda.device_of(q):
        if plan.num_copies:
            k, v = _gather(k, v, k_cache, v_cache, block_tables, copies, plan)
        strides = k.stride(0), v.stride(0)
        descriptors = uses_descriptors(k, v)
        if descriptors:
            block = [1, shape.keys, padded_head_dim]
            k, v, strides = _descriptor(k, block), _descriptor(v, block), (0, 0)
        partial, log_sums = out, out
        if plan.num_merges:
            rows = (plan.num_slots, num_kv_heads, shape.rows)
            partial = torch.empty((*rows, head_dim), dtype=torch.float32, device=q.device)
            log_sums = torch.empty(rows, dtype=torch.float32, device=q.device)
        pdl = plan.num_merges > 0 and supports_pdl(q.device)
        launch(
            flash_prefill_kernel,
            (num_kv_heads, plan.num_items, 1),
            (
                q, k, v, k_cache, v_cache, block_tables, items, out, partial, log_sums,
                scale * math.log2(math.e), block_tables.stride(0),
            ),
            (
                *heads, block_size, q.stride(0), *strides, shape.rows, shape.keys,
                descriptors, plan.paged, plan.num_merges > 0, pdl,
            ),
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )  # fmt: skip
        if plan.num_merges:
            rows = min(MERGE_ROWS, shape.rows)
            launch(
                merge_kernel,
                (num_kv_heads, plan.num_merges, shape.rows // rows),
                (partial, log_sums, merges, out),
                (*heads, shape.rows, rows, pdl),
                num_warps=1,
                pdl=pdl,
            )
    return out


def _gather(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    copies: Tensor,
    plan: PrefillPlan,
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[num_keys, Hkv, D]`` of all sequences as the plan lays them out."""
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    k_out, v_out = (
        torch.empty((plan.num_keys, num_kv_heads, head_dim), dtype=k.dtype, device=k.device)
        for _ in range(2)
    )
    padded_head_dim = power_of_2(head_dim)
    launch(
        gather_kernel,
        (num_kv_heads, plan.num_copies, 1),
        (k, v, k_cache, v_cache, block_tables, copies, k_out, v_out, block_tables.stride(0)),
        (num_kv_heads, head_dim, padded_head_dim, block_size, k.stride(0), v.stride(0),
         COPY_TOKENS),
        num_warps=4,
    )  # fmt: skip
    return k_out, v_out


@lru_cache
def _has_tma(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def uses_descriptors(k: Tensor, v: Tensor) -> bool:
    """Whether whole tiles are read by tensor descriptors: half precision, Hopper and later.

    The hardware wants rows and heads at multiples of 16 bytes.
    """
    rows = ALIGNMENT // k.element_size()
    aligned = not (k.stride(0) % rows or v.stride(0) % rows or k.shape[2] % rows)
    return k.dtype != torch.float32 and aligned and _has_tma(k.device)


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """``x`` ``[T, Hkv, D]`` with the heads in front: a tile is then one head's, of any D."""
    tokens, heads, head_dim = x.shape
    return TensorDescriptor(x, [heads, tokens, head_dim], [head_dim, x.stride(0), 1], block)

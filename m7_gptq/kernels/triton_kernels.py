"""Paged attention in Triton: write new keys and values, and decode by split-KV attention.

The decode kernel is FlashAttention's online softmax over a sequence's blocks, cut along the context
so that a small batch fills the GPU too (Flash-Decoding). What it waits for is memory: every key and
value is read once and used for one query token. So the design is about loads in flight:

* One program serves all query heads of a KV head; they share every byte read. ``tl.dot`` wants at
  least 16 rows, so the heads are padded to 16: wasted arithmetic is free while memory is the limit,
  and one path then serves every ratio, 1 included. More than 16 heads go to several programs.
* A tile's block ids are read one turn ahead and carried through the loop. Looked up in the turn
  that needs them, the pipeliner would have to hide two loads in a row, and hides neither.
* Small programs (4 warps, 2 stages, tiles of at most 16 KB) so that several share a multiprocessor.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_paged_attention, check_reshape_and_cache, choose_num_splits

HEAD_ROWS = 16  # query heads of one program: the smallest left side that tl.dot takes
MAX_TILE_TOKENS = 64
MAX_TILE_VALUES = 8 * 1024  # of a tensor-core product; 16 KB
MAX_TILE_VALUES_FLOAT32 = 2 * 1024  # full float32 runs on plain cores, operands in registers


@triton.jit
def reshape_and_cache_kernel(
    k,  # [T, Hkv * D], rows k_stride apart
    v,  # [T, Hkv * D], rows v_stride apart
    k_cache,  # [num_slots, Hkv * D]
    v_cache,  # [num_slots, Hkv * D]
    slot_mapping,  # [T] int64, -1 = skip
    k_stride,
    v_stride,
    ROW: tl.constexpr,  # Hkv * D
    PADDED_ROW: tl.constexpr,  # the next power of two
):
    """One program copies one token's keys and values to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        column = tl.arange(0, PADDED_ROW)
        inside = column < ROW
        key = tl.load(k + token * k_stride + column, mask=inside)
        value = tl.load(v + token * v_stride + column, mask=inside)
        tl.store(k_cache + slot * ROW + column, key, mask=inside)
        tl.store(v_cache + slot * ROW + column, value, mask=inside)


@triton.jit
def tokens_per_split(length, num_splits, TILE: tl.constexpr):
    """Length of each piece of a context of ``length`` tokens: whole tiles, as even as they get."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, num_splits), TILE), 1) * TILE


@triton.jit(do_not_specialize=["num_splits", "table_stride"])
def paged_attention_kernel(
    q,  # [B, Hq, D], sequences q_stride apart
    k_cache,  # [num_blocks, BLOCK_SIZE, HKV, D]
    v_cache,  # [num_blocks, BLOCK_SIZE, HKV, D]
    block_tables,  # [B, max_blocks] int32, rows table_stride apart
    context_lens,  # [B] int32
    out,  # SPLIT: float32 [B, Hq, num_splits, D]; otherwise [B, Hq, D]
    log_sums,  # SPLIT: float32 [B, Hq, num_splits], log2 of the sum of exponentials
    scale_log2,  # softmax scale * log2(e): exponentials are powers of two
    num_splits,
    q_stride,
    table_stride,
    GROUP: tl.constexpr,  # query heads of one KV head
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,  # the next power of two
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # query heads of one program, GROUP of them used
    TILE: tl.constexpr,  # tokens read in one turn
    SPLIT: tl.constexpr,
):
    """Attention of up to ROWS query heads of one KV head over one split of one sequence."""
    PROGRAMS_PER_GROUP: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    kv_head = tl.program_id(0) // PROGRAMS_PER_GROUP
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)

    row = (tl.program_id(0) % PROGRAMS_PER_GROUP) * ROWS + tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    column = tl.arange(0, PADDED_D)
    used = (row < GROUP)[:, None] & (column < D)[None, :]
    query = tl.load(
        q + sequence * q_stride + head[:, None] * D + column[None, :], mask=used, other=0.0
    )  # [ROWS, D]

    length = tl.load(context_lens + sequence)
    chunk = tokens_per_split(length, num_splits, TILE)
    begin = split * chunk
    end = tl.minimum(begin + chunk, length)

    table = block_tables + sequence * table_stride
    k_head = k_cache + kv_head * D
    v_head = v_cache + kv_head * D
    token = begin + tl.arange(0, TILE)
    # A block id past the context is garbage: `other` stands in, and no key is read through it.
    block = tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, PADDED_D], tl.float32)
    for _ in range(begin, end, TILE):
        next_token = token + TILE
        next_block = tl.load(table + next_token // BLOCK_SIZE, mask=next_token < end, other=0)

        slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
        offset = slot[:, None] * (HKV * D) + column[None, :]
        inside = (token < end)[:, None] & (column < D)[None, :]
        key = tl.load(k_head + offset, mask=inside, other=0.0)  # [TILE, D]
        # "ieee": a float32 product in full precision, not in the tensor cores' tf32
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where((token < end)[None, :], scores, float("-inf"))  # [ROWS, TILE]

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, axis=1)
        # Zeros for tokens past the end, whose slots may hold anything: 0 * NaN would be NaN.
        value = tl.load(v_head + offset, mask=inside, other=0.0)  # [TILE, D]
        weighted = weighted * shrink[:, None] + tl.dot(
            weights.to(value.dtype), value, input_precision="ieee"
        )
        maximum = new_maximum
        token = next_token
        block = next_block

    # A split without tokens (or a padded row of the batch) has total 0 and yields zeros.
    total = tl.where(total > 0, total, 1.0)
    result = weighted / total[:, None]
    target = sequence * (HKV * GROUP) + head  # row of [B * Hq]
    if SPLIT:
        target = target * num_splits + split
        tl.store(log_sums + target, maximum + tl.log2(total), mask=row < GROUP)
    tl.store(out + target[:, None] * D + column[None, :], result.to(out.dtype.element_ty), used)


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(
    partial,  # float32 [B, Hq, num_splits, D]
    log_sums,  # float32 [B, Hq, num_splits]
    context_lens,  # [B] int32
    out,  # [B, Hq, D]
    num_splits,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Merge one head's splits: their average weighted by each one's sum of exponentials."""
    sequence = tl.program_id(1).to(tl.int64)
    target = sequence * tl.num_programs(0) + tl.program_id(0)  # row of [B * Hq]
    column = tl.arange(0, PADDED_D)
    inside = column < D
    length = tl.load(context_lens + sequence)
    used_splits = tl.cdiv(length, tokens_per_split(length, num_splits, TILE))

    maximum = float("-inf")
    total = 0.0
    weighted = tl.zeros([PADDED_D], tl.float32)
    for split in range(used_splits):
        row = target * num_splits + split
        log_sum = tl.load(log_sums + row)
        new_maximum = tl.maximum(maximum, log_sum)
        shrink = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(log_sum - new_maximum)
        weighted = weighted * shrink + weight * tl.load(partial + row * D + column, mask=inside)
        total = total * shrink + weight
        maximum = new_maximum
    result = weighted / tl.where(total > 0, total, 1.0)
    tl.store(out + target * D + column, result.to(out.dtype.element_ty), mask=inside)


def tile_tokens(padded_head_dim: int, dtype: torch.dtype) -> int:
    """Tokens read in one turn: as many as fit, at least the 16 that ``tl.dot`` takes."""
    values = MAX_TILE_VALUES_FLOAT32 if dtype == torch.float32 else MAX_TILE_VALUES
    return max(16, min(MAX_TILE_TOKENS, values // padded_head_dim))


def reshape_and_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See ``reference.reshape_and_cache``; ``k`` and ``v`` may be slices of packed QKV."""
    check_reshape_and_cache(k, v, k_cache, v_cache, slot_mapping)
    tokens, num_kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    row = num_kv_heads * head_dim
    with torch.cuda.device_of(k_cache):
        reshape_and_cache_kernel[(tokens,)](
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping,
            k.stride(0),
            v.stride(0),
            ROW=row,
            PADDED_ROW=triton.next_power_of_2(row),
            num_warps=4,
        )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """See ``reference.paged_attention``; ``num_splits`` overrides how a context is cut."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check_paged_attention(q, k_cache, v_cache, block_tables, context_lens, out)
    batch, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    if batch == 0:
        return out
    group = num_heads // num_kv_heads
    programs = num_kv_heads * triton.cdiv(group, HEAD_ROWS)
    if num_splits is None:
        max_context = block_tables.shape[1] * block_size
        num_splits = choose_num_splits(q.device, batch * programs, max_context)

    split = num_splits > 1
    partial, log_sums = out, out
    if split:
        shape = (batch, num_heads, num_splits, head_dim)
        partial = torch.empty(shape, dtype=torch.float32, device=q.device)
        log_sums = torch.empty(shape[:-1], dtype=torch.float32, device=q.device)
    padded_head_dim = max(16, triton.next_power_of_2(head_dim))
    tile = tile_tokens(padded_head_dim, q.dtype)
    with torch.cuda.device_of(q):
        paged_attention_kernel[(programs, batch, num_splits)](
            q,
            k_cache,
            v_cache,
            block_tables,
            context_lens,
            partial,
            log_sums,
            scale * math.log2(math.e),
            num_splits,
            q.stride(0),
            block_tables.stride(0),
            GROUP=group,
            HKV=num_kv_heads,
            D=head_dim,
            PADDED_D=padded_head_dim,
            BLOCK_SIZE=block_size,
            ROWS=HEAD_ROWS,
            TILE=tile,
            SPLIT=split,
            num_warps=4,
            num_stages=2,
        )
        if split:
            combine_kernel[(num_heads, batch)](
                partial,
                log_sums,
                context_lens,
                out,
                num_splits,
                D=head_dim,
                PADDED_D=padded_head_dim,
                TILE=tile,
                num_warps=1,
            )
    return out

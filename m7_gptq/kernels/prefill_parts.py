"""What may stand before and after the prefill kernel: gathering cached keys, merging cut tiles."""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl

MERGE_ROWS = 1  # queries of one program: it waits for memory, so let there be many


@triton.jit
def merge_kernel(
    partial,  # float32 [num_slots, HKV, TILE_ROWS, D]
    log_sums,  # float32 [num_slots, HKV, TILE_ROWS]
    merges,  # [M, 8] int32, see prefill_plan
    out,  # [T, HKV * GROUP, D]
    GROUP: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    TILE_ROWS: tl.constexpr,  # queries of a tile
    ROWS: tl.constexpr,  # of them, how many this program merges
    PDL: tl.constexpr,
):
    """Merge the items of one tile: their average weighted by each one's sum of exponentials."""
    kv_head = tl.program_id(0)
    merge = merges + tl.program_id(1) * 8
    query_start = tl.load(merge)
    num_tokens = tl.load(merge + 1)
    slot = tl.load(merge + 2).to(tl.int64)
    num_items = tl.load(merge + 3)

    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    used = (token < num_tokens) & (row < TILE_ROWS // GROUP * GROUP)
    column = tl.arange(0, PADDED_D)
    in_tile = used[:, None] & (column < D)[None, :]

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, PADDED_D], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for _ in tl.range(num_items, loop_unroll_factor=4):  # four loads under way
        source = (slot * HKV + kv_head) * TILE_ROWS + row
        log_sum = tl.load(log_sums + source, mask=used, other=0.0)
        values = tl.load(partial + source[:, None] * D + column[None, :], mask=in_tile, other=0.0)
        new_maximum = tl.maximum(maximum, log_sum)
        finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # no keys seen so far
        shrink = tl.exp2(maximum - finite)
        weight = tl.exp2(log_sum - finite)
        weighted = weighted * shrink[:, None] + weight[:, None] * values
        total = total * shrink + weight
        maximum = new_maximum
        slot += 1
    target = (query_start + token).to(tl.int64) * (HKV * GROUP) + kv_head * GROUP + row % GROUP
    result = weighted / total[:, None]
    place = target[:, None] * D + column[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=in_tile)


@triton.jit(do_not_specialize=["table_stride"])
def gather_kernel(
    k,  # [T, HKV, D], rows K_STRIDE apart
    v,  # [T, HKV, D], rows V_STRIDE apart
    k_cache,  # [num_blocks, BLOCK_SIZE, HKV, D]
    v_cache,  # [num_blocks, BLOCK_SIZE, HKV, D]
    block_tables,  # [B, max_blocks] int32, rows table_stride apart
    copies,  # [C, 4] int32, see prefill_plan
    k_out,  # [num_keys, HKV, D]
    v_out,  # [num_keys, HKV, D]
    table_stride,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Copy one KV head of some consecutive tokens, out of pages or from the fresh keys."""
    kv_head = tl.program_id(0)
    copy = copies + tl.program_id(1) * 4
    target_row = tl.load(copy)
    sequence = tl.load(copy + 1)  # -1: fresh keys
    first = tl.load(copy + 2)
    num_tokens = tl.load(copy + 3)

    index = tl.arange(0, TOKENS)
    column = tl.arange(0, PADDED_D)
    inside = (index < num_tokens)[:, None] & (column < D)[None, :]
    token = first + index
    if sequence >= 0:
        table = block_tables + sequence.to(tl.int64) * table_stride
        block = tl.load(table + token // BLOCK_SIZE, mask=index < num_tokens, other=0)
        source = (block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE) * (HKV * D) + kv_head * D
        place = source[:, None] + column[None, :]
        key = tl.load(k_cache + place, mask=inside)
        value = tl.load(v_cache + place, mask=inside)
    else:
        fresh = token.to(tl.int64)[:, None]
        key = tl.load(k + kv_head * D + fresh * K_STRIDE + column[None, :], mask=inside)
        value = tl.load(v + kv_head * D + fresh * V_STRIDE + column[None, :], mask=inside)
    target = (target_row + index).to(tl.int64) * (HKV * D) + kv_head * D
    place = target[:, None] + column[None, :]
    tl.store(k_out + place, key, mask=inside)
    tl.store(v_out + place, value, mask=inside)

"""What the decode kernels are put together from: functions of one program, inlined into each.

A program holds the state of an online softmax for up to ROWS query heads of one KV head: the
``maximum`` of the scores so far (in log2), the ``total`` of their exponentials, and the values
``weighted`` by these.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_item(items, item, ENTRY: tl.constexpr):
    """(sequence, begin, end, first item of the sequence, number of its items)."""
    entry = items + item * ENTRY
    return (
        tl.load(entry).to(tl.int64),
        tl.load(entry + 1),
        tl.load(entry + 2),
        tl.load(entry + 3),
        tl.load(entry + 4),
    )


@triton.jit
def prefetch(
    k_head,  # keys of the program's KV head, slots HKV * D apart
    v_head,
    table,  # [max_blocks] int32, of the program's sequence
    begin,
    end,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Ask for the item's first tokens to be brought into L2, without waiting for them."""
    LINE: tl.constexpr = 1024 // k_head.dtype.element_ty.primitive_bitwidth  # values in 128 bytes
    LINES: tl.constexpr = PADDED_D // LINE if PADDED_D > LINE else 1
    token = begin + tl.arange(0, TOKENS)
    block = tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
    column = tl.arange(0, LINES) * LINE
    inside = (token < end)[:, None] & (column < D)[None, :]
    offset = tl.where(inside, slot[:, None] * (HKV * D) + column[None, :], 0)
    for head in tl.static_range(2):
        line = (k_head if head == 0 else v_head) + offset
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [line.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def places(
    block,  # [TILE], of each token
    token,  # [TILE], position in the sequence
    end,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Where a tile's keys (and values) lie, [TILE, PADDED_D], and which of these there are."""
    column = tl.arange(0, PADDED_D)
    slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
    inside = (token < end)[:, None] & (column < D)[None, :]
    return slot[:, None] * (HKV * D) + column[None, :], inside


@triton.jit
def weigh(
    query,  # [ROWS, PADDED_D]
    key,  # [TILE, PADDED_D]
    exists,  # [TILE], whether there is such a token
    maximum,  # float32 [ROWS]
    total,  # float32 [ROWS]
    scale_log2,
):
    """Softmax of one more tile: new maximum and total, weights [ROWS, TILE], and by how much what
    was weighted before has to shrink [ROWS]."""
    # "ieee": a float32 product in full precision, not in the tensor cores' tf32
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    scores = tl.where(exists[None, :], scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    # Below any score, but finite: of a row that has seen no token -inf - -inf would be NaN.
    finite = tl.maximum(new_maximum, -1e38)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(maximum - finite)
    return new_maximum, total * shrink + tl.sum(weights, axis=1), weights, shrink


@triton.jit
def attend_to_cache(
    query,  # [ROWS, PADDED_D]
    maximum,  # float32 [ROWS]
    total,  # float32 [ROWS]
    weighted,  # float32 [ROWS, PADDED_D]
    k_head,  # keys of the program's KV head, slots HKV * D apart
    v_head,
    table,  # [max_blocks] int32, of the program's sequence
    begin,
    end,
    scale_log2,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The state of the online softmax after tokens [begin, end) as well."""
    token = begin + tl.arange(0, TILE)
    # A block id past the context is garbage: `other` stands in, and no key is read through it.
    block = tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)
    for _ in range(begin, end, TILE):
        # One turn ahead: the pipeliner hides one load behind the tile before, not two in a row.
        next_token = token + TILE
        next_block = tl.load(table + next_token // BLOCK_SIZE, mask=next_token < end, other=0)
        place, inside = places(block, token, end, HKV, D, PADDED_D, BLOCK_SIZE)
        key = tl.load(k_head + place, mask=inside, other=0.0)
        maximum, total, weights, shrink = weigh(
            query, key, token < end, maximum, total, scale_log2
        )
        # Zeros for tokens past the end, whose slots may hold anything: 0 * NaN would be NaN.
        value = tl.load(v_head + place, mask=inside, other=0.0)
        weighted = weighted * shrink[:, None] + tl.dot(
            weights.to(value.dtype), value, input_precision="ieee"
        )
        token = next_token
        block = next_block
    return maximum, total, weighted


@triton.jit
def combine(
    partial,  # float32 [N, HQ, D]
    log_sums,  # float32 [N, HQ]
    out,  # [B, HQ, D]
    sequence,
    first_item,
    count,  # of the sequence's items
    kv_head,
    first_row,  # of the program, within the KV head's query heads
    GROUP: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    USED_ROWS: tl.constexpr,  # power of two from min(GROUP, ROWS) up
):
    """Merge items: their average, each weighted by its sum of exponentials.

    A program's tile has ROWS rows, of which its heads need USED_ROWS: it merges ROWS / USED_ROWS
    items at a time in separate rows, and those with one another at the end.
    """
    ITEMS: tl.constexpr = ROWS // USED_ROWS
    row = tl.arange(0, ROWS)
    head_row = first_row + row % USED_ROWS
    column = tl.arange(0, PADDED_D)
    # Below any score, but finite: of a row that sees no item -inf - -inf would be NaN.
    maximum = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, PADDED_D], tl.float32)
    for first in range(0, count, ITEMS):
        index = first + row // USED_ROWS
        used = (index < count) & (head_row < GROUP)
        source = (first_item + index).to(tl.int64) * (HKV * GROUP) + kv_head * GROUP + head_row
        # Straight from L2: what this multiprocessor's L1 holds may be from the layer before.
        log_sum = tl.load(log_sums + source, used, float("-inf"), cache_modifier=".cg")
        result = tl.load(
            partial + source[:, None] * D + column[None, :],
            mask=used[:, None] & (column < D)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_maximum = tl.maximum(maximum, log_sum)
        shrink = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(log_sum - new_maximum)
        total = total * shrink + weight
        weighted = weighted * shrink[:, None] + weight[:, None] * result
        maximum = new_maximum

    maximum = tl.reshape(maximum, [ITEMS, USED_ROWS])
    total = tl.reshape(total, [ITEMS, USED_ROWS])
    weighted = tl.reshape(weighted, [ITEMS, USED_ROWS, PADDED_D])
    shrink = tl.exp2(maximum - tl.max(maximum, axis=0)[None, :])
    total = tl.sum(total * shrink, axis=0)
    weighted = tl.sum(weighted * shrink[:, :, None], axis=0)
    result = weighted / tl.where(total > 0, total, 1.0)[:, None]

    row = first_row + tl.arange(0, USED_ROWS)
    used = (row < GROUP)[:, None] & (column < D)[None, :]
    target = sequence * (HKV * GROUP) + kv_head * GROUP + row  # row of [B * Hq]
    tl.store(out + target[:, None] * D + column[None, :], result.to(out.dtype.element_ty), used)


@triton.jit
def finish(
    maximum,  # float32 [ROWS]: the state of the softmax after the item
    total,  # float32 [ROWS]
    weighted,  # float32 [ROWS, PADDED_D]
    arrivals,  # [B, programs] int32
    partial,  # float32 [N, HQ, D]
    log_sums,  # float32 [N, HQ]
    out,  # [B, HQ, D]
    sequence,
    item,
    first_item,
    count,
    kv_head,
    first_row,
    GROUP: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    USED_ROWS: tl.constexpr,
):
    """Write an item's result; if it is one of several, the last one to get here merges them."""
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_D)
    used = (row < GROUP)[:, None] & (column < D)[None, :]
    head = kv_head * GROUP + row
    total = tl.where(total > 0, total, 1.0)  # a padded row has no token, and yields zeros
    result = weighted / total[:, None]
    if count == 1:
        target = sequence * (HKV * GROUP) + head
        tl.store(out + target[:, None] * D + column[None, :], result.to(out.dtype.element_ty), used)
    else:
        target = item.to(tl.int64) * (HKV * GROUP) + head
        tl.store(partial + target[:, None] * D + column[None, :], result, mask=used)
        tl.store(log_sums + target, maximum + tl.log2(total), mask=row < GROUP)
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = arrivals + sequence * tl.num_programs(0) + tl.program_id(0)
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if arrived == count - 1:
            tl.store(counter, 0)  # for the next layer
            combine(
                partial, log_sums, out, sequence, first_item, count, kv_head, first_row,
                GROUP, HKV, D, PADDED_D, ROWS, USED_ROWS,
            )  # fmt: skip


@triton.jit
def normed_and_rotated(
    own,  # [ROWS, PADDED_D], a head in each row
    partner,  # [ROWS, PADDED_D], the same heads turned by half: what each value is rotated with
    own_weight,  # [ROWS, PADDED_D], of the norm, the same in all rows; only if NORM
    partner_weight,  # [ROWS, PADDED_D]
    cos,  # [ROWS, PADDED_D], the same in all rows
    sin,  # [ROWS, PADDED_D], the first half negated
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
):
    """The heads after norm and rotation, rounded where ``Ops.qk_norm_rope`` rounds."""
    dtype: tl.constexpr = own.dtype
    own = own.to(tl.float32)
    partner = partner.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(own * own, axis=1) / D + eps)[:, None]
        own = (own * scale * own_weight).to(dtype).to(tl.float32)
        partner = (partner * scale * partner_weight).to(dtype).to(tl.float32)
    return ((own * cos).to(dtype).to(tl.float32) + partner * sin).to(dtype)

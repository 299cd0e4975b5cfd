"""The work list of a decode step: which part of which context each program reads.

    plan = plan_decode(context_lens, num_heads, num_kv_heads, head_dim)    # once a step
    out = flash_decode(q, k_cache, v_cache, block_tables, plan, scale)     # in every layer

Decoding is bound by memory, so the bytes must be spread evenly over the multiprocessors, whatever
the lengths. A fixed number of splits cannot do that: enough for the one sequence of 16k tokens is
far too many for its 63 neighbours of 200. So every sequence is cut by its own length, into *items*
of about the same number of tokens, the batch's total over what the GPU runs at a time.

The lengths live on the device, and a CUDA graph replays the same launches whatever they are.
Therefore the list is written by a kernel, has room for every batch of its size (no batch has more
items than sequences plus the number aimed at), and programs without an item leave at once.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.launch import launch, num_multiprocessors
from common.ops.layout import aligned

HEAD_ROWS = 16  # query heads of one program: the smallest left side that tl.dot takes
# Programs that share a multiprocessor, so that one computes while the others wait for memory.
PROGRAMS_PER_MULTIPROCESSOR = 4
# An item shorter than this costs more in the combine step than it wins in parallelism.
MIN_TOKENS = 128
TOKEN_UNIT = 64  # items begin at multiples of this: whole tiles of every kernel

LONG_CONTEXT = 512  # tokens on average, from which a program's start and end matter little

ENTRY = 8  # int32 of an item; 5 are used, but so it is one memory transaction of 32 bytes
_CHUNK = 256  # sequences that a program looks at in one turn


@dataclass(frozen=True)
class DecodePlan:
    """How a batch of B sequences is cut into at most N items, and room for their results.

    One stream at a time may use it: all layers share the workspace, one after the other.

    Attributes:
        context_lens: ``[B]`` int32, the lengths it was made from.
        items: ``[N, 8]`` int32: sequence, first token, end, the sequence's first item, its number
            of items. Longest items first; a sequence's items follow one another. A sequence of
            length 0 has one without tokens, so that its output is written too.
        num_items: ``[1]`` int32, how many of the N there are.
        arrivals: ``[B, programs]`` int32, items that are done, for each sequence and each program
            that shares an item with others; zero between two layers.
        partial: ``[N, Hq, D]`` float32, results of the items of sequences with several.
        log_sums: ``[N, Hq]`` float32, log2 of the sum of their exponentials.
        is_long: whether the kernels should be those for long contexts.
    """

    context_lens: Tensor
    items: Tensor
    num_items: Tensor
    arrivals: Tensor
    partial: Tensor
    log_sums: Tensor
    is_long: bool

    @property
    def programs(self) -> int:
        """Programs that share an item: each serves up to 16 query heads of one KV head."""
        return self.arrivals.shape[1]


@triton.jit
def cut(length, tokens_wanted, UNIT: tl.constexpr):
    """(tokens of each item, number of items): whole units, as even as they get."""
    num_items = tl.maximum((length + tokens_wanted // 2) // tokens_wanted, 1)  # rounded
    tokens = tl.maximum(tl.cdiv(tl.cdiv(length, UNIT), num_items), 1) * UNIT
    return tokens, tl.maximum(tl.cdiv(length, tokens), 1)


@triton.jit(do_not_specialize=["batch", "items_wanted", "min_tokens"])
def plan_kernel(
    context_lens,  # [B] int32
    items,  # [N, ENTRY] int32
    num_items,  # [1] int32
    arrivals,  # [B, PROGRAMS] int32
    batch,  # B
    items_wanted,
    min_tokens,
    UNIT: tl.constexpr,
    ENTRY: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PADDED_PROGRAMS: tl.constexpr,  # the next power of two
    CHUNK: tl.constexpr,
):
    """One program cuts one sequence, and finds where its items go by cutting all others too."""
    sequence = tl.program_id(0)
    all_tokens = 0
    for first in range(0, batch, CHUNK):
        other = first + tl.arange(0, CHUNK)
        all_tokens += tl.sum(tl.load(context_lens + other, mask=other < batch, other=0))
    tokens_wanted = tl.maximum(tl.cdiv(all_tokens, items_wanted), min_tokens)

    length = tl.load(context_lens + sequence)
    tokens, count = cut(length, tokens_wanted, UNIT)
    # Where it has begun last, a long item would keep everyone waiting: the longest go first.
    size = tl.minimum(tokens, length)
    place, all_items = 0, 0
    for first in range(0, batch, CHUNK):
        other = first + tl.arange(0, CHUNK)
        exists = other < batch
        other_length = tl.load(context_lens + other, mask=exists, other=0)
        other_tokens, other_count = cut(other_length, tokens_wanted, UNIT)
        other_size = tl.minimum(other_tokens, other_length)
        before = (other_size > size) | ((other_size == size) & (other < sequence))
        place += tl.sum(tl.where(exists & before, other_count, 0))
        all_items += tl.sum(tl.where(exists, other_count, 0))

    for first in range(0, count, 32):
        index = first + tl.arange(0, 32)
        entry = items + (place + index) * ENTRY
        mine = index < count
        begin = index * tokens
        tl.store(entry, sequence, mask=mine)
        tl.store(entry + 1, begin, mask=mine)
        tl.store(entry + 2, tl.minimum(begin + tokens, length), mask=mine)
        tl.store(entry + 3, place, mask=mine)
        tl.store(entry + 4, count, mask=mine)
    program = tl.arange(0, PADDED_PROGRAMS)
    zeros = tl.zeros([PADDED_PROGRAMS], tl.int32)
    tl.store(arrivals + sequence * PROGRAMS + program, zeros, mask=program < PROGRAMS)
    if sequence == 0:
        tl.store(num_items, all_items)


def plan_decode(
    context_lens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    is_long: bool = True,
) -> DecodePlan:
    """Cut a batch into items; one small kernel, once a step for all layers.

    Shapes depend on B and the device alone, so that a plan may be made inside a CUDA graph.

    Args:
        context_lens: ``[B]`` int32, tokens to attend to; 0 marks a padded row.
        num_heads, num_kv_heads, head_dim: Hq, Hkv, D of the model.
        is_long: which kernels are meant, for contexts of ``LONG_CONTEXT`` tokens on
            average and more, or for shorter ones; both compute the same.

    Raises:
        ValueError: ``context_lens`` is not a contiguous int32 vector, or Hq no multiple of Hkv.
    """
    if context_lens.dim() != 1 or context_lens.dtype != torch.int32 or num_heads % num_kv_heads:
        raise ValueError(
            f"context_lens must be [B] int32 and Hq a multiple of Hkv, got "
            f"{list(context_lens.shape)} {context_lens.dtype}, Hq {num_heads}, Hkv {num_kv_heads}"
        )
    context_lens = aligned(context_lens)
    batch, device = len(context_lens), context_lens.device
    programs = num_kv_heads * triton.cdiv(num_heads // num_kv_heads, HEAD_ROWS)
    resident = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device)
    items_wanted = triton.cdiv(resident, programs)
    # A sequence has at most 1 + length / wanted tokens items, and the lengths over that add up to
    # at most the items wanted.
    most_items = batch + items_wanted
    plan = DecodePlan(
        context_lens,
        torch.empty((most_items, ENTRY), dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
        torch.empty((batch, programs), dtype=torch.int32, device=device),
        torch.empty((most_items, num_heads, head_dim), dtype=torch.float32, device=device),
        torch.empty((most_items, num_heads), dtype=torch.float32, device=device),
        is_long,
    )
    if batch == 0:
        return plan
    tensors = (context_lens, plan.items, plan.num_items, plan.arrivals)
    with torch.cuda.device_of(context_lens):
        launch(
            plan_kernel,
            (batch, 1, 1),
            (*tensors, batch, items_wanted, MIN_TOKENS),
            (TOKEN_UNIT, ENTRY, programs, triton.next_power_of_2(programs), _CHUNK),
            num_warps=1,
        )
    return plan

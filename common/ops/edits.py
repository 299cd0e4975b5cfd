"""The options that change logits themselves, for all rows in one kernel: biases and penalties.

Twin: `common.sampling_rows.SparseBias.add_to_` and `TokenCounts.penalize`, the same bit by bit.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.launch import launch, supports_pdl
from common.ops.row_values import is_penalised, row_penalties
from common.sampling_rows import DeviceRows

CHUNK = 2048
CHUNK_WARPS = 4

_ENTRIES = tl.constexpr(16)  # biases looked at together


@triton.jit(do_not_specialize=["num_biases"])
def edit_kernel(
    logits,  # [B, VOCAB]
    rows,  # [B] int64
    floats,  # [R, float columns] float64
    num_sampled,  # [R] int64
    bias_tokens,  # [R, num_biases] int64
    biases,  # [R, num_biases] float32
    bias_until,  # [R, num_biases] int64: for steps below
    in_prompt,  # [R, VOCAB] uint8, if PENALTIES
    in_output,  # [R, VOCAB] int32, if PENALTIES
    edited,  # out: [B, VOCAB] float32
    num_biases,
    PENALTIES: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Apply a row's biases, then its penalties, to one chunk."""
    request = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * CHUNK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows + request)
    token = begin + tl.arange(0, CHUNK)
    inside = token < VOCAB
    logit = tl.load(logits + request * VOCAB + token, mask=inside, other=0.0).to(tl.float32)

    step = tl.load(num_sampled + row)
    first_bias = row * num_biases
    for start in range(0, num_biases, _ENTRIES):
        entry = start + tl.arange(0, _ENTRIES)
        used = entry < num_biases
        where = tl.load(bias_tokens + first_bias + entry, mask=used, other=-1)
        until = tl.load(bias_until + first_bias + entry, mask=used, other=0)
        here = (step < until) & (where >= begin) & (where < begin + CHUNK)
        if tl.sum(here.to(tl.int32)) > 0:
            for i in range(start, tl.minimum(start + _ENTRIES, num_biases)):
                applies = step < tl.load(bias_until + first_bias + i)
                hit = (token == tl.load(bias_tokens + first_bias + i)) & applies
                logit += tl.where(hit, tl.load(biases + first_bias + i), 0.0)

    if PENALTIES:
        repetition, presence, frequency = row_penalties(floats, row)
        if is_penalised(floats, row):
            count = tl.load(in_output + row * VOCAB + token, mask=inside, other=0)
            prompted = tl.load(in_prompt + row * VOCAB + token, mask=inside, other=0)
            repeated = tl.where(logit > 0, tl.div_rn(logit, repetition), logit * repetition)
            logit = tl.where((count > 0) | (prompted != 0), repeated, logit)
            # The product is rounded by itself, as in the twin: no fused multiply-add.
            times = count.to(tl.float64) * frequency.to(tl.float64)
            logit -= times.to(tl.float32)
            logit -= tl.where(count > 0, presence, 0.0)
    tl.store(edited + request * VOCAB + token, logit, mask=inside)


def edited_logits(logits: Tensor, rows: Tensor, state: DeviceRows) -> Tensor:
    """Logits [B, V] in float32 after the biases and penalties of ``rows`` [B] int64."""
    batch, vocab_size = logits.shape
    pdl = supports_pdl(logits.device)
    edited = torch.empty(batch, vocab_size, device=logits.device)
    penalties = state.in_output is not None
    launch(
        edit_kernel,
        (triton.cdiv(vocab_size, CHUNK), batch, 1),
        (
            logits,
            rows,
            state.floats,
            state.num_sampled,
            state.bias_tokens,
            state.biases,
            state.bias_until,
            state.in_prompt.view(torch.uint8) if penalties else rows,
            state.in_output if penalties else rows,
            edited,
            state.biases.shape[1],
        ),
        (penalties, vocab_size, CHUNK, pdl),
        num_warps=CHUNK_WARPS,
        pdl=pdl,
    )
    return edited

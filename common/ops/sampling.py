"""From logits to token ids on a GPU: the options of `common.sampling` in a few kernels.

    edit_kernel    biases and penalties                       only if a request of the batch has any
    race_kernel    each chunk's largest logit, and the winner of its exponential race
    (`common.ops.truncation` finds what top-k and top-p leave)     only if a request asks for them
    rerun_kernel   the race of rows whose tokens are not all in it     only if there are such rows
    finish_kernel  each row's token out of its chunks' winners

A chunk is CHUNK consecutive tokens of one row. Weights are never formed: the race of w / E is one
of log2(w) - log2(E), so that one pass serves before the row's largest logit is known, and greedy
rows run in it without noise. A row's result depends neither on the batch nor on its other rows.

Twin: the torch operations of `common.sampling.Sampler`.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.boundary import TALLIES, clear_tallies
from common.ops.edits import edited_logits
from common.ops.launch import launch, supports_pdl
from common.ops.layout import aligned
from common.ops.noise import log2_exponential, random_bits, stream_key
from common.ops.row_values import (
    is_penalised,
    is_truncated,
    row_log2_min_p,
    row_maximum,
    row_scale,
    row_seed,
)
from common.ops.truncation import find_limits
from common.sampling_rows import INVALID_TOKEN, PADDING_ROW, DeviceRows

# Part of the definition of a row's result, by the rounding of differences to a chunk's maximum.
CHUNK = 2048
CHUNK_WARPS = 4
FINISH_WARPS = 1

_NO_TOKEN = tl.constexpr(2**31 - 1)
_INVALID_TOKEN = tl.constexpr(INVALID_TOKEN)
_PADDING_ROW = tl.constexpr(PADDING_ROW)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def winner(key, token):
    """The largest key of a chunk and its token, the first of equals."""
    largest = tl.max(key)
    return largest, tl.min(tl.where(key == largest, token, _NO_TOKEN))


@triton.jit
def race_kernel(
    logits,  # [B, VOCAB]
    rows,  # [B] int64
    floats,  # [R, float columns] float64
    integers,  # [R, integer columns] int64
    num_sampled,  # [R] int64
    maxima,  # out: [B, CHUNKS] float32, of the logits; inf where one is NaN
    minima,  # out: [B, CHUNKS] float32, of the finite logits, in truncated rows
    tallies,  # out: [B, tallies] int64, zeros in truncated rows, if SELECT
    keys,  # out: [B, CHUNKS] float32, the winner's, relative to the chunk's largest logit
    tokens,  # out: [B, CHUNKS] int32, the winner
    SELECT: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The likeliest token of one chunk, or the one drawn from it."""
    chunk = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows + request)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logits + request * VOCAB + token, mask=token < VOCAB, other=-_INFINITY)
    logit = logit.to(tl.float32)
    logit = tl.where(logit != logit, _INFINITY, logit)
    maximum = tl.max(logit)
    place = request * CHUNKS + chunk
    tl.store(maxima + place, maximum)
    if is_truncated(floats, integers, row):
        tl.store(minima + place, tl.min(tl.where(logit > -_INFINITY, logit, _INFINITY)))
        if SELECT:
            clear_tallies(tallies, request)  # every program the same
        return

    scale = row_scale(floats, row)
    key = logit - tl.where(maximum > -_INFINITY, maximum, 0.0)
    if scale > 0.0:
        stream = stream_key(row_seed(integers, row), tl.load(num_sampled + row))
        key = tl.fma(key, scale, -log2_exponential(random_bits(token, stream)))
    largest, first = winner(key, token)
    tl.store(keys + place, largest)
    tl.store(tokens + place, first)


@triton.jit
def rerun_kernel(
    logits,  # [B, VOCAB]
    rows,  # [B] int64
    floats,  # [R, float columns] float64
    integers,  # [R, integer columns] int64
    num_sampled,  # [R] int64
    maxima,  # [B, CHUNKS] float32
    least_scores,  # [B] float32, least_weights [B] float32, last_tokens [B] int32:
    least_weights,  # what stays in a row; see `common.ops.boundary.boundary_kernel`
    last_tokens,  # (if SELECT; else a row has only min-p)
    keys,  # out: [B, CHUNKS] float32, the winner's, relative to the row's largest logit
    tokens,  # out: [B, CHUNKS] int32, the winner
    SELECT: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,  # the next power of two
    PDL: tl.constexpr,
):
    """The token drawn from what a truncated row has left in one chunk."""
    chunk = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows + request)
    if not is_truncated(floats, integers, row):
        return
    place = request * CHUNKS + chunk
    maximum = row_maximum(maxima, request, CHUNKS, PADDED_CHUNKS)
    scale = row_scale(floats, row)
    if SELECT:
        least_score = tl.load(least_scores + request)
        least_weight = tl.load(least_weights + request)
        last_token = tl.load(last_tokens + request)
    else:
        least_score = row_log2_min_p(floats, row)
        least_weight = 0.0
        last_token = VOCAB
    largest = (tl.load(maxima + place) - maximum) * scale
    # with room for an exp2 that does not quite rise with its argument
    if (largest < least_score) | (tl.exp2(largest) * 1.001 < least_weight):
        tl.store(keys + place, -_INFINITY)
        tl.store(tokens + place, _NO_TOKEN)
        return

    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logits + request * VOCAB + token, mask=token < VOCAB, other=-_INFINITY)
    logit = logit.to(tl.float32)
    score = (logit - maximum) * scale
    weight = tl.exp2(score)
    stays = (weight > least_weight) | ((weight == least_weight) & (token <= last_token))
    stays &= score >= least_score
    stream = stream_key(row_seed(integers, row), tl.load(num_sampled + row))
    noise = log2_exponential(random_bits(token, stream))
    key = tl.fma(logit - maximum, scale, -noise)
    largest, first = winner(tl.where(stays, key, -_INFINITY), token)
    tl.store(keys + place, largest)
    tl.store(tokens + place, first)


@triton.jit
def finish_kernel(
    rows,  # [B] int64
    floats,  # [R, float columns] float64
    integers,  # [R, integer columns] int64
    maxima,  # [B, CHUNKS] float32
    keys,  # [B, CHUNKS] float32
    tokens,  # [B, CHUNKS] int32
    num_sampled,  # [R] int64, one more for each row
    in_output,  # [R, VOCAB] int32, one more of the token, if PENALTIES
    sampled,  # out: [B] int64
    PENALTIES: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,  # the next power of two
    PDL: tl.constexpr,
):
    """The winner of one row, and the row's state for its next step."""
    request = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows + request)
    chunk = tl.arange(0, PADDED_CHUNKS)
    place = request * CHUNKS + chunk
    inside = chunk < CHUNKS
    maximum = tl.load(maxima + place, mask=inside, other=-_INFINITY)
    key = tl.load(keys + place, mask=inside, other=-_INFINITY)
    token = tl.load(tokens + place, mask=inside, other=_NO_TOKEN)
    best = tl.max(maximum)
    if not is_truncated(floats, integers, row):
        scale = row_scale(floats, row)
        key = tl.fma(maximum - best, tl.where(scale > 0.0, scale, 1.0), key)
    _, first = winner(key, token)
    # The maximum tells all: NaN has become inf, and it is -inf only if every logit is.
    valid = (best > -_INFINITY) & (best < _INFINITY)
    tl.store(sampled + request, tl.where(valid, first, _INVALID_TOKEN).to(tl.int64))
    if row != _PADDING_ROW:
        tl.store(num_sampled + row, tl.load(num_sampled + row) + 1)
        if PENALTIES:
            counts = valid & is_penalised(floats, row)
            count = in_output + row * VOCAB + tl.where(valid, first, 0)
            tl.store(count, tl.load(count, mask=counts) + 1, mask=counts)


def sample_tokens(
    logits: Tensor,
    rows: Tensor,
    state: DeviceRows,
    *,
    edit: bool,
    truncate: bool,
    select: bool,
) -> Tensor:
    """One token for each row of a batch; the rows' counts of tokens go up.

    Args:
        logits: [B, V], any float type; not modified.
        rows: [B] int64, rows of the tables, none twice except ``PADDING_ROW``.
        state: the tables.
        edit: some row of the batch has a bias or a penalty.
        truncate: some row has min-p, top-k or top-p.
        select: some row has top-k or top-p.

    Returns:
        [B] int64, ``INVALID_TOKEN`` where the logits were unusable.
    """
    (batch, vocab_size), device = logits.shape, logits.device
    sampled = torch.empty(batch, dtype=torch.int64, device=device)
    if batch == 0:
        return sampled
    logits, rows = aligned(logits), aligned(rows)
    pdl = supports_pdl(device)
    if edit:
        logits = edited_logits(logits, rows, state)
    chunks = triton.cdiv(vocab_size, CHUNK)
    shape = (vocab_size, CHUNK, chunks)
    padded_chunks = triton.next_power_of_2(chunks)
    maxima, minima, keys = (torch.empty(batch, chunks, device=device) for _ in range(3))
    tokens = torch.empty(batch, chunks, dtype=torch.int32, device=device)
    tallies = torch.empty(batch, TALLIES, dtype=torch.int64, device=device)
    tables = (rows, state.floats, state.integers)

    launch(
        race_kernel,
        (chunks, batch, 1),
        (logits, *tables, state.num_sampled, maxima, minima, tallies, keys, tokens),
        (select, *shape, pdl),
        num_warps=CHUNK_WARPS,
        pdl=pdl,
    )
    if truncate:
        limits = (maxima, maxima, tokens)  # read only if selected
        if select:
            limits = find_limits(logits, *tables, maxima, minima, tallies, CHUNK)
        launch(
            rerun_kernel,
            (chunks, batch, 1),
            (logits, *tables, state.num_sampled, maxima, *limits, keys, tokens),
            (select, *shape, padded_chunks, pdl),
            num_warps=CHUNK_WARPS,
            pdl=pdl,
        )
    penalties = edit and state.in_output is not None
    launch(
        finish_kernel,
        (batch, 1, 1),
        (
            *tables,
            maxima,
            keys,
            tokens,
            state.num_sampled,
            state.in_output if penalties else tokens,
            sampled,
        ),
        (penalties, vocab_size, chunks, padded_chunks, pdl),
        num_warps=FINISH_WARPS,
        pdl=pdl,
    )
    return sampled

"""Top-k and top-p thresholds by counting: no sort, no scatter, a few passes over the logits.

A top-k is a threshold, the k-th largest score, and so is a top-p: the largest weight such that the
weights from it on add up to what is needed. Both are found by narrowing an interval of scores.

1. ``narrow_kernel``, ``NARROWINGS`` times: all programs of a row add up how many tokens, and which
   mass, reach each of ``THRESHOLDS`` evenly spaced scores. The boundary lies between two of them.
2. ``collect_kernel`` gathers the few tokens that are left there.
3. ``boundary_kernel``, one program a row, finds the boundary among them by bisecting float bits.
   If they are too many (equal or nearly equal logits) it reads the whole row instead: slow, right.

A row takes as many steps as it needs: programs of rows that are done, or need nothing, end at once.

Masses are integers, those of the twin `common.truncation`, so that sums are exact in any order and
a row's boundary depends on nothing but the row.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.boundary import (
    CANDIDATES,
    NARROWINGS,
    TALLIES,
    THRESHOLDS,
    boundary_kernel,
    interval,
    narrowing_tallies,
    threshold,
    weight_mass,
)
from common.ops.launch import launch, supports_pdl
from common.ops.row_values import lowest_score, row_maximum, row_scale, row_top_k, row_top_p

CHUNK_WARPS = 4
ROW_WARPS = 8
TILE = 1024  # tokens that boundary_kernel reads at once

_THRESHOLDS = tl.constexpr(THRESHOLDS)
_TALLIES = tl.constexpr(TALLIES)
_NARROWINGS = tl.constexpr(NARROWINGS)
_CANDIDATES = tl.constexpr(CANDIDATES)
_INFINITY = tl.constexpr(float("inf"))
_MARGIN = tl.constexpr(1e-3)  # far more than the error of exp2: for whole chunks to be skipped
_COUNT_SHIFT = tl.constexpr(52)  # above the masses of 2**11 tokens: a chunk has no more
_ONE_COUNT = tl.constexpr(1 << 52)
_COUNT_MASK = tl.constexpr((1 << 12) - 1)  # a count of 2**11 reaches the sign


@triton.jit
def narrow_kernel(
    logits,  # [B, VOCAB]
    rows,  # [B] int64
    floats,  # [R, float columns] float64
    integers,  # [R, integer columns] int64
    maxima,  # [B, CHUNKS] float32, of the logits
    minima,  # [B, CHUNKS] float32, of the finite logits
    tallies,  # [B, tallies] int64, zero at first
    NARROWING: tl.constexpr,  # which one this is
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,  # the next power of two
    PDL: tl.constexpr,
):
    """Count one chunk's tokens, and add up their masses, from each threshold on."""
    chunk = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows + request)
    top_k, top_p = row_top_k(integers, row), row_top_p(floats, row)
    if (top_k == 0) & (top_p >= 1.0):
        return
    maximum = row_maximum(maxima, request, CHUNKS, PADDED_CHUNKS)
    lowest = lowest_score(maximum, minima, floats, request, row, CHUNKS, PADDED_CHUNKS)
    low, high, inside, _, _ = interval(tallies, request, lowest, top_k, top_p, NARROWING)
    scale = row_scale(floats, row)
    largest = (tl.load(maxima + request * CHUNKS + chunk) - maximum) * scale
    if (inside <= _CANDIDATES) | (largest + _MARGIN < low):
        return

    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logits + request * VOCAB + token, mask=token < VOCAB, other=-_INFINITY)
    score = (logit.to(tl.float32) - maximum) * scale
    place = narrowing_tallies(tallies, request, NARROWING)
    if top_k > 0:
        for number in range(_THRESHOLDS):
            count = tl.sum((score >= threshold(low, high, number)).to(tl.int32))
            tl.atomic_add(place + number, count.to(tl.int64), sem="relaxed")
    else:
        weight = tl.exp2(score)
        # Count and mass in one number: the sums over a chunk stay apart.
        tally = tl.where(score >= lowest, weight_mass(weight) + _ONE_COUNT, 0)
        for number in range(_THRESHOLDS):
            least = tl.exp2(threshold(low, high, number))
            total = tl.sum(tl.where(weight >= least, tally, 0))
            count = (total >> _COUNT_SHIFT) & _COUNT_MASK
            tl.atomic_add(place + number, count, sem="relaxed")
            tl.atomic_add(place + _THRESHOLDS + number, total & (_ONE_COUNT - 1), sem="relaxed")


@triton.jit
def collect_kernel(
    logits,  # [B, VOCAB]
    rows,  # [B] int64
    floats,  # [R, float columns] float64
    integers,  # [R, integer columns] int64
    maxima,  # [B, CHUNKS] float32, of the logits
    minima,  # [B, CHUNKS] float32, of the finite logits
    tallies,  # [B, tallies] int64; the last counts the tokens found
    candidates,  # out: [B, candidates], the logits of these tokens in any order
    tokens,  # out: [B, candidates] int32, their ids
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,  # the next power of two
    PDL: tl.constexpr,
):
    """Gather one chunk's tokens whose scores lie where the boundary does."""
    chunk = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows + request)
    top_k, top_p = row_top_k(integers, row), row_top_p(floats, row)
    if (top_k == 0) & (top_p >= 1.0):
        return
    maximum = row_maximum(maxima, request, CHUNKS, PADDED_CHUNKS)
    lowest = lowest_score(maximum, minima, floats, request, row, CHUNKS, PADDED_CHUNKS)
    low, high, inside, _, _ = interval(tallies, request, lowest, top_k, top_p, _NARROWINGS)
    scale = row_scale(floats, row)
    largest = (tl.load(maxima + request * CHUNKS + chunk) - maximum) * scale
    if (inside > _CANDIDATES) | (largest + _MARGIN < low):
        return

    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logits + request * VOCAB + token, mask=token < VOCAB, other=-_INFINITY)
    score = (logit.to(tl.float32) - maximum) * scale
    by_mass = top_k == 0
    key = tl.where(by_mass, tl.exp2(score), score)
    least = tl.where(by_mass, tl.exp2(low), low)
    limit = tl.where(by_mass, tl.exp2(high), high)
    wanted = (score >= lowest) & (key >= least) & (key < limit)
    count = tl.sum(wanted.to(tl.int32))
    if count > 0:
        found = tallies + request * _TALLIES + _TALLIES - 1
        place = tl.atomic_add(found, count.to(tl.int64), sem="relaxed")
        place += tl.cumsum(wanted.to(tl.int32), 0) - 1
        wanted &= place < _CANDIDATES  # so it is: this keeps memory safe from a slip above
        tl.store(candidates + request * _CANDIDATES + place, logit, mask=wanted)
        tl.store(tokens + request * _CANDIDATES + place, token, mask=wanted)


def find_limits(
    logits: Tensor,
    rows: Tensor,
    floats: Tensor,
    integers: Tensor,
    maxima: Tensor,
    minima: Tensor,
    tallies: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What min-p, top-k and top-p leave of each row.

    Args:
        logits: [B, V], contiguous.
        rows: [B] int64, rows of the tables.
        floats: [R, float columns] float64.
        integers: [R, integer columns] int64.
        maxima: [B, chunks] float32, the largest logit of each chunk.
        minima: [B, chunks] float32, the smallest finite one.
        tallies: [B, TALLIES] int64, zero.
        chunk: tokens of a chunk, at most 2**11.

    Returns:
        [B] float32 least scores, [B] float32 least weights and [B] int32 last tokens: those stay
        whose score reaches the first and whose weight exceeds the second, or equals it if the
        token is not behind the last.
    """
    (batch, vocab_size), chunks, device = logits.shape, maxima.shape[1], logits.device
    pdl = supports_pdl(device)
    shape = (vocab_size, chunk, chunks, triton.next_power_of_2(chunks))
    tables = (logits, rows, floats, integers, maxima, minima)
    candidates = torch.empty(batch, CANDIDATES, dtype=logits.dtype, device=device)
    tokens = torch.empty(batch, CANDIDATES, dtype=torch.int32, device=device)
    least_scores, least_weights = (torch.empty(batch, device=device) for _ in range(2))
    last_tokens = torch.empty(batch, dtype=torch.int32, device=device)

    for narrowing in range(NARROWINGS):
        launch(
            narrow_kernel,
            (chunks, batch, 1),
            (*tables, tallies),
            (narrowing, *shape, pdl),
            num_warps=CHUNK_WARPS,
            pdl=pdl,
        )
    launch(
        collect_kernel,
        (chunks, batch, 1),
        (*tables, tallies, candidates, tokens),
        (*shape, pdl),
        num_warps=CHUNK_WARPS,
        pdl=pdl,
    )
    launch(
        boundary_kernel,
        (batch, 1, 1),
        (*tables, tallies, candidates, tokens, least_scores, least_weights, last_tokens),
        (vocab_size, *shape[2:], TILE, pdl),
        num_warps=ROW_WARPS,
        pdl=pdl,
    )
    return least_scores, least_weights, last_tokens

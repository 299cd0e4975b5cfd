"""The exact boundary of top-k and top-p in one row, among few tokens or all: by bisection.

The last step of `common.ops.truncation`. Non-negative floats have the order of their bits, so the
integers between two floats are halved until one is left. Nothing is moved, all is counted.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl

from common.ops.row_values import lowest_score, row_maximum, row_scale, row_top_k, row_top_p

THRESHOLDS = 8
NARROWINGS = 2
CANDIDATES = 4096  # most tokens that collect_kernel hands to boundary_kernel
TALLIES = NARROWINGS * 2 * THRESHOLDS + 1  # of a row: counts and masses, tokens collected

_THRESHOLDS = tl.constexpr(THRESHOLDS)
_NARROWINGS = tl.constexpr(NARROWINGS)
_CANDIDATES = tl.constexpr(CANDIDATES)
_TALLIES = tl.constexpr(TALLIES)
_PADDED_TALLIES = tl.constexpr(triton.next_power_of_2(TALLIES))
_INFINITY = tl.constexpr(float("inf"))
_MASS_OF_ONE = tl.constexpr(2.0**40)


@triton.jit
def clear_tallies(tallies, request):
    entry = tl.arange(0, _PADDED_TALLIES)
    zero = tl.zeros([_PADDED_TALLIES], tl.int64)
    tl.store(tallies + request * _TALLIES + entry, zero, mask=entry < _TALLIES)


@triton.jit
def narrowing_tallies(tallies, request, narrowing):
    """Where the counts of one narrowing begin; its masses follow."""
    return tallies + request * _TALLIES + narrowing * 2 * _THRESHOLDS


@triton.jit
def weight_mass(weight):
    """Twin: `common.truncation._mass`."""
    return (weight * _MASS_OF_ONE).to(tl.int64)


@triton.jit
def bits_mass(weight):
    """The same of a weight given by its float bits."""
    return weight_mass(weight.to(tl.float32, bitcast=True))


@triton.jit
def score_distance(score):
    """How far a score lies below 0 as float bits: integers in the order of the floats."""
    return tl.abs(score).to(tl.int32, bitcast=True)


@triton.jit
def mass_needed(top_p, total):
    return tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)


@triton.jit
def threshold(low, high, number):
    """Number 0 is ``low``. Spelled as one operation, so that all kernels get the same bits."""
    return tl.fma(tl.minimum(high, 0.0) - low, number * (1.0 / _THRESHOLDS), low)


@triton.jit
def interval(tallies, request, lowest, top_k, top_p, DONE: tl.constexpr):
    """Where the boundary of a row lies after DONE narrowings.

    A row with top-k is judged by the number of tokens, a row with top-p alone by their mass. With
    both, top-p needs all tokens that top-k leaves: then the interval stays open at the top.

    Returns:
        low, high: scores, the boundary b has low <= b < high; inf if the interval is open.
        inside: how many tokens lie between.
        above: count or mass of the tokens from ``high`` on.
        needed: count or mass that the tokens from the boundary on must reach.
    """
    number = tl.arange(0, _THRESHOLDS)
    by_mass = top_k == 0
    low = lowest
    high = tl.full([], _INFINITY, tl.float32)
    count_above = tl.full([], 0, tl.int64)
    above = tl.full([], 0, tl.int64)
    inside = tl.full([], _CANDIDATES + 1, tl.int64)  # the first narrowing is always due
    needed = top_k
    for narrowing in tl.static_range(DONE):
        place = narrowing_tallies(tallies, request, narrowing) + number
        counts = tl.load(place)  # they fall from threshold to threshold, and so do masses
        masses = tl.load(place + _THRESHOLDS)
        sums = tl.where(by_mass, masses, counts)
        if narrowing == 0:
            needed = tl.where(by_mass, mass_needed(top_p, tl.max(masses)), top_k)
        last = tl.maximum(tl.sum((sums >= needed).to(tl.int32)) - 1, 0)  # that is reached
        due = inside > _CANDIDATES
        closes = due & (last + 1 < _THRESHOLDS) & (by_mass | (top_p >= 1.0))
        beyond = number == last + 1
        above = tl.where(closes, tl.sum(tl.where(beyond, sums, 0)), above)
        count_above = tl.where(closes, tl.sum(tl.where(beyond, counts, 0)), count_above)
        count = tl.sum(tl.where(number == last, counts, 0))
        inside = tl.where(due, count - count_above, inside)
        new_low = threshold(low, high, last)
        high = tl.where(closes, threshold(low, high, last + 1), high)
        low = tl.where(due, new_low, low)
    return low, high, inside, above, needed


@triton.jit
def tile_distances(logits, tile, length, maximum, scale):
    """``score_distance`` of some tokens of a row, infinity's where ``tile`` exceeds ``length``."""
    logit = tl.load(logits + tile, mask=tile < length, other=-_INFINITY).to(tl.float32)
    return score_distance((logit - maximum) * scale)


@triton.jit
def distance_weight(distance):
    """Float bits of the weight of a token at a distance, from 0 to those of 1.0."""
    return tl.exp2(-distance.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)


@triton.jit
def kth_distance(logits, length, maximum, scale, nearest, farthest, k, TILE: tl.constexpr):
    """The least distance within which k tokens lie, if they do within ``farthest``; else that."""
    while nearest < farthest:
        middle = nearest + (farthest - nearest) // 2
        count = tl.full([], 0, tl.int64)
        for start in range(0, length, TILE):
            tile = start + tl.arange(0, TILE)
            distance = tile_distances(logits, tile, length, maximum, scale)
            count += tl.sum((distance <= middle).to(tl.int32))
        enough = count >= k
        farthest = tl.where(enough, middle, farthest)
        nearest = tl.where(enough, nearest, middle + 1)
    return farthest


@triton.jit
def mass_from(logits, length, maximum, scale, farthest, least, TILE: tl.constexpr):
    """Mass of the tokens within a distance whose weights' bits reach ``least``."""
    mass = tl.full([], 0, tl.int64)
    for start in range(0, length, TILE):
        tile = start + tl.arange(0, TILE)
        distance = tile_distances(logits, tile, length, maximum, scale)
        weight = distance_weight(distance)
        reaches = (distance <= farthest) & (weight >= least)
        mass += tl.sum(tl.where(reaches, bits_mass(weight), 0))
    return mass


@triton.jit
def boundary_weight(
    logits, length, maximum, scale, farthest, least, most, needed, TILE: tl.constexpr
):
    """The largest weight (its bits, ``least`` to ``most``) from which on the mass is enough.

    Returns:
        these bits, the mass from the next larger weight on, and the mass from these on: 0 if the
        search came to ``least`` without looking at it.
    """
    reached = tl.full([], 0, tl.int64)
    above = mass_from(logits, length, maximum, scale, farthest, most + 1, TILE)
    while least < most:
        middle = most - (most - least) // 2
        mass = mass_from(logits, length, maximum, scale, farthest, middle, TILE)
        enough = mass >= needed
        least = tl.where(enough, middle, least)
        most = tl.where(enough, most, middle - 1)
        above = tl.where(enough, above, mass)
        reached = tl.where(enough, mass, reached)
    return least, above, reached


@triton.jit
def last_kept_token(
    logits, tokens, collected, length, maximum, scale, farthest, tie, kept,
    VOCAB: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Up to which id there are ``kept`` tokens whose weight's bits are ``tie``; VOCAB: they all."""
    first = tl.full([], 0, tl.int32)
    last = tl.full([], VOCAB, tl.int32)
    while first < last:
        middle = first + (last - first) // 2
        count = tl.full([], 0, tl.int64)
        for start in range(0, length, TILE):
            tile = start + tl.arange(0, TILE)
            distance = tile_distances(logits, tile, length, maximum, scale)
            token = tl.load(tokens + tile, mask=(tile < length) & collected, other=0)
            token = tl.where(collected, token, tile)  # in a whole row the places themselves
            tied = (distance <= farthest) & (distance_weight(distance) == tie)
            count += tl.sum((tied & (token <= middle)).to(tl.int32))
        enough = count >= kept
        last = tl.where(enough, middle, last)
        first = tl.where(enough, first, middle + 1)
    return last


@triton.jit
def boundary_kernel(
    logits,  # [B, VOCAB]
    rows,  # [B] int64
    floats,  # [R, float columns] float64
    integers,  # [R, integer columns] int64
    maxima,  # [B, CHUNKS] float32, of the logits
    minima,  # [B, CHUNKS] float32, of the finite logits
    tallies,  # [B, tallies] int64
    candidates,  # [B, candidates], logits of the tokens that collect_kernel found
    tokens,  # [B, candidates] int32, their ids
    least_scores,  # out: [B] float32; tokens below are dropped
    least_weights,  # out: [B] float32; tokens with a smaller weight are dropped ...
    last_tokens,  # out: [B] int32; ... and those with this weight and an id above this
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,  # the next power of two
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find what min-p, top-k and top-p leave of one row."""
    request = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows + request)
    top_k, top_p = row_top_k(integers, row), row_top_p(floats, row)
    scale = row_scale(floats, row)
    maximum = row_maximum(maxima, request, CHUNKS, PADDED_CHUNKS)
    lowest = lowest_score(maximum, minima, floats, request, row, CHUNKS, PADDED_CHUNKS)
    low, high, inside, above, needed = interval(tallies, request, lowest, top_k, top_p, _NARROWINGS)

    collected = inside <= _CANDIDATES
    if collected:
        source = candidates + request * _CANDIDATES
        length = inside.to(tl.int32)
        needed -= above
    else:
        source = logits + request * VOCAB
        length = tl.full([], VOCAB, tl.int32)
    ids = tokens + request * _CANDIDATES
    farthest = score_distance(lowest)
    least = tl.exp2(low).to(tl.int32, bitcast=True)
    most = tl.exp2(tl.minimum(high, 0.0)).to(tl.int32, bitcast=True)
    if top_k > 0:
        nearest = score_distance(tl.minimum(high, 0.0))
        farthest = score_distance(low)
        farthest = kth_distance(source, length, maximum, scale, nearest, farthest, needed, TILE)
        least = distance_weight(farthest)
    tie = tl.full([], 0, tl.int32)
    last_token = tl.full([], VOCAB, tl.int32)
    if top_p < 1.0:
        if top_k > 0:
            total = mass_from(source, length, maximum, scale, farthest, 0, TILE)
            needed = mass_needed(top_p, total)
        tie, above, reached = boundary_weight(
            source, length, maximum, scale, farthest, least, most, needed, TILE
        )
        # Of the tokens on the boundary as many stay as the mass needs, those with the lowest ids.
        each = tl.maximum(bits_mass(tie), 1)
        kept = (needed - above + each - 1) // each
        if above + kept * each != reached:
            last_token = last_kept_token(
                source, ids, collected, length, maximum, scale, farthest, tie, kept, VOCAB, TILE
            )
    tl.store(least_scores + request, -farthest.to(tl.float32, bitcast=True))
    tl.store(least_weights + request, tie.to(tl.float32, bitcast=True))
    tl.store(last_tokens + request, last_token)

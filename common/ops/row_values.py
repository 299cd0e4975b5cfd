"""What the sampling kernels read of a row: its parameters, its largest logit, its lowest score.

A score is an exponent of 2: the logit less the row's largest, times log2(e) / temperature.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl

from common.sampling_rows import FloatColumn, IntegerColumn

_FLOAT_COLUMNS = tl.constexpr(len(FloatColumn))
_INTEGER_COLUMNS = tl.constexpr(len(IntegerColumn))
_SCALE = tl.constexpr(int(FloatColumn.SCALE))
_LOG2_MIN_P = tl.constexpr(int(FloatColumn.LOG2_MIN_P))
_REPETITION = tl.constexpr(int(FloatColumn.REPETITION))
_PRESENCE = tl.constexpr(int(FloatColumn.PRESENCE))
_FREQUENCY = tl.constexpr(int(FloatColumn.FREQUENCY))
_TOP_P = tl.constexpr(int(FloatColumn.TOP_P))
_TOP_K = tl.constexpr(int(IntegerColumn.TOP_K))
_SEED = tl.constexpr(int(IntegerColumn.SEED))
_INFINITY = tl.constexpr(float("inf"))

# The noise of the race lies within 2**-33 and 2**4.1: a token with a lower score cannot win.
_LOWEST_SCORE = tl.constexpr(-40.0)


@triton.jit
def row_scale(floats, row):
    """What turns differences of logits into scores; 0 for a greedy row."""
    return tl.load(floats + row * _FLOAT_COLUMNS + _SCALE).to(tl.float32)


@triton.jit
def row_log2_min_p(floats, row):
    return tl.load(floats + row * _FLOAT_COLUMNS + _LOG2_MIN_P).to(tl.float32)


@triton.jit
def row_top_p(floats, row):
    return tl.load(floats + row * _FLOAT_COLUMNS + _TOP_P)


@triton.jit
def row_top_k(integers, row):
    return tl.load(integers + row * _INTEGER_COLUMNS + _TOP_K)


@triton.jit
def row_seed(integers, row):
    return tl.load(integers + row * _INTEGER_COLUMNS + _SEED)


@triton.jit
def row_penalties(floats, row):
    """Repetition, presence and frequency penalty, as float32."""
    place = floats + row * _FLOAT_COLUMNS
    repetition = tl.load(place + _REPETITION).to(tl.float32)
    presence = tl.load(place + _PRESENCE).to(tl.float32)
    return repetition, presence, tl.load(place + _FREQUENCY).to(tl.float32)


@triton.jit
def is_penalised(floats, row):
    repetition, presence, frequency = row_penalties(floats, row)
    return (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)


@triton.jit
def is_truncated(floats, integers, row):
    """Whether min-p, top-k or top-p leaves tokens of this row out."""
    narrowed = (row_top_k(integers, row) > 0) | (row_top_p(floats, row) < 1.0)
    return narrowed | (row_log2_min_p(floats, row) > -_INFINITY)


@triton.jit
def row_maximum(maxima, request, CHUNKS: tl.constexpr, PADDED_CHUNKS: tl.constexpr):
    """The largest logit of a row, of which ``maxima`` [B, CHUNKS] holds each chunk's."""
    chunk = tl.arange(0, PADDED_CHUNKS)
    return tl.max(tl.load(maxima + request * CHUNKS + chunk, mask=chunk < CHUNKS, other=-_INFINITY))


@triton.jit
def lowest_score(
    maximum, minima, floats, request, row, CHUNKS: tl.constexpr, PADDED_CHUNKS: tl.constexpr
):
    """The score that a token of a row needs to be of interest at all."""
    chunk = tl.arange(0, PADDED_CHUNKS)
    minimum = tl.min(
        tl.load(minima + request * CHUNKS + chunk, mask=chunk < CHUNKS, other=_INFINITY)
    )
    lowest = tl.maximum((minimum - maximum) * row_scale(floats, row), _LOWEST_SCORE)
    return tl.maximum(lowest, row_log2_min_p(floats, row))

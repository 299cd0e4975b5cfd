"""The noise of `common.random` inside a kernel: the same bits, and the logarithm of what they mean.

Twin: `common.random.hash_tokens` and `exponential_noise`.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from common.ops.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_UNIT = tl.constexpr(2.0**-32 * (1.0 - 2.0**-24))  # keeps the largest hash below 1, as the twin
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def stream_key(seed, step):
    """The 64 random bits of a row's step; both arguments are int64 scalars."""
    key = mix64(seed.to(tl.uint64)) + (step + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    return mix64(key)


@triton.jit
def mix64(x):
    """SplitMix64's finalizer."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def random_bits(token, key):
    """32 random bits for each of some token ids (int32), as uint32."""
    x = token.to(tl.uint32) + (key & 0xFFFFFFFF).to(tl.uint32)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def log2_exponential(bits):
    """log2 of an exponential variable E = -log(1 - v), v = (bits + 1/2) / 2**32; to 2e-5.

    The hardware's logarithm has an absolute error of 2**-22 near 1, which would swallow a small E.
    Those are the values that let an unlikely token win, so they come from the series instead. What
    remains changes the rate at which a token is drawn by a factor of at most 1 ± 2e-5.
    """
    bits = bits.to(tl.float32) + 0.5
    v = bits * _UNIT
    series = v * tl.fma(v, tl.fma(v, 1.0 / 3.0, 0.5), 1.0)
    # Fused multiply-adds are spelled out: no kernel may round otherwise than another.
    exponential = tl.where(v < 1.0 / 64.0, series, -_LN2 * log2(tl.fma(bits, -_UNIT, 1.0)))
    return log2(exponential)


@triton.jit
def log2(x):
    """Of the hardware; ``tl.log2`` is exact to the last bit or two, for many more instructions."""
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)

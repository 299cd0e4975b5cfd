"""Counter-based random numbers: noise as a pure function of (seed, step, token).

A generator with a state would tie a request's tokens to whatever else was drawn from it before.
Here nothing is drawn: the noise of token ``t`` at step ``s`` of a request is a hash of the
request's seed, ``s`` and ``t``. It is the same alone or in a batch, before or after a preemption,
and its bits are the same on every device. The idea is that of Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011); the hash is cheaper than theirs, because it is paid once
for every token of the vocabulary:

1. per row, 64 bits: ``key = mix64(mix64(seed) + (step + 1) * golden)`` with SplitMix64's finalizer
   (Steele, Lea, Flood, OOPSLA 2014); ``lo`` and ``hi`` are the halves of ``key``;
2. per token, 32 bits: Wellons' two-round integer hash "lowbias32" of ``token + lo``, with ``hi``
   xor-ed in between its rounds, so that streams whose ``lo`` lie close are not shifted copies.

All of it is wrapping integer arithmetic, which a GPU kernel can repeat bit by bit on uint32.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN64 = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1

# Just under 2**-32: a hash that float32 rounds up to 2**32 still lands below 1.
_UNIT = 2.0**-32 * (1.0 - 2.0**-24)


def seed_for(engine_seed: int, key: str, index: int) -> int:
    """64-bit seed of a request that brought none.

    A function of the name alone, so that neither arrival order nor a preemption can change it.
    """
    text = f"{engine_seed}/{index}/{key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def to_int64(value: int) -> int:
    """``value`` modulo 2**64, as the signed integer that an int64 tensor stores for it."""
    return _signed(value & _MASK64, 64)


def exponential_noise(seeds: Tensor, steps: Tensor, vocab_size: int) -> Tensor:
    """Independent draws from the exponential distribution with mean 1, one per row and token.

    ``E = -log1p(-v)`` with ``v = (h + 1/2) / 2**32`` and ``h`` the token's 32-bit hash. In an
    exponential race it is the small values of E that let an unlikely token win, so these keep their
    relative precision, which ``-log(u)`` with u near 1 would round away. The limit is the grid of
    2**-32: a token is drawn at the rate of its probability p to 1% for p above 5e-10, and below
    that less often than it should be.

    Args:
        seeds: [B] int64, all 64 bits count.
        steps: [B] int64, number of tokens each row has sampled before.
        vocab_size: V.

    Returns:
        [B, V] float32, finite and positive.
    """
    hashes = hash_tokens(seeds, steps, vocab_size).view(torch.uint32).float()
    return hashes.add_(0.5).mul_(-_UNIT).log1p_().neg_()


def hash_tokens(seeds: Tensor, steps: Tensor, vocab_size: int) -> Tensor:
    """The 32 random bits of each row and token.

    Args:
        seeds: [B] int64.
        steps: [B] int64.
        vocab_size: V, below 2**31.

    Returns:
        [B, V] int32; read the bits as unsigned.
    """
    keys = _mix64(_mix64(seeds) + (steps + 1) * _signed(_GOLDEN64, 64))
    low, high = keys.view(torch.int32).view(-1, 2).unbind(1)  # little-endian halves
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    # In place on int32: twice as fast on a CPU as int64 masked to 32 bits.
    x = low[:, None] + tokens
    _xor_shifted_(x, 16).mul_(_signed(0x7FEB352D, 32)).bitwise_xor_(high[:, None])
    _xor_shifted_(x, 15).mul_(_signed(0x846CA68B, 32))
    return _xor_shifted_(x, 16)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of 64 bits in which every input bit reaches every output.

    Args:
        x: int64, any shape.
    """
    x = _xor_shifted_(x.clone(), 30) * _signed(0xBF58476D1CE4E5B9, 64)
    x = _xor_shifted_(x, 27) * _signed(0x94D049BB133111EB, 64)
    return _xor_shifted_(x, 31)


def _xor_shifted_(x: Tensor, shift: int) -> Tensor:
    """``x ^= x >> shift`` in place, the shift being logical."""
    bits = x.element_size() * 8
    # torch shifts signed integers arithmetically: clear the copies of the sign bit.
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (bits - shift)) - 1))


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of an unsigned number of so many bits."""
    return value - (1 << bits) if value >> (bits - 1) else value

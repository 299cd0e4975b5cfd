"""Which tokens stay in the race: top-k, min-p and top-p for a batch of rows at once.

There is no sort: a top-k is a threshold, and so is a top-p, found here by radix selection. On a CPU
sorting the vocabulary takes several times as long. On a GPU `common.ops.truncation` finds the same
thresholds in another way.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bits of 1.0 as float32. Between 0 and 1, floats and their bits (as integers) have the same order.
_ONE = 0x3F800000
# The bits of a float in [0, 1] are read as two digits.
_DIGIT_BITS = 15
_NUM_DIGITS = 1 << _DIGIT_BITS


def lowest_score(scores: Tensor, top_k: Tensor, max_top_k: int, log2_min_p: Tensor) -> Tensor:
    """The score that a token must reach to pass both top-k and min-p.

    Tokens that tie with the k-th likeliest pass (as in vLLM and transformers).

    Args:
        scores: [B, V] float32, log2 of the weight relative to the likeliest token's, which has 0.
        top_k: [B, 1] int64; 0 for all.
        max_top_k: largest of ``top_k``, at most V; 0 when no row has one.
        log2_min_p: [B, 1] float32; -inf for all.

    Returns:
        [B, 1] float32.
    """
    if not max_top_k:
        return log2_min_p
    likeliest = scores.topk(max_top_k).values  # descending
    kth = likeliest.gather(1, (top_k - 1).clamp(0, max_top_k - 1))
    return torch.maximum(log2_min_p, kth.masked_fill(top_k == 0, -torch.inf))


def top_p_mask(weights: Tensor, top_p: Tensor) -> Tensor:
    """The fewest likeliest tokens whose share of the row's weight reaches ``top_p``.

    Equivalently, in ascending order tokens are dropped while the sum of the dropped ones stays
    within ``1 - top_p``; the token at the boundary stays. Of tokens with equal weight those with
    lower ids stay. Weights are added up as integers, multiples of 2**-40 of the largest, so that
    neither the order of summation nor the batch can move the boundary.

    Args:
        weights: [B, V] float32 in [0, 1], the largest of each row being 1; NaN counts as 0 or 1.
        top_p: [B, 1] float64 in (0, 1].

    Returns:
        [B, V] float32, 1 for tokens that stay and 0 for the others.
    """
    bits = weights.view(torch.int32).clamp(0, _ONE)  # also keeps NaN within the digits
    masses = _mass(bits)
    total = masses.sum(1, keepdim=True)
    droppable = total - (top_p * total).ceil().long()

    # The boundary's first digit, then its second among the tokens that share the first.
    digits = (bits >> _DIGIT_BITS).long()
    first_digit, droppable = _boundary_digit(digits, masses, droppable)
    masses.mul_(digits.eq_(first_digit))
    digits.copy_(bits & (_NUM_DIGITS - 1))
    second_digit, droppable = _boundary_digit(digits, masses, droppable)
    boundary = ((first_digit << _DIGIT_BITS) + second_digit).int()

    # What may still be dropped pays for some of the tokens that lie on the boundary.
    on_boundary = (bits == boundary).int()
    num_dropped = droppable // _mass(boundary).clamp(min=1)
    num_kept = (on_boundary.sum(1, keepdim=True) - num_dropped).int()
    position = on_boundary.cumsum(1, dtype=torch.int32).mul_(on_boundary)  # from 1; 0: elsewhere
    stays = (bits >= boundary) & (position <= num_kept)
    return (stays | (top_p >= 1.0)).float()


def _mass(bits: Tensor) -> Tensor:
    """Weights given by their float32 bits, as int64 multiples of 2**-40."""
    return (bits.view(torch.float32) * 2.0**40).long()


def _boundary_digit(digits: Tensor, masses: Tensor, droppable: Tensor) -> tuple[Tensor, Tensor]:
    """One step of a radix selection by mass.

    Args:
        digits: [B, V] int64 in [0, 2**15).
        masses: [B, V] int64.
        droppable: [B, 1] int64, how much mass may be dropped, from the lowest digit on.

    Returns:
        The lowest digit [B, 1] whose tokens cannot all be dropped, and the mass [B, 1] that may
        still be dropped among these once all lower digits are gone.
    """
    sums = masses.new_zeros(masses.shape[0], _NUM_DIGITS).scatter_add_(1, digits, masses)
    sums = sums.cumsum_(1)
    digit = torch.searchsorted(sums, droppable, right=True).clamp(max=_NUM_DIGITS - 1)
    dropped = sums.gather(1, (digit - 1).clamp(min=0)).masked_fill(digit == 0, 0)
    return digit, droppable - dropped

"""A quantized weight with its inputs sorted by group: act-order undone, once.

    weight = GroupedWeight.of(linear)                  # of a checkpoint's PackedLinear
    x.index_select(-1, weight.order)                   # goes with it, where there is an order

Act-order (desc_act) puts inputs into groups by how much they matter, not by where they stand. A
kernel that looked up each input's group would read scales all over the place; one whose weights
stand in the order of their groups reads a scale for every run of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import PackedLinear


@dataclass(frozen=True)
class GroupedWeight:
    """A quantized weight whose inputs stand in the order of their groups, all of one size.

    codes: uint8 ``[N, K]``; zeros: uint8 ``[N, G]``; scales: ``[N, G]``, K = G * group_size;
    order: int32 ``[K]``, the input that belongs to each column, or None for the inputs as they are.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    order: Tensor | None

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @classmethod
    def of(cls, linear: PackedLinear) -> GroupedWeight:
        """Sort a checkpoint's weight by group.

        Groups of unequal sizes (the last one, where the size does not divide the inputs) are cut
        into parts of the largest size that divides all of them.
        """
        groups = linear.g_idx.long()
        sizes = torch.bincount(groups, minlength=len(linear.scales))
        parts = sizes // math.gcd(*sizes.tolist())
        codes, zeros, scales = linear.codes().T, linear.zeros().T, linear.scales.T
        order = None
        if (groups.diff() < 0).any():
            order = groups.argsort(stable=True).int()
            codes = codes[:, order]
        return cls(
            codes.contiguous(),
            zeros.repeat_interleave(parts, dim=1).contiguous(),
            scales.repeat_interleave(parts, dim=1).contiguous(),
            order,
        )

    def can_join(self, other: GroupedWeight) -> bool:
        """Whether both can be one weight: equal groups of the same inputs in the same order."""
        if self.order is None or other.order is None:
            same_order = self.order is other.order
        else:
            same_order = torch.equal(self.order, other.order)
        return same_order and self.group_size == other.group_size

    @staticmethod
    def join(weights: Sequence[GroupedWeight]) -> GroupedWeight:
        """The weights below each other."""
        codes = torch.cat([weight.codes for weight in weights])
        zeros = torch.cat([weight.zeros for weight in weights])
        scales = torch.cat([weight.scales for weight in weights])
        return GroupedWeight(codes, zeros, scales, weights[0].order)

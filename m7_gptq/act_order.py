"""Act-order of the down projection for nothing: gate and up give their outputs in its order.

    gate, up, down = reorder_mlp(gate, up, down)

A projection whose inputs were put into groups by act-order needs x in another order. What the down
projection gets is silu(gate) * up, element by element: if the outputs of gate and up are put into
its order, once, nobody has to put them there in every step. (The inputs of q, k, v, gate and up are
the residual stream, which all layers share; those of o belong to heads: their order is not free.)
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .packing import PackedLinear, pack_rows, pack_zeros


def reorder_mlp(
    gate: PackedLinear, up: PackedLinear, down: PackedLinear
) -> tuple[PackedLinear, PackedLinear, PackedLinear]:
    """The three with outputs of gate and up, and inputs of down, in the order of down's groups."""
    groups = down.g_idx.long()
    if not (groups.diff() < 0).any():
        return gate, up, down
    order = groups.argsort(stable=True)
    return with_outputs(gate, order), with_outputs(up, order), with_inputs(down, order)


def with_outputs(linear: PackedLinear, order: Tensor) -> PackedLinear:
    """The same projection with output order[i] in place i."""
    return replace(
        linear,
        qweight=linear.qweight[:, order].contiguous(),
        qzeros=pack_zeros(linear.zeros()[:, order], linear.bits, linear.checkpoint_format),
        scales=linear.scales[:, order].contiguous(),
        bias=None if linear.bias is None else linear.bias[order],
    )


def with_inputs(linear: PackedLinear, order: Tensor) -> PackedLinear:
    """The same projection with input order[i] in place i."""
    return replace(
        linear,
        qweight=pack_rows(linear.codes()[order], linear.bits),
        g_idx=linear.g_idx[order],
    )

"""silu(gate) * up, the gate of the MLP (SwiGLU: Shazeer 2020, arXiv 2002.05202), in one pass.

    y = silu_mul(gate_up)                    # [..., 2I] -> [..., I]

The twin is `common.layers.Ops.silu_mul`.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from common.ops.launch import launch
from common.ops.layout import aligned

TILE = 1024  # columns of one program
NUM_WARPS = 4  # 8 values to a thread: one 16-byte load of each half


@triton.jit
def silu_mul_kernel(
    gate_up,  # [R, 2 * INNER], gate first
    out,  # [R, INNER]
    INNER: tl.constexpr,
    TILE: tl.constexpr,  # columns of one program
    PDL: tl.constexpr,
):
    """One program makes TILE values of one row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < INNER
    gate = tl.load(gate_up + row * (2 * INNER) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * INNER) + INNER + column, mask=inside, other=0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)  # rounded as the twin rounds it
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * INNER + column, product.to(up.dtype), mask=inside)


def silu_mul(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """silu(gate) * up of gate_up[..., 2I], gate first -> [..., I].

    Args:
        pdl: begin before the previous kernel has ended (see `common.ops.launch`).
    """
    gate_up = aligned(gate_up)
    inner, odd = divmod(gate_up.shape[-1], 2)
    if odd:
        raise ValueError(f"gate and up must be of one size, not {gate_up.shape[-1]} together")
    out = gate_up.new_empty((*gate_up.shape[:-1], inner))
    num_rows = gate_up.numel() // max(2 * inner, 1)
    if num_rows:
        launch(
            silu_mul_kernel,
            (num_rows, -(-inner // TILE), 1),
            (gate_up, out),
            (inner, TILE, pdl),
            num_warps=NUM_WARPS,
            pdl=pdl,
        )
    return out

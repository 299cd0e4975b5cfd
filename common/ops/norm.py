"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), alone and after the residual addition.

    y = rms_norm(x, weight, eps)
    y, total = add_rms_norm(x, residual, weight, eps)

Plain torch reads and writes the activations several times over (square, mean, scale, multiply);
here every value is read once and written once. The twins are `common.layers.Ops.rms_norm` and
`add_rms_norm`: the same arithmetic in float32, rounded at the same places.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.launch import launch
from common.ops.layout import aligned

FEW_ROWS = 256
MAX_WARPS = 16


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x,  # [R, N]
    residual,  # [R, N], added to x first if ADD
    weight,  # [N]
    out,  # [R, N]
    total,  # [R, N], x + residual if ADD
    eps,  # float32
    num_rows,  # R
    N: tl.constexpr,
    PADDED_N: tl.constexpr,  # the next power of two
    ROWS: tl.constexpr,  # of one program
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program normalises ROWS rows, each of which it holds in registers."""
    column = tl.arange(0, PADDED_N)
    scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offset = row[:, None] * N + column[None, :]
    inside = (row < num_rows)[:, None] & (column < N)[None, :]
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + offset, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the sum that the next layer adds to, as the twin has it
    mean_square = tl.sum(value * value, axis=1) / N
    value = value * tl.rsqrt(mean_square + eps)[:, None] * scale[None, :]
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tiling:
    """How the rows are dealt out."""

    padded_n: int  # a row's lanes, the power of two from N up
    rows: int  # of one program
    warps: int  # of one program


@lru_cache
def choose_tiling(n: int, few_rows: bool) -> Tiling:
    """What was fastest on an H200.

    Few rows leave most of the GPU idle, so a row is spread over many threads: 8 values each, one
    16-byte load. With many rows all programs together keep the memory busy, and fewer warps to a
    row have less to wait for each other in its sum.
    """
    padded_n = triton.next_power_of_2(n)
    warps = padded_n // (256 if few_rows else 1024)
    return Tiling(padded_n, 1, min(max(warps, 1), MAX_WARPS))


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """x[..., N] / rms(x) * weight[N], computed in float32 and rounded once.

    Args:
        pdl: begin before the previous kernel has ended (see `common.ops.launch`).
    """
    x = aligned(x)
    out = torch.empty_like(x)
    _launch(x, x, weight, out, out, eps, add=False, pdl=pdl)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total) with total = x + residual rounded to the dtype, all [..., N]."""
    x, residual = aligned(x), aligned(residual)
    if x.shape != residual.shape:
        raise ValueError(
            f"x and residual must have one shape, not {list(x.shape)} and {list(residual.shape)}"
        )
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, out, total, eps, add=True, pdl=pdl)
    return out, total


def _launch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    total: Tensor,
    eps: float,
    *,
    add: bool,
    pdl: bool,
) -> None:
    n = x.shape[-1]
    if weight.shape != (n,):
        raise ValueError(f"the weight must be [{n}] as the rows of x, not {list(weight.shape)}")
    num_rows = x.numel() // n
    if num_rows == 0:
        return
    tiling = choose_tiling(n, few_rows=num_rows <= FEW_ROWS)
    launch(
        rms_norm_kernel,
        (-(-num_rows // tiling.rows), 1, 1),
        (x, residual, weight, out, total, eps, num_rows),
        (n, tiling.padded_n, tiling.rows, add, pdl),
        num_warps=tiling.warps,
        pdl=pdl,
    )

"""The operations of a layer as fused Triton kernels: `common.layers.Ops`, made for a GPU.

    model = Transformer(config, dtype=torch.bfloat16, device="cuda", ops=FusedOps())

Nothing is computed otherwise than by the plain operations: fewer passes over memory and fewer
kernels, that is all. Matrix products are cuBLAS's unless the batch is so small that reading the
weight is all the work (`common.ops.matmul`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.layers import AttendFn, Linear, LinearModule, Ops
from common.ops import matmul
from common.ops.activation import silu_mul
from common.ops.launch import supports_pdl
from common.ops.norm import add_rms_norm, rms_norm
from common.ops.rope import qk_norm_rope

# With more rows than this a kernel runs so long that the start of the next one does not show.
EARLY_LAUNCH_ROWS = 128


def num_rows(x: Tensor) -> int:
    """R of x[..., N]: all leading dimensions together."""
    return x.numel() // x.shape[-1]


def launches_early(rows: int, device: torch.device) -> bool:
    """Whether kernels on so many rows should begin while the one before them still runs."""
    return rows <= EARLY_LAUNCH_ROWS and supports_pdl(device)


def is_plain(linear: LinearModule) -> bool:
    """Whether its weight is what our products take: a row-major matrix of 16-bit floats."""
    # Asked of the exact class: what derives from it may keep its weight in another form.
    return (
        type(linear) is Linear
        and linear.weight.dtype in (torch.bfloat16, torch.float16)
        and not linear.weight.is_mkldnn
    )


def product_pays(x: Tensor, linear: LinearModule) -> bool:
    """Whether our matrix product is expected to be faster than the layer's own."""
    return _is_ours(x, linear) and matmul.pays(num_rows(x), *linear.weight.shape, x.dtype)


def norm_product_pays(x: Tensor, linear: LinearModule) -> bool:
    """Whether it should compute the norm of x as well."""
    return _is_ours(x, linear) and matmul.norm_pays(num_rows(x), *linear.weight.shape, x.dtype)


def _is_ours(x: Tensor, linear: LinearModule) -> bool:
    """Whether it is one that our kernels take. A long step, which asks in every layer, is told by
    its rows at once."""
    return num_rows(x) <= matmul.MAX_ROWS and is_plain(linear)


def as_rows(x: Tensor) -> Tensor:
    """x[..., N] -> [R, N]."""
    return x.contiguous().view(-1, x.shape[-1])


def product(x: Tensor, linear: Linear, *, silu_mul: bool = False) -> Tensor:
    """linear(x) for x[..., K], or silu_mul of it, by our own kernel."""
    rows = as_rows(x)
    pdl = launches_early(len(rows), x.device)
    y = matmul.skinny_linear(rows, linear.weight, linear.bias, silu_mul=silu_mul, pdl=pdl)
    return y.view(*x.shape[:-1], y.shape[-1])


def norm_product(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    linear: Linear,
    *,
    silu_mul: bool = False,
) -> tuple[Tensor, Tensor]:
    """(product(rms_norm(x + residual), linear), x + residual) in one kernel."""
    rows = as_rows(x)
    y, total = matmul.skinny_norm_linear(
        rows,
        None if residual is None else as_rows(residual),
        weight,
        eps,
        linear.weight,
        linear.bias,
        silu_mul=silu_mul,
        pdl=launches_early(len(rows), x.device),
    )
    return y.view(*x.shape[:-1], y.shape[-1]), total.view(x.shape)


class FusedOps(Ops):
    """Kernels where the plain operations have several; see `common.layers.Ops` for each."""

    name = "fused"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps, pdl=launches_early(num_rows(x), x.device))

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps, pdl=launches_early(num_rows(x), x.device))

    def qk_norm_rope(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if q.dim() != 3:
            flat_q, flat_k, cos, sin = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, cos, sin))
            flat = self.qk_norm_rope(flat_q, flat_k, q_weight, k_weight, eps, cos, sin)
            return flat[0].view(q.shape), flat[1].view(k.shape)
        pdl = launches_early(len(q), q.device)
        return qk_norm_rope(q, k, k, q_weight, k_weight, eps, cos, sin, pdl=pdl)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up, pdl=launches_early(num_rows(gate_up), gate_up.device))

    def linear(self, x: Tensor, linear: LinearModule) -> Tensor:
        """linear(x), by our own product where cuBLAS is slow."""
        return product(x, linear) if product_pays(x, linear) else linear(x)

    def norm_linear(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, linear: LinearModule
    ) -> tuple[Tensor, Tensor]:
        """Addition, norm and product in one kernel where that pays."""
        if norm_product_pays(x, linear):
            return norm_product(x, residual, weight, eps, linear)
        return super().norm_linear(x, residual, weight, eps, linear)

    def norm_gate_up(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, linear: LinearModule
    ) -> tuple[Tensor, Tensor]:
        """The same with silu_mul, which our product does before it writes anything."""
        if norm_product_pays(x, linear):
            return norm_product(x, residual, weight, eps, linear, silu_mul=True)
        x, residual = self.add_rms_norm(x, residual, weight, eps)
        if product_pays(x, linear):
            return product(x, linear, silu_mul=True), residual
        return self.silu_mul(linear(x)), residual

    def attention(
        self,
        attend: AttendFn,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Norm and rotation are left to `attend` if it has them in its kernels.

        Such an `attend` has an attribute ``takes_unrotated``, which may change from step to step,
        and ``rotate_and_attend(layer, q, k, v, q_weight, k_weight, eps, cos, sin)``.
        """
        if getattr(attend, "takes_unrotated", False):
            return attend.rotate_and_attend(layer, q, k, v, q_weight, k_weight, eps, cos, sin)
        return super().attention(attend, layer, q, k, v, q_weight, k_weight, eps, cos, sin)

"""The parts of the transformer that a later stage swaps: linear layers and the small operations.

    linear = Linear(576, [576, 192, 192], bias=False, name="qkv", dtype=..., device=...)
    linear.load_shard("weight", 1, k_weight)      # rows 576:768
    qkv = linear(x)                               # [..., 576] -> [..., 960]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.rope import rotate

AttendFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q[..., Hq, D], k[..., Hkv, D], v[..., Hkv, D]) -> [..., Hq, D].

q and k are rotated already; v may be a strided view.
"""


class Linear(nn.Module):
    """y = x Wᵀ + b of several projections that share their input, packed into one weight.

    weight: [sum(shard_sizes), in_features]; the shards lie below each other. On the CPU
    `finish_loading` exchanges it for oneDNN's blocked layout, whose product takes a half to a
    quarter of `F.linear`'s time on the 1 to 32 rows of a decode step. A weight that is shared (a
    tied lm_head) then exists twice; `weight.to_dense()` gives the plain layout back.
    """

    def __init__(
        self,
        in_features: int,
        shard_sizes: Sequence[int],
        bias: bool,
        *,
        name: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.name = name
        self.shard_sizes = tuple(shard_sizes)
        out_features = sum(shard_sizes)
        self.weight = empty_parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = empty_parameter(out_features, dtype=dtype, device=device) if bias else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the tensors each shard has in a checkpoint."""
        return ("weight",) if self.bias is None else ("weight", "bias")

    def load_shard(self, kind: str, index: int, tensor: Tensor) -> None:
        """Copy one projection's tensor into its rows; ValueError if its shape is another."""
        rows = getattr(self, kind).split(self.shard_sizes)[index]
        copy_checked(rows, tensor)

    def finish_loading(self) -> None:
        """Bring the weight into the layout that is fastest on its device; load no shard after."""
        if _onednn_takes(self.weight):
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x[..., in_features] -> [..., sum(shard_sizes)]."""
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _onednn_takes(weight: Tensor) -> bool:
    """Whether oneDNN packs and multiplies this weight on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return weight.dtype == torch.float32


class LinearModule(Protocol):
    """What the model asks of a linear layer, whatever the form its weights have."""

    kinds: tuple[str, ...]

    def load_shard(self, kind: str, index: int, tensor: Tensor) -> None: ...

    def finish_loading(self) -> None: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class LinearFactory(Protocol):
    """Makes the linear layers of a model; `Linear` itself is one."""

    def __call__(
        self,
        in_features: int,
        shard_sizes: Sequence[int],
        bias: bool,
        *,
        name: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> LinearModule: ...


class Ops:
    """What a layer is made of, in plain torch.

    The small operations come first, then the larger ones that ``Transformer.forward`` calls, put
    together from them. Later stages override either with fused kernels (``common.ops``). None
    changes its arguments.
    """

    name = "torch"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x[..., N] / rms(x) * weight[N], computed in float32 and rounded once."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual), all [..., H]."""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

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
        """q[..., Hq, D], k[..., Hkv, D] normalised by head (where weights are given), then rotated.

        cos, sin: [..., 1, D] as `common.rope.RotaryEmbedding` gives them.
        """
        if q_weight is not None:
            q, k = self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of gate_up[..., 2I], gate first -> [..., I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def linear(self, x: Tensor, linear: LinearModule) -> Tensor:
        """linear(x)."""
        return linear(x)

    def norm_linear(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, linear: LinearModule
    ) -> tuple[Tensor, Tensor]:
        """(linear(rms_norm(x + residual)), x + residual); without a residual it is 0."""
        if residual is None:
            x, residual = self.rms_norm(x, weight, eps), x
        else:
            x, residual = self.add_rms_norm(x, residual, weight, eps)
        return self.linear(x, linear), residual

    def norm_gate_up(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, linear: LinearModule
    ) -> tuple[Tensor, Tensor]:
        """(silu_mul(linear(rms_norm(x + residual))), x + residual)."""
        gate_up, residual = self.norm_linear(x, residual, weight, eps, linear)
        return self.silu_mul(gate_up), residual

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
        """attend(layer, q, k, v) with q and k normalised and rotated first -> [..., Hq, D]."""
        q, k = self.qk_norm_rope(q, k, q_weight, k_weight, eps, cos, sin)
        return attend(layer, q, k, v)


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """A parameter that waits for its values; nothing here is ever trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def copy_checked(target: Tensor, source: Tensor) -> None:
    """Copy into target, casting and moving as needed; ValueError if the shapes differ."""
    if target.shape != source.shape:
        raise ValueError(
            f"has shape {list(source.shape)}, but the configuration asks for {list(target.shape)}"
        )
    target.copy_(source)

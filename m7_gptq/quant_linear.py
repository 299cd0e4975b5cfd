"""Linear layers whose weights stay packed in memory.

    linear = QuantLinear(64, [64, 32, 32], False, name=..., dtype=..., device=..., bits=4)
    for kind in linear.kinds:                          # qweight, qzeros, scales, g_idx
        linear.load_shard(kind, 1, tensor)             # of the second projection
    linear.finish_loading()
    y = linear(x)                                      # [..., 64] -> [..., 128]

Where act-order has put inputs into groups, x is brought into the same order by one
``index_select`` before the product. Projections that share their input and were quantized together
share the order, and become one product; where they do not, each has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoint_format import PARTS
from .grouped_weight import GroupedWeight
from .packed_product import Product, ProductMaker
from .packing import V1, PackedLinear


class QuantLinear(nn.Module):
    """y = x Wᵀ + b of several projections that share their input, with W packed.

    A `common.layers.LinearModule`, as `common.layers.Linear` is. Layers of one model should be
    given one `ProductMaker`.
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
        bits: int,
        checkpoint_format: str = V1,
        make_product: ProductMaker | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.shard_sizes = tuple(shard_sizes)
        self.name, self.dtype, self.device = name, dtype, torch.device(device)
        self.kinds = (*PARTS, "bias") if bias else PARTS
        self._bits, self._format = bits, checkpoint_format
        self._make_product = make_product or ProductMaker()
        self._loaded: list[dict[str, Tensor]] = [{} for _ in shard_sizes]
        self._segments: list[_Segment] = []

    def load_shard(self, kind: str, index: int, tensor: Tensor) -> None:
        """Keep one tensor of a projection; what belongs together is put together at the end."""
        self._loaded[index][kind] = tensor.to(self.device)

    def finish_loading(self) -> None:
        """Bring the weights into the form the product reads; ValueError for tensors that differ."""
        waiting: list[tuple[GroupedWeight, Tensor | None]] = []
        for index, parts in enumerate(self._loaded):
            try:
                linear = PackedLinear(self._bits, checkpoint_format=self._format, **parts)
            except ValueError as error:
                raise ValueError(f"weights: {self.name}, projection {index}: {error}") from None
            found, expected = (linear.out_features, linear.in_features), self._shape(index)
            if found != expected:
                raise ValueError(
                    f"weights: {self.name}, projection {index} is {list(found)}, "
                    f"but the configuration asks for {list(expected)}"
                )
            weight = GroupedWeight.of(linear)
            if waiting and not waiting[-1][0].can_join(weight):
                self._add_segment(waiting)
                waiting = []
            waiting.append((weight, linear.bias))
        self._add_segment(waiting)
        self._loaded.clear()

    def _shape(self, index: int) -> tuple[int, int]:
        return self.shard_sizes[index], self.in_features

    def _add_segment(self, projections: list[tuple[GroupedWeight, Tensor | None]]) -> None:
        weights, biases = zip(*projections, strict=True)
        weight = GroupedWeight.join(weights)
        product = self._make_product(weight, self._bits, self.dtype)
        bias = torch.cat(biases).to(self.dtype) if "bias" in self.kinds else None
        self._segments.append(_Segment(product, weight.order, bias))

    @property
    def num_bytes(self) -> int:
        """Memory that the weights take, their order included."""
        return sum(segment.num_bytes for segment in self._segments)

    @property
    def num_products(self) -> int:
        """1 where all projections have their inputs in the same order."""
        return len(self._segments)

    def forward(self, x: Tensor) -> Tensor:
        """x[..., in_features] -> [..., sum(shard_sizes)]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        outputs = [segment(rows) for segment in self._segments]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y.view(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class _Segment:
    """Neighbouring projections that are multiplied as one."""

    product: Product
    order: Tensor | None
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        return self.product.num_bytes + (0 if self.order is None else self.order.nbytes)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        return self.product(rows, self.bias)

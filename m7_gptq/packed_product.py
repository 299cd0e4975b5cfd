"""Products with packed weights: by the int4 kernels, or by unpacking the weight in every call.

    make = ProductMaker()                              # one for all layers of a model
    product = make(GroupedWeight.of(linear), bits=4, dtype=torch.bfloat16)
    y = product(x, bias)                               # x[M, K] in the order of the groups
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .grouped_weight import GroupedWeight
from .kernels import int4_cuda, int4_wgmma
from .kernels.int4_layout import WINDOW, Int4Weights, int4_linear_reference, repack_int4
from .packing import pack_rows, unpack_rows

if TYPE_CHECKING:
    from .int4_product import DequantizedRoom

# Triton's interpreter runs the kernels on the CPU, and in float32 too.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Product(Protocol):
    """Multiplies by a weight in some packed form."""

    num_bytes: int

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x[M, K] in the order of the groups, bias[N] -> [M, N]."""


class ProductMaker:
    """Brings weights into the form that is multiplied by fastest where they are."""

    def __init__(self) -> None:
        self._room: DequantizedRoom | None = None

    def __call__(self, weight: GroupedWeight, bits: int, dtype: torch.dtype) -> Product:
        """weight: on the device that it will be multiplied on; dtype: of x and of y."""
        device, in_features = weight.codes.device, weight.codes.shape[1]
        if fits_int4(bits, in_features, weight.group_size):
            if has_kernels(device, dtype):
                from .int4_product import DequantizedRoom, Int4Product  # not without Triton

                if self._room is None:
                    self._room = DequantizedRoom()
                    _prepare_cuda(device)
                return Int4Product(_repacked(weight, dtype), self._room)
            if device.type == "cpu":
                return Int4Reference(weight, dtype)
        return UnpackingProduct(weight, bits, dtype)


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are int4 kernels for activations of this dtype there."""
    if importlib.util.find_spec("triton") is None:
        return False
    return _INTERPRETED or (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16))


def _prepare_cuda(device: torch.device) -> None:
    """Build the kernels in CUDA C++, which are there for Hopper; without them Triton serves."""
    if device.type != "cuda":
        return
    kernels = {"few rows": int4_cuda.kernel, "more rows": int4_wgmma.kernel}
    with ThreadPoolExecutor() as pool:  # it takes seconds each, the first time
        reasons = [*pool.map(lambda kernel: kernel.prepare(device), kernels.values())]
    # Nobody needs to hear of it where it cannot be otherwise.
    for (rows, kernel), reason in zip(kernels.items(), reasons, strict=True):
        if reason and kernel.is_made_for(device):
            warnings.warn(f"4-bit products of {rows} are left to Triton: {reason}", stacklevel=2)


def fits_int4(bits: int, in_features: int, group_size: int) -> bool:
    """Whether their layout holds such a weight; group_size -1: one group for all inputs."""
    one_group = group_size == -1 or group_size >= in_features
    return bits == 4 and in_features % 8 == 0 and (one_group or group_size % WINDOW == 0)


class Int4Reference:
    """The kernels' twin: on the CPU, and slow."""

    def __init__(self, weight: GroupedWeight, dtype: torch.dtype) -> None:
        self.weights = _repacked(weight, dtype)

    @property
    def num_bytes(self) -> int:
        return self.weights.num_bytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return int4_linear_reference(x, self.weights, bias)


def _repacked(weight: GroupedWeight, dtype: torch.dtype) -> Int4Weights:
    return repack_int4(weight.codes, weight.zeros, weight.scales, weight.group_size, dtype)


class UnpackingProduct:
    """Makes the whole weight anew in every call: little memory, any number of bits, slow."""

    def __init__(self, weight: GroupedWeight, bits: int, dtype: torch.dtype) -> None:
        self.bits, self.dtype = bits, dtype
        self.words = pack_rows(weight.codes.T, bits)  # int32 [K * bits / 32, N]
        self.zeros = weight.zeros.T.contiguous()  # uint8 [G, N]
        self.scales = weight.scales.T.contiguous()  # [G, N]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.words, self.zeros, self.scales))

    def weight(self) -> Tensor:
        """``[K, N]``; computed in float32 and rounded once."""
        codes = unpack_rows(self.words, self.bits).float()
        by_group = codes.view(len(self.scales), -1, codes.shape[1])  # [G, K / G, N]
        by_group.sub_(self.zeros[:, None]).mul_(self.scales[:, None])
        return codes.to(self.dtype)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = x @ self.weight()
        return product if bias is None else product.add_(bias)

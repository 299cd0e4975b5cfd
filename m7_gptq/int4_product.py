"""Products by the int4 kernels; for many rows, by cuBLAS and a weight that is there for a moment.

Two kernels in CUDA C++ serve where they can be built: up to 16 rows mostly ``int4_cuda``, on Hopper
GPUs and later; with more rows ``int4_wgmma``, on Hopper. Triton has the others, up to where cuBLAS
takes over.

    room = DequantizedRoom()                       # one for all layers of a model
    product = Int4Product(packed, room)            # made in the order in which they are used
    y = product(x, bias)

cuBLAS wants numbers, and to make them takes about as long as to multiply by them with 200 rows. But
much of what the model does between two products is too small to keep the GPU busy. So a second
stream makes the next weight then, and all weights one after the other take the same room::

    the model's stream   | qkv | rotate, attention | o | add, norm    | gate_up | silu      | down
    the second stream          | make o            |   | make gate_up |         | make down |

It does so in CUDA graphs, where streams become branches that meet before each product. Steps that
are launched from Python mostly have more tokens, so that making weights is less of them; and the
launches of a second stream would take Python's time.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops.fused import launches_early
from common.ops.launch import supports_pdl
from common.ops.layout import aligned

from .kernels import int4_cuda, int4_matmul, int4_wgmma
from .kernels.int4_layout import Int4Weights

_rooms: weakref.WeakSet[DequantizedRoom] = weakref.WeakSet()


def join_branches() -> None:
    """End what a step has begun beside itself that breaks off while a graph is captured."""
    for room in _rooms:
        room.join()


class Int4Product:
    """Multiplies by one weight."""

    def __init__(self, weights: Int4Weights, room: DequantizedRoom) -> None:
        self.weights = weights
        self._room = room
        # A kernel that has any number of rows needs no room.
        self._place = None if int4_wgmma.serves_all(weights) else room.add(weights)

    @property
    def num_bytes(self) -> int:
        return self.weights.num_bytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x[M, K] in the order of the groups, bias[N] -> [M, N]."""
        early = launches_early(len(x), x.device)
        if int4_cuda.serves(len(x), self.weights):
            return int4_cuda.few_rows_linear(aligned(x), self.weights, bias, pdl=early)
        if int4_wgmma.serves(len(x), self.weights):
            return int4_wgmma.many_rows_linear(
                aligned(x), self.weights, bias, pdl=supports_pdl(x.device), next_at_once=early
            )
        if self._place is not None and _uses_dequantize(len(x), self.weights):
            return self._room.linear(x, self._place, bias)
        return int4_matmul.int4_linear(x, self.weights, bias, pdl=early)


class DequantizedRoom:
    """Room for one weight in full precision at a time, shared by all layers.

    It is made while weights are loaded: memory that a CUDA graph writes to must be there before,
    and must stay.
    """

    def __init__(self) -> None:
        self._weights: list[Int4Weights] = []
        self._memory = torch.empty(0)
        self._second: torch.cuda.Stream | None = None
        self._ahead: int | None = None  # place of what the second stream makes
        _rooms.add(self)

    def add(self, weights: Int4Weights) -> int:
        """Have room for this one, too; returns its place in the order in which they are used."""
        if weights.device.type == "cuda" and self._second is None:
            self._second = torch.cuda.Stream(weights.device)
        size = weights.out_features * weights.in_features
        if self._memory.numel() < size:
            self._memory = torch.empty(0)  # before a larger one is asked for
            self._memory = torch.empty(size, dtype=weights.dtype, device=weights.device)
        self._weights.append(weights)
        return len(self._weights) - 1

    def linear(self, x: Tensor, place: int, bias: Tensor | None) -> Tensor:
        """x[M, K] by the weight at a place -> [M, N]; in a graph, then begin to make the next."""
        if self._second is None or not torch.cuda.is_current_stream_capturing():
            return F.linear(x, self._make(place), bias)
        made = self.join()
        y = F.linear(x, self._view(place) if made == place else self._make(place), bias)
        following = self._following(place, len(x))
        if following is not None:
            self._second.wait_stream(torch.cuda.current_stream())  # which has read the room
            self._ahead = following
            with torch.cuda.stream(self._second):
                self._make(following)
        return y

    def join(self) -> int | None:
        """Wait for the weight that is being made, on the current stream; returns its place."""
        made, self._ahead = self._ahead, None
        if made is not None:
            torch.cuda.current_stream().wait_stream(self._second)
        return made

    def _following(self, place: int, rows: int) -> int | None:
        """The next weight that so many rows are multiplied by in full precision."""
        for later in range(place + 1, len(self._weights)):
            if _uses_dequantize(rows, self._weights[later]):
                return later
        return None

    def _make(self, place: int) -> Tensor:
        return int4_matmul.dequantize_int4(self._weights[place], out=self._view(place))

    def _view(self, place: int) -> Tensor:
        shape = self._weights[place].out_features, self._weights[place].in_features
        return self._memory[: shape[0] * shape[1]].view(shape)


def _uses_dequantize(rows: int, weights: Int4Weights) -> bool:
    return int4_matmul.uses_dequantize(rows, weights.out_features, weights.in_features)

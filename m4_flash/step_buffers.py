"""A step's integers cross to the device in one copy, from memory that is allocated once.

Which tokens, which slots, which tables: a step brings a dozen small arrays. Each copy of its own
costs the CPU more than the bytes do, and a copy from ordinary memory makes it wait until the GPU
has nothing left to do. So arrays are laid behind each other in one pinned (page-locked) buffer
that has a twin on the device::

    buffers.begin()
    input_ids = buffers.add(array)       # a view of the device's buffer, not filled yet
    ...
    buffers.send()                       # one copy; now they are filled, in stream order
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: what kernels that load vectors expect of a tensor's start
_TORCH_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}
_MAX_TENSORS = 4096


class StepBuffers:
    """Pinned memory and its twin on the device. On the CPU the two are one.

    Args:
        num_bytes: to begin with; they double when a step needs more.
        device: where the arrays are wanted.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._sent: torch.cuda.Event | None = None
        self._used = 0
        self._allocate(num_bytes)

    def begin(self) -> None:
        """Start over; the arrays of the last step are void."""
        if self._sent is not None:
            self._sent.synchronize()  # done long ago, unless a step was broken off
        self._used = 0

    def add(self, array: np.ndarray) -> Tensor:
        """Take an array along; returns its place on the device, of the same shape and dtype.

        Raises:
            KeyError: an array of another dtype than int32 and int64.
        """
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + array.nbytes > self._host.numel():
            # What was added before goes ahead; torch keeps its memory until it has been copied.
            self.send()
            self._allocate(2 * (self._host.numel() + array.nbytes))
            start = 0
        self._used = start + array.nbytes
        on_host = np.ndarray(array.shape, array.dtype, self._bytes, start)
        on_host[...] = array
        place = start, array.shape, array.dtype.char
        tensor = self._tensors.get(place)
        if tensor is None:
            if len(self._tensors) == _MAX_TENSORS:
                self._tensors.clear()
            typed = self._on_device[start : self._used].view(_TORCH_DTYPES[array.dtype])
            tensor = self._tensors[place] = typed.view(array.shape)
        return tensor

    @property
    def address(self) -> int:
        """Where the device's buffer begins; it changes when the buffer has grown."""
        return self._on_device.data_ptr()

    def send(self) -> None:
        """Copy everything that was added, behind what the device has been given to do."""
        if self._device.type != "cuda":
            return
        self._on_device[: self._used].copy_(self._host[: self._used], non_blocking=True)
        self._sent = self._sent or torch.cuda.Event()
        self._sent.record()

    def _allocate(self, num_bytes: int) -> None:
        on_gpu = self._device.type == "cuda"
        self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._bytes = self._host.numpy()
        self._on_device = (
            torch.empty_like(self._host, device=self._device) if on_gpu else self._host
        )
        # By place, shape and dtype: a step finds those of a step of the same shape.
        self._tensors: dict[tuple[int, tuple[int, ...], str], Tensor] = {}

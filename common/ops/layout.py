"""What kernels launched by `common.ops.launch` ask of their tensors."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: of the widest load, and what `launch` promises Triton of every tensor


def aligned(x: Tensor) -> Tensor:
    """x itself if it is contiguous and starts at a multiple of 16 bytes, otherwise a copy that is.

    Activations of real models always are: the copy keeps odd shapes and slices correct.
    """
    if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def aligned_rows(x: Tensor) -> Tensor:
    """The same for x[T, heads, D] whose tokens may be any distance apart (slices of packed qkv)."""
    _, heads, head_dim = x.shape
    _, head_stride, stride = x.stride()
    together = stride == 1 and (head_stride == head_dim or heads == 1)
    if together and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def power_of_2(size: int) -> int:
    """The next one from ``size`` up. Triton's own is for kernels, and slow to call from here."""
    return 1 << max(size - 1, 0).bit_length()

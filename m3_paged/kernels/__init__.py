"""The two operations on a paged KV cache, in three implementations that a name chooses between.

* ``torch``: plain PyTorch, the reference of the other two and the CPU path (``reference``).
* ``triton``: compiled by Triton on first use, a few seconds (``triton_kernels``).
* ``cuda``: the same algorithm in CUDA C++, built by ``nvcc`` on first use (``cuda_kernels``).

Importing this package imports neither Triton nor CUDA; choosing a backend does.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton", "cuda")


class ReshapeAndCache(Protocol):
    """Store new keys and values ``[T, Hkv, D]`` in the cache at ``slot_mapping`` ``[T]``."""

    def __call__(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
    ) -> None: ...


class PagedAttention(Protocol):
    """Attend from one query token a sequence ``[B, Hq, D]`` to that sequence's cached tokens."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float,
        out: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Kernels:
    """One backend's two operations; ``reference`` documents what both of them compute."""

    name: str
    reshape_and_cache: ReshapeAndCache
    paged_attention: PagedAttention


def get_kernels(
    backend: str, device: torch.device | str, head_dim: int | None = None
) -> Kernels:
    """The kernels of ``backend`` for tensors on ``device``.

    ``auto`` takes Triton on a CUDA device and PyTorch elsewhere. With ``head_dim``, the CUDA
    kernels are built for it now, otherwise at the first call; Triton compiles at the first call.

    Raises:
        ValueError: the backend is unknown or does not run on this device.
        RuntimeError: Triton is not installed, or the CUDA kernels could not be built.
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "torch"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend != "torch" and device.type != "cuda" and not interpreted:
        raise ValueError(
            f"attention backend {backend!r} needs a CUDA device, not {device}: "
            "use attention_backend='torch' (or 'auto') there"
        )
    if backend == "torch":
        from . import reference as module
    elif backend == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            raise RuntimeError(
                "attention backend 'triton' needs the package triton (pip install triton), "
                "or use attention_backend='torch'"
            ) from error
        from . import triton_kernels as module
    else:
        from . import cuda_kernels as module

        module.require_nvcc()
        if head_dim is not None:
            module.load_library(device, head_dim)
    return Kernels(backend, module.reshape_and_cache, module.paged_attention)

"""Who computes attention: four backends behind one interface (``attention.Attention``).

* ``torch``: SDPA on a copy of the keys; the reference of the others and the CPU path.
* ``paged``: m3's kernels. Decode reads the blocks in place, prefill goes through a mask.
* ``flash``: ours. Prefill and decode in tiles that never leave the chip.
* ``flash_attn``: the library of that name, where it is installed.

Importing this package imports none of them; choosing one does.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from common.config import ModelConfig

from ..attention import Attention

BACKENDS = ("auto", "torch", "paged", "flash", "flash_attn")


def choose_backend(
    name: str, model: ModelConfig, dtype: torch.dtype, device: torch.device, block_size: int
) -> type[Attention]:
    """The class of backend ``name``; ``auto`` takes flash on a GPU and torch elsewhere.

    Raises:
        ValueError: the backend is unknown, or cannot serve this device, dtype, head or block size.
        RuntimeError: a package it needs is missing or too old.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown attention_backend {name!r}: use one of {', '.join(BACKENDS)}")
    if name == "auto":
        name = "flash" if device.type == "cuda" else "torch"
    if name == "torch":
        from .torch_sdpa import TorchAttention

        return TorchAttention
    if name == "flash_attn":
        _require_gpu(name, device)
        _require_triton(name, device)  # the cache is written by our kernel
        from .flash_attn import FlashAttnAttention

        FlashAttnAttention.require(dtype, model.head_dim, block_size)
        return FlashAttnAttention
    _require_triton(name, device)
    if name == "paged":
        from .paged import PagedAttention

        return PagedAttention
    from .flash import FlashAttention

    return FlashAttention


def _require_gpu(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"attention backend {name!r} needs a CUDA device, not {device}: "
            "use attention_backend='torch' (or 'auto') there"
        )


def _require_triton(name: str, device: torch.device) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        _require_gpu(name, device)
    if find_spec("triton") is None:
        raise RuntimeError(
            f"attention backend {name!r} needs the package triton (pip install triton), "
            "or use attention_backend='torch'"
        )

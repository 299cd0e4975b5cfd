"""A layer's operations on a GPU: fused Triton kernels, each with its plain twin in common.layers.

    ops = get_ops(device)                         # fused kernels on a GPU, plain torch elsewhere
    model = Transformer(config, dtype=dtype, device=device, ops=ops)

Importing this package does not import Triton; asking for the fused operations does.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from common.layers import Ops

CHOICES = ("auto", "torch", "fused")


def get_ops(device: torch.device | str, choice: str = "auto") -> Ops:
    """The operations for a model on ``device``.

    ``auto`` takes the fused ones on a CUDA device where Triton is installed, else plain torch.

    Raises:
        ValueError: the choice is unknown or does not run on this device.
        RuntimeError: Triton is not installed.
    """
    device = torch.device(device)
    if choice not in CHOICES:
        raise ValueError(f"unknown operations {choice!r}: use one of {', '.join(CHOICES)}")
    has_triton = importlib.util.find_spec("triton") is not None
    if choice == "auto":
        choice = "fused" if device.type == "cuda" and has_triton else "torch"
    if choice == "torch":
        return Ops()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        raise ValueError(
            f"the fused operations need a CUDA device, not {device}: use 'torch' (or 'auto') there"
        )
    if not has_triton:
        raise RuntimeError(
            "the fused operations need the package triton (pip install triton), or use 'torch'"
        )
    from common.ops.fused import FusedOps

    return FusedOps()

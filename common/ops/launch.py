"""Launching Triton kernels quickly, one behind the other, and early.

Triton looks at every argument of every launch to find the kernel it was compiled to: tens of
microseconds, as long as the kernels of a decode step run. ``launch`` asks for what can differ
(constants and dtypes) and keeps the compiled kernels itself. That takes two promises from the
kernels it is used with: runtime integers are not specialised (``do_not_specialize``), and
every tensor starts at a multiple of 16 bytes.

Programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch and
Synchronization", sm_90 on): a kernel launched with ``pdl=True`` may begin while the one before it
is still running. What it reads before ``gdc_wait()`` must not be written by any kernel in flight:
weights and old keys and values qualify, activations do not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Constant = int | float | bool | str | None

_compiled: dict[tuple, Any] = {}


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, int, int],
    args: Sequence[Any],
    constants: Sequence[Any],
    *,
    num_warps: int,
    num_stages: int = 1,
    max_registers: int | None = None,
    pdl: bool = False,
) -> None:
    """Run ``kernel`` on the current stream.

    Args:
        kernel: a ``triton.jit`` function whose runtime parameters come first, then its constants.
        grid: programs along each axis.
        args: values of the runtime parameters: tensors, tensor descriptors, integers, floats.
        constants: values of the ``tl.constexpr`` parameters, hashable.
        num_warps: per program.
        num_stages: depth of the software pipeline.
        max_registers: of a thread, for more programs to fit; None: what the compiler thinks best.
        pdl: let it begin before the previous kernel has ended; it must call ``gdc_wait``.
    """
    if INTERPRETED:
        kernel[grid](*args, *constants)
        return
    # The constants are few and tell shapes apart; the dtypes are what else a signature holds.
    dtypes = tuple([arg.dtype for arg in args if isinstance(arg, Tensor)])
    device = torch.cuda.current_device()
    key = (kernel, device, dtypes, tuple(constants), num_warps, num_stages, max_registers, pdl)
    compiled = _compiled.get(key)
    if compiled is None:
        options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if max_registers is not None:
            options["maxnreg"] = max_registers
        if pdl:
            options["launch_pdl"] = True
        _compiled[key] = kernel[grid](*args, *constants, **options)
        return
    compiled[grid](*args, *constants)


@lru_cache
def supports_pdl(device: torch.device) -> bool:
    """Whether kernels on this device may be launched early: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for Triton's interpreter, which runs one program at a time."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count

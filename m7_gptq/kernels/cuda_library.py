"""A library in CUDA C++ on each device that it can serve, and the checks before a launch.

    kernel = CudaLibrary(SOURCE, "folovllm_int4_few_rows", [c_int, c_void_p], nvcc_flags)
    kernel.prepare(device)          # while a model is loaded: builds it on first use
    kernel.launch(device, 2, x.data_ptr())

``nvcc`` makes a shared library with a plain C interface, for the GPU at hand (``common.nvcc``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_int, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.nvcc import build_library
from common.ops.layout import ALIGNMENT

from .int4_layout import Int4Weights

HEADERS = ("hopper.cuh", "int4_wgmma.cuh", "wgmma.cuh")
DTYPES = {torch.float16: 1, torch.bfloat16: 2}
SIZES = (1, 2, 4, 8)  # of clusters
MOST_SHARED = 227 << 10  # bytes of a thread block


@dataclass(frozen=True)
class Ready:
    library: ctypes.CDLL
    at_once: tuple[int, ...]  # clusters of each of SIZES that the device runs at once


class CudaLibrary:
    """What is known of it for each device: that it is ready, or what keeps it from serving."""

    def __init__(
        self,
        source: Path,
        function: str,
        arguments: Sequence[type],
        nvcc_flags: Callable[[int, int], tuple[str, ...]],
    ) -> None:
        """function: takes ``arguments`` and a stream and returns a cudaError_t. Beside it are
        ``{function}_prepare``, which fills in ``Ready.at_once``, and ``folovllm_error_string``.

        nvcc_flags: of a compute capability; raises RuntimeError if there is no kernel for it.
        """
        self.source = source
        self._function, self._arguments, self._nvcc_flags = function, arguments, nvcc_flags
        self._found: dict[torch.device, Ready | Exception] = {}

    def prepare(self, device: torch.device) -> str | None:
        """Make it ready on ``device``; returns what keeps it from serving there, or None.

        To be called before the first product, and before a CUDA graph is captured.
        """
        device = _indexed(device)
        if device not in self._found:
            try:
                self._found[device] = self._load(device)
            except (OSError, RuntimeError) as error:
                self._found[device] = error
        return self.why_not(device)

    def is_made_for(self, device: torch.device) -> bool:
        """Whether there is a kernel for such a GPU, ready or not."""
        try:
            self._nvcc_flags(*torch.cuda.get_device_capability(device))
        except RuntimeError:
            return False
        return True

    def why_not(self, device: torch.device) -> str | None:
        """What keeps it from serving on ``device``, or None."""
        found = self._found.get(_indexed(device), RuntimeError("it has not been prepared"))
        return str(found) if isinstance(found, Exception) else None

    def ready(self, device: torch.device) -> Ready | None:
        found = self._found.get(_indexed(device))
        return None if isinstance(found, Exception) else found

    def require(self, device: torch.device) -> Ready:
        """Raises RuntimeError, with what keeps it from serving."""
        ready = self.ready(device)
        if ready is None:
            raise RuntimeError(f"the CUDA kernel cannot serve: {self.why_not(device)}")
        return ready

    def launch(self, device: torch.device, *arguments: Any) -> None:
        """On the current stream of ``device``.

        Raises:
            RuntimeError: it is not ready there, or the CUDA runtime refused.
        """
        library = self.require(device).library
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            _check_error(library, getattr(library, self._function)(*arguments, stream))

    def build(self, major: int, minor: int) -> Path:
        """The library for a compute capability, unless an earlier run built it.

        Raises:
            RuntimeError: there is no nvcc, or it failed; the message has its output.
        """
        flags = self._nvcc_flags(major, minor)
        name = f"{self.source.stem}_sm_{major}{minor}"
        headers = [self.source.with_name(header) for header in HEADERS]
        return build_library(self.source, name, flags, headers)

    def _load(self, device: torch.device) -> Ready:
        """Raises RuntimeError or OSError, with what is missing."""
        if device.type != "cuda":
            raise RuntimeError("it needs a CUDA device")
        major, minor = torch.cuda.get_device_capability(device)
        self._nvcc_flags(major, minor)
        shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if shared < MOST_SHARED:
            raise RuntimeError(
                f"it needs {MOST_SHARED >> 10} KB of shared memory for a thread block, not "
                f"{shared >> 10} KB"
            )
        library = ctypes.CDLL(str(self.build(major, minor)))
        getattr(library, self._function).argtypes = [*self._arguments, c_void_p]
        library.folovllm_error_string.argtypes = [c_int]
        library.folovllm_error_string.restype = c_char_p
        prepare = getattr(library, f"{self._function}_prepare")
        prepare.argtypes = [ctypes.POINTER(c_int)]
        at_once = (c_int * len(SIZES))()
        with torch.cuda.device(device):
            _check_error(library, prepare(at_once))
        return Ready(library, tuple(at_once))


def check_product(x: Tensor, weights: Int4Weights, bias: Tensor | None) -> None:
    """Raises ValueError: x[M, K] or bias[N] does not fit the weight."""
    _check_tensor("x", x, (len(x), weights.in_features), weights)
    if bias is not None:
        _check_tensor("bias", bias, (weights.out_features,), weights)


def product_arguments(
    x: Tensor, weights: Int4Weights, bias: Tensor | None, y: Tensor
) -> tuple[int | None, ...]:
    """What all kernels take first: see PRODUCT."""
    tiles, k_tiles = weights.words.shape[:2]
    return (
        DTYPES[x.dtype],
        x.data_ptr(),
        weights.words.data_ptr(),
        weights.scales.data_ptr(),
        None if weights.zeros is None else weights.zeros.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        *(len(x), weights.out_features, weights.in_features, tiles, k_tiles),
        *(weights.plane, weights.scales.shape[2], weights.scales.element_size()),
    )


PRODUCT = [
    c_int,  # dtype
    *[c_void_p] * 6,  # x, words, scales, zeros, bias, y
    *[c_int] * 5,  # rows, features, inputs, tiles of 16 rows of the weight, tiles of 64 inputs
    *[c_int] * 3,  # plane, parts of a block, bytes of a scale
]


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], weights: Int4Weights) -> None:
    found = tuple(tensor.shape), tensor.dtype, tensor.device
    if found != (shape, weights.dtype, weights.device):
        raise ValueError(f"{name} must be {(shape, weights.dtype, weights.device)}, not {found}")
    if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} must be contiguous, from a multiple of {ALIGNMENT} bytes on")


def _check_error(library: ctypes.CDLL, error: int) -> None:
    if error:
        text = library.folovllm_error_string(error).decode()
        raise RuntimeError(f"the CUDA kernel could not be launched: {text}")


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device

"""The product with 4-bit weights for few rows in CUDA C++ (``int4_few_rows.cu``).

    prepare(device)                 # while a model is loaded: builds the library on first use
    if serves(len(x), weights):     # else Triton does
        y = few_rows_linear(x, weights, bias, pdl=True)     # x[M, K] -> [M, N], M <= 16
    why_not(device)                 # what keeps it from serving, or None

Copies into shared memory that a thread block starts and does not wait for, and thread blocks that
exchange sums, are what Triton does not offer: with them a weight arrives at the speed of memory.
Where the library cannot be built or used, Triton's kernels compute the same.

``nvcc`` makes a shared library with a plain C interface, for the GPU at hand (``common.nvcc``).
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from common.nvcc import build_library
from common.ops.layout import ALIGNMENT

from .int4_layout import MULTIPROCESSORS, PLANES, WINDOW, Int4Weights

SOURCE = Path(__file__).with_name("int4_few_rows.cu")
DTYPES = {torch.float16: 1, torch.bfloat16: 2}
MAX_ROWS = 16
SIZES = (1, 2, 4, 8)  # of clusters
PIECES = (1, 2, 4)  # windows that one warp multiplies
WINDOW_BYTES = 1024  # of four planes of 16 rows
SLOT_BYTES = 1200  # about the same with scales and zero points; 1408 with a part for each window
MOST_SHARED = 227 << 10  # of a thread block
SOME_SHARED = 112 << 10  # with many rows: what is not there cannot hold up x
AHEAD = 24 << 10  # and one slot more: with more than that, requests wait for each other

# What `choose_cut` compares, in bytes of weights that arrive in the same time.
CLUSTER_COST = {1: 0, 2: 46 << 10, 4: 24 << 10, 8: 25 << 10}  # sums are exchanged
PIECE_COST = {1: 8 << 10, 2: 0, 4: 4 << 10}  # short: more sums to add; long: a longer last step
FEW_WARPS_COST = 4 << 10
X_COST = 0.4  # of a byte of x, which comes from the L2 cache


@dataclass(frozen=True)
class Cut:
    """How a product is cut into thread blocks and warps: see the source."""

    clusters: int
    size: int  # thread blocks of a cluster, which share K
    windows: int  # of a warp's piece
    warps_n: int  # groups of warps that share K
    finishers: int  # warps
    shared: int = MOST_SHARED  # bytes at most
    ahead: int = AHEAD  # bytes that are under way at least


@dataclass(frozen=True)
class Ready:
    library: ctypes.CDLL
    at_once: tuple[int, ...]  # clusters of each of SIZES


_ready: dict[torch.device, Ready | str] = {}  # or why not


def build(arch: str) -> Path:
    """The library for ``arch`` (like ``sm_90``), unless an earlier run built it.

    Raises:
        RuntimeError: there is no nvcc, or it failed; the message has its output.
    """
    return build_library(SOURCE, f"int4_few_rows_{arch}", (f"-arch={arch}",))


def prepare(device: torch.device) -> str | None:
    """Make the kernel ready on ``device``; returns what keeps it from serving there, or None.

    To be called before the first product, and before a CUDA graph is captured.
    """
    device = _indexed(device)
    if device not in _ready:
        try:
            _ready[device] = _load(device)
        except (OSError, RuntimeError) as error:
            _ready[device] = str(error)
    return why_not(device)


def why_not(device: torch.device) -> str | None:
    """What keeps the kernel from serving on ``device``, or None."""
    found = _ready.get(_indexed(device), "it has not been prepared")
    return found if isinstance(found, str) else None


def serves(rows: int, weights: Int4Weights) -> bool:
    """Whether the kernel is ready for this product and expected to be faster than Triton's."""
    ready = _ready.get(_indexed(weights.device))
    return (
        isinstance(ready, Ready)
        and weights.dtype in DTYPES
        and pays(rows, weights.out_features)
        and _cut(rows, weights, ready) is not None
    )


@lru_cache(maxsize=4096)
def pays(rows: int, features: int) -> bool:
    """Whether the kernel is expected to be faster than Triton's.

    A thread block has whole tiles of 16 rows of the weight, so with two to three tiles for each
    multiprocessor many wait for the last one. With one row, and with more than eight, the two
    differ by a few per cent, either way; with two tiles for each (8B's o) Triton is up to 11 %
    faster at 4 and 8 rows (``dev.bench kernels --suite int4``).
    """
    per_multiprocessor = -(-features // 16) / MULTIPROCESSORS
    uneven = 2.0 < per_multiprocessor < 3.0 and 1 < rows <= 8
    return 0 < rows <= MAX_ROWS and not uneven


def few_rows_linear(
    x: Tensor,
    weights: Int4Weights,
    bias: Tensor | None = None,
    *,
    pdl: bool = False,
    cut: Cut | None = None,
) -> Tensor:
    """x[M, K] @ weight[N, K].T + bias[N] -> [M, N] in x's dtype, summed in float32.

    The twin is ``int4_linear_reference``.

    Args:
        x: 1 to 16 rows, contiguous, starting at a multiple of 16 bytes.
        weights: for x's dtype and device.
        pdl: begin before the previous kernel has ended (see ``common.ops.launch``).
        cut: instead of what ``choose_cut`` says, to measure it.

    Raises:
        RuntimeError: the kernel is not ready on this device, or cannot serve this product.
        ValueError: x or bias does not fit the weight.
    """
    _check_tensor("x", x, (len(x), weights.in_features), weights)
    if not 0 < len(x) <= MAX_ROWS:
        raise ValueError(f"x must have 1 to {MAX_ROWS} rows, not {len(x)}")
    if bias is not None:
        _check_tensor("bias", bias, (weights.out_features,), weights)
    ready = _ready.get(_indexed(x.device))
    if not isinstance(ready, Ready):
        raise RuntimeError(f"the CUDA kernel cannot serve: {why_not(x.device)}")
    rows, inputs = x.shape
    tiles, k_tiles = weights.words.shape[:2]
    parts = weights.scales.shape[2]
    scale_bytes = weights.scales.element_size()
    cut = cut or _cut(rows, weights, ready)
    if cut is None:
        raise RuntimeError(f"the CUDA kernel has no room for a weight of {inputs} inputs")
    y = x.new_empty((rows, weights.out_features))
    with torch.cuda.device_of(x):
        error = ready.library.folovllm_int4_few_rows(
            DTYPES[x.dtype],
            x.data_ptr(),
            weights.words.data_ptr(),
            weights.scales.data_ptr(),
            None if weights.zeros is None else weights.zeros.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            *(rows, weights.out_features, inputs, tiles, k_tiles),
            *(weights.plane, parts, scale_bytes),
            *(cut.clusters, cut.size, cut.windows, cut.warps_n),
            *(cut.finishers, cut.shared, cut.ahead),
            *(pdl, torch.cuda.current_stream().cuda_stream),
        )
    _check(ready.library, error)
    return y


@lru_cache(maxsize=4096)
def choose_cut(
    rows: int,
    tiles: int,
    windows_in_all: int,
    windows_of_part: int,
    common: bool,
    at_once: tuple[int, ...],
) -> Cut | None:
    """What reads the least on the busiest multiprocessor: its weights, and its share of x.

    None if nothing fits: with very many inputs, and scales or zero points that are not common.

    Args:
        rows: of x, 1 to 16.
        tiles: of 16 rows of the weight.
        windows_in_all: of a tile: of 32 inputs of each plane.
        windows_of_part: of them, those that share their scales.
        common: scales in float16, every zero point 8.
        at_once: clusters of 1, 2, 4 and 8 thread blocks that the GPU runs at once.
    """
    cuts = possible_cuts(rows, tiles, windows_in_all, windows_of_part, common, at_once)
    return min(cuts, key=lambda pair: pair[0])[1] if cuts else None


def possible_cuts(
    rows: int,
    tiles: int,
    windows_in_all: int,
    windows_of_part: int,
    common: bool,
    at_once: tuple[int, ...],
) -> list[tuple[float, Cut]]:
    """(cost, cut) of all that fit into registers and shared memory; see `choose_cut`."""
    columns = 1 if rows <= 8 else 2
    cuts = []
    for size, most in zip(SIZES, at_once, strict=True):
        if not most:
            continue
        tiles_each = -(-tiles // most)
        for width in PIECES:
            pieces = windows_in_all // width
            if width > windows_of_part or pieces < size:
                continue
            warps_k = -(-pieces // size)
            room = most_warps(width, columns, common) - 1  # without the producer
            finishers = min(3, tiles_each, room - warps_k)
            share = warps_k * width
            shared = share * SLOT_BYTES + tiles_each * (24 + 512 * columns) + 8192
            if finishers < min(2, tiles_each) or shared > MOST_SHARED:
                continue
            warps_n = max(1, min(-(-8 // warps_k), (room - finishers) // warps_k, tiles_each))
            cost = tiles_each * share * WINDOW_BYTES + CLUSTER_COST[size] + PIECE_COST[width]
            cost += X_COST * share * PLANES * WINDOW * 2 * rows * warps_n
            cost += FEW_WARPS_COST * (warps_k * warps_n < 8)
            clusters = -(-tiles // tiles_each)
            some = columns == 2 and shared + 2 * share * SLOT_BYTES < SOME_SHARED
            most_shared = SOME_SHARED if some else MOST_SHARED
            cuts.append((cost, Cut(clusters, size, width, warps_n, finishers, most_shared)))
    return cuts


def _cut(rows: int, weights: Int4Weights, ready: Ready) -> Cut | None:
    tiles, k_tiles = weights.words.shape[:2]
    common = weights.zeros is None and weights.scales.dtype == torch.float16
    part = weights.part // WINDOW
    return choose_cut(rows, tiles, k_tiles // 2, part, common, ready.at_once)


def most_warps(windows: int, columns: int, common: bool) -> int:
    """Of a thread block: `most_threads` in the source."""
    held = windows * columns
    if held == 8:
        return 8
    if held == 4:
        return 16 if common else 12
    return 16 if columns == 2 else 20 if held == 2 else 24


def _load(device: torch.device) -> Ready:
    """Raises RuntimeError or OSError, with what is missing."""
    if device.type != "cuda":
        raise RuntimeError("it needs a CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        raise RuntimeError(f"it needs a GPU of Hopper's generation or later, not sm_{major}{minor}")
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if shared < MOST_SHARED:
        raise RuntimeError(
            f"it needs {MOST_SHARED >> 10} KB of shared memory for a thread block, not "
            f"{shared >> 10} KB"
        )
    library = ctypes.CDLL(str(build(f"sm_{major}{minor}")))
    library.folovllm_int4_prepare.argtypes = [ctypes.POINTER(c_int)]
    library.folovllm_int4_few_rows.argtypes = [
        c_int,  # dtype
        *[c_void_p] * 6,  # x, words, scales, zeros, bias, y
        *[c_int] * 5,  # rows, features, inputs, tiles, K tiles
        *[c_int] * 3,  # plane, parts, bytes of a scale
        *[c_int] * 7,  # the cut
        *(c_int, c_void_p),  # PDL, stream
    ]
    library.folovllm_error_string.argtypes = [c_int]
    library.folovllm_error_string.restype = c_char_p
    at_once = (c_int * len(SIZES))()
    with torch.cuda.device(device):
        _check(library, library.folovllm_int4_prepare(at_once))
    return Ready(library, tuple(at_once))


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], weights: Int4Weights) -> None:
    found = tuple(tensor.shape), tensor.dtype, tensor.device
    if found != (shape, weights.dtype, weights.device):
        raise ValueError(f"{name} must be {(shape, weights.dtype, weights.device)}, not {found}")
    if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} must be contiguous, from a multiple of {ALIGNMENT} bytes on")


def _check(library: ctypes.CDLL, error: int) -> None:
    if error:
        text = library.folovllm_error_string(error).decode()
        raise RuntimeError(f"the CUDA kernel could not be launched: {text}")


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device

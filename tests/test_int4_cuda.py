"""The CUDA kernel for few rows and 4-bit weights, without a GPU: its arithmetic and its build."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from cuda_library_cases import (
    FAILS,
    H200,
    WRITES_NO_LIBRARY,
    c_parameters,
    check_reason,
    compile_kernels,
    fake_nvcc,
    pretend_gpu,
    python_parameters,
)
from int4_cases import Case, make_bias, make_input, make_weight, pack
from support import ROOT

from m7_gptq.kernels import int4_cuda
from m7_gptq.kernels.int4_cuda import Cut, choose_cut, most_warps, possible_cuts
from m7_gptq.kernels.int4_layout import Int4Weights, unpack_int4

BF16, FP16 = torch.bfloat16, torch.float16
LANE = np.arange(32)
G, C = LANE // 4, LANE % 4
WINDOW_BYTES, FRAGMENT_BYTES = 1024, 512


# --- what the kernel computes, lane by lane ---------------------------------------------------


def matrix(registers: list[np.ndarray], rows: int) -> np.ndarray:
    """Pairs of numbers of each lane [32, 2] -> the operand [rows, 16] of mma.m16n8k16.

    Two registers of x (rows 8), or four of the weight (rows 16), as the PTX ISA has them.
    """
    operand = np.zeros((rows, 16))
    for place, pairs in enumerate(registers):
        row, half = (place % 2, place // 2) if rows == 16 else (0, place)
        for h in range(2):
            operand[G + 8 * row, C * 2 + h + 8 * half] = pairs[:, h]
    return operand


def unpacked(words: np.ndarray, plane: int, dtype: torch.dtype) -> np.ndarray:
    """32-bit words of each lane [32] -> the pairs [32, 2] that enter the product."""
    byte, high = divmod(plane, 2)
    if dtype == BF16:
        bits = ((words >> 4 * plane) & 0x000F000F) | 0x43004300
        pairs = torch.from_numpy(bits.astype(np.uint32).view(np.int16)).view(BF16)
        return pairs.double().numpy().reshape(-1, 2)
    both = ((words >> 8 * byte) & 0x00FF00FF) | 0x64006400
    tops = (both & 0xFFF0FFF0).astype(np.uint32).view(np.float16).astype(float)
    numbers = tops if high else both.astype(np.uint32).view(np.float16).astype(float) - tops
    return numbers.reshape(-1, 2)


def piece_sums(
    x: np.ndarray, weights: Int4Weights, tile: int, first_window: int, width: int
) -> np.ndarray:
    """What one warp makes of its piece of a tile: [16, rows of x rounded up to 8]."""
    dtype, parts = weights.dtype, weights.scales.shape[2]
    block_windows = weights.plane // 32
    part_windows = block_windows // parts
    words = weights.words.view(torch.uint8).numpy()[tile].reshape(-1)
    columns = -(-len(x) // 8)
    sums = np.zeros((16, columns * 8))
    row_of_part = first_window // part_windows * 64 + G * 8
    scales = weights.scales[tile].reshape(-1).float().numpy()
    zeros = np.full(len(scales), 8)
    if weights.zeros is not None:  # the last bits of the numbers that stand for them
        zeros = weights.zeros[tile].reshape(-1).view(torch.int16).numpy() & 15
    for plane in range(4):
        factor = 16 if dtype == FP16 and plane % 2 else 1
        offset = 128 if dtype == BF16 else 64 * (plane % 2)
        products, taken = np.zeros_like(sums), np.zeros_like(sums)
        for window in range(first_window, first_window + width):
            block = window // block_windows
            k = ((block * 3 + plane) * block_windows + window) * 32 + C * 8
            for u in range(2):
                place = window * WINDOW_BYTES + u * 512 + LANE * 16
                held = np.stack([words[p : p + 16].view(np.uint32) for p in place])
                left = matrix([unpacked(held[:, r], plane, dtype) for r in (0, 2, 1, 3)], 16)
                for m in range(columns):
                    inputs = np.zeros((32, 8))
                    for lane in LANE:
                        if m * 8 + G[lane] < len(x) and k[lane] < x.shape[1]:
                            inputs[lane] = x[m * 8 + G[lane], k[lane] : k[lane] + 8]
                    pairs = inputs.reshape(32, 4, 2)[:, 2 * u : 2 * u + 2]
                    right = matrix([pairs[:, 0], pairs[:, 1]], 8)
                    products[:, m * 8 : m * 8 + 8] += left @ right.T
                    taken[:, m * 8 : m * 8 + 8] += right.sum(1)
        for r in range(2):
            rows, index = r * 8 + G[::4], row_of_part[::4] + 2 * plane + r
            zero_points = factor * (offset + zeros[index])[:, None]
            exact = products[rows] - zero_points * taken[rows]
            sums[rows] += exact * (scales[index] / factor)[:, None]
    return sums


def emulated(
    x: torch.Tensor, weights: Int4Weights, bias: torch.Tensor | None, cut: Cut
) -> np.ndarray:
    """y as the kernel's thread blocks and warps share it; each number is stored once."""
    tiles, k_tiles = weights.words.shape[:2]
    pieces = k_tiles // 2 // cut.windows
    y = np.full((len(x), weights.out_features), np.nan)
    inputs = x.double().numpy()

    def share(index: int, count: int, number: int) -> range:
        """The kernel's: the first ones have one more."""
        each, more = divmod(number, count)
        first = index * each + min(index, more)
        return range(first, first + each + (index < more))

    for cluster in range(cut.clusters):
        for tile in share(cluster, cut.clusters, tiles):
            total = 0
            for rank in range(cut.size):
                for piece in share(rank, cut.size, pieces):
                    first = piece * cut.windows
                    total = total + piece_sums(inputs, weights, tile, first, cut.windows)
            features = np.arange(tile * 16, min(tile * 16 + 16, weights.out_features))
            assert np.isnan(y[:, features]).all()
            y[:, features] = total[: len(features), : len(x)].T
    return y if bias is None else y + bias.double().numpy()


@pytest.mark.parametrize(
    ("case", "cut"),
    [
        (Case(3, 40, 1024, 128, dtype=BF16), Cut(3, 1, 2, 1, 1)),
        (Case(16, 80, 2048, 128, dtype=FP16), Cut(2, 2, 4, 1, 1)),
        (Case(11, 40, 1536, 32, symmetric=False, bias=True, dtype=BF16), Cut(2, 8, 1, 1, 1)),
        (Case(9, 33, 1088, 64, symmetric=False, bias=True, dtype=FP16), Cut(1, 4, 1, 2, 1)),
        (Case(1, 17, 136, -1, symmetric=False, dtype=BF16), Cut(2, 1, 1, 1, 1)),
        (Case(2, 16, 1536, 96, dtype=FP16), Cut(1, 2, 1, 1, 1)),
    ],
    ids=str,
)
def test_lanes_find_their_inputs(case, cut):
    weights, x, bias = pack(case, make_weight(case)), make_input(case), make_bias(case)
    wanted = x.double() @ unpack_int4(weights).double().T
    wanted = (wanted if bias is None else wanted + bias.double()).numpy()
    error = np.linalg.norm(emulated(x, weights, bias, cut) - wanted) / np.linalg.norm(wanted)
    assert error <= 1e-6  # NaN must fail


# --- how products are cut ---------------------------------------------------------------------


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 9, 16])
def test_cuts_fit_and_cover_a_product(rows, common):
    for features, inputs in ((24576, 4096), (4096, 12288), (1024, 3072), (50, 576), (16, 72)):
        tiles, windows = -(-features // 16), -(-inputs // 512) * 4
        cuts = possible_cuts(rows, tiles, windows, 4, common, H200)
        assert choose_cut(rows, tiles, windows, 4, common, H200) in [cut for _, cut in cuts]
        for _, cut in cuts:
            warps_k = -(-(windows // cut.windows) // cut.size)
            warps = warps_k * cut.warps_n + cut.finishers + 1
            assert warps <= most_warps(cut.windows, 1 if rows <= 8 else 2, common)
            assert cut.clusters <= min(tiles, H200[int4_cuda.SIZES.index(cut.size)])
            assert windows // cut.windows >= cut.size and cut.finishers > 0


def test_a_product_that_fits_nowhere_has_no_cut():
    assert choose_cut(16, 512, 4096, 4, True, H200) is None


# --- the build, and what happens without it ---------------------------------------------------


def test_the_kernels_compile_and_fit(tmp_path):
    flags = int4_cuda.nvcc_flags(9, 0)
    found, _ = compile_kernels(int4_cuda.SOURCE, "few_rows_kernel", flags, tmp_path)
    assert len(found) == 2 * 2 * 3 * 2
    for kernel in found:
        _, common, windows, columns = kernel.template
        assert kernel.stored == kernel.loaded == 0
        # Registers are given to four warps at a time, eight to each thread at a time.
        warps = -(-most_warps(windows, columns, bool(common)) // 4) * 4
        assert warps * 32 * (-(-kernel.registers // 8) * 8) <= 64 * 1024


def test_python_and_the_source_agree_on_arguments():
    wanted = python_parameters(int4_cuda.kernel)
    assert c_parameters(int4_cuda.SOURCE, "folovllm_int4_few_rows") == wanted


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(int4_cuda.kernel, "_found", {})
    return tmp_path / "cuda_kernels"


def test_without_a_gpu_triton_serves(cache):
    case = Case(dtype=BF16)
    weights = pack(case, make_weight(case))
    assert int4_cuda.kernel.why_not(weights.device) == "it has not been prepared"
    assert "CUDA device" in int4_cuda.kernel.prepare(weights.device)
    assert not int4_cuda.serves(1, weights)
    with pytest.raises(RuntimeError, match="cannot serve: it needs a CUDA device"):
        int4_cuda.few_rows_linear(make_input(case), weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 256, dtype=BF16)}, "x must be"),
        ({"x": torch.zeros(1, 512, dtype=FP16)}, "x must be"),
        ({"x": torch.zeros(512, 2, dtype=BF16).T}, "contiguous"),
        ({"x": torch.zeros(17, 512, dtype=BF16)}, "1 to 16 rows, not 17"),
        ({"bias": torch.zeros(512, dtype=BF16)}, "bias must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(dtype=BF16)
    good = {"x": make_input(case), "weights": pack(case, make_weight(case))}
    with pytest.raises(ValueError, match=message):
        int4_cuda.few_rows_linear(**{**good, **change})


@pytest.mark.parametrize(
    ("capability", "shared", "script", "message"),
    [
        ((8, 0), 227, "exit 0", "Hopper's generation or later, not sm_80"),
        ((12, 0), 99, "exit 0", "227 KB of shared memory for a thread block, not 99 KB"),
        ((9, 0), 227, None, "nvcc was not found"),
        ((9, 0), 227, FAILS, "no such target"),
        ((9, 0), 227, WRITES_NO_LIBRARY, "ELF|short"),
    ],
)
def test_what_keeps_it_from_serving_is_said(
    cache, tmp_path, monkeypatch, capability, shared, script, message
):
    fake_nvcc(monkeypatch, tmp_path, script)
    device = pretend_gpu(monkeypatch, capability, shared)
    check_reason(monkeypatch, int4_cuda.kernel, device, message)


def test_m7_is_imported_without_triton():
    """It is not installed everywhere: weights are then dequantized, or multiplied by the twin."""
    code = "import sys; sys.modules['triton'] = None; import m7_gptq.packed_product"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr

"""The CUDA kernel for more rows and 4-bit weights, without a GPU: its arithmetic and its build."""

from __future__ import annotations

import re
import shutil
import tomllib
import warnings
from dataclasses import replace
from fnmatch import fnmatch
from itertools import pairwise

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
from int4_cases import Case, Quantized, make_bias, make_input, make_weight, pack
from support import ROOT

from m7_gptq import packed_product
from m7_gptq.kernels import cuda_library, int4_cuda, int4_wgmma
from m7_gptq.kernels.cuda_library import CudaLibrary, Ready
from m7_gptq.kernels.int4_layout import Int4Weights, unpack_int4
from m7_gptq.kernels.int4_wgmma import MOST_GROUPS, Cut, choose_cut, possible_cuts

BF16, FP16 = torch.bfloat16, torch.float16
LANE = np.arange(32)
G, C = LANE // 4, LANE % 4
PLANES, WARPS, BOX_INPUTS, STAGE_WORDS = 4, 4, 64, 2048
TOKENS = (32, 64, 128, 256)
SOURCE = "".join(
    int4_wgmma.SOURCE.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".cu", ".cuh")
)


def constant(name: str, tokens: int = 0) -> int:
    """A number of the source, where tiles have so many rows of x: a, or c ? a : b."""
    expression = re.search(rf"constexpr int {name} = (.+?);", SOURCE)[1]
    python = re.sub(r"([^?:]+) \? (\d+) : ", r"\2 if \1 else ", expression)  # a if c else ...
    return eval(python.replace("/", "//"), {"TOKENS": tokens})


# --- what the kernel computes, lane by lane ---------------------------------------------------


def floats(words: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """32-bit words of each lane [...] -> the two numbers in each [..., 2]."""
    halves = np.ascontiguousarray(words, np.uint32).view(np.int16).reshape(*words.shape, 2)
    return torch.from_numpy(halves).view(dtype).double().numpy()


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).double().numpy()


def unpack(
    words: np.ndarray, plane: int, scale: np.ndarray, zero: np.ndarray, dtype: torch.dtype
) -> np.ndarray:
    """Words, scales and zeros of each lane [...] -> the numbers that enter a product [..., 2]."""
    number = 0x43004300 if dtype == BF16 else 0x64006400
    q = floats(((words >> 4 * plane) & 0x000F000F) | number, dtype) + zero[..., None]
    single = scale.astype(np.float32)
    if dtype == BF16:
        high = (single.view(np.uint32) & 0xFFFF0000).view(np.float32)
        low = ((single - high).view(np.uint32) & 0xFFFF0000).view(np.float32)
    else:
        high = single.astype(np.float16)
        low = (single - high.astype(np.float32)).astype(np.float16)
    high, low = (part.astype(float)[..., None] for part in (high, low))
    return rounded(q * high + rounded(q * low, dtype), dtype)


class Stages:
    """What is copied for the stages of a row tile, and what its lanes find in it."""

    def __init__(self, weights: Int4Weights, row_tile: int) -> None:
        assert weights.plane >= BOX_INPUTS
        self.dtype, block_windows = weights.dtype, weights.plane // 32
        part_windows = block_windows // weights.scales.shape[2]
        self.block_bits, self.part_bits = (int(np.log2(n)) for n in (block_windows, part_windows))
        self.parts = 1 if part_windows > 1 else 2  # of a stage
        self.words = weights.words[row_tile].reshape(-1).view(torch.uint8).numpy()
        self.scales = weights.scales[row_tile].reshape(-1).float().numpy()
        self.zeros = np.full(len(self.scales), -136.0 if self.dtype == BF16 else -1032.0)
        if weights.zeros is not None:
            self.zeros = weights.zeros[row_tile].reshape(-1).double().numpy()

    def load(self, stage: int) -> np.ndarray:
        """``load_stage``: words of each lane [window, eight, row, 32]."""
        words = np.zeros((2, 4, 2, 32), np.uint32)
        for window in range(2):
            for eight in range(4):
                place = stage * STAGE_WORDS + C // 2 * 512 + LANE // 4 * 64
                place += window * 1024 + eight * 16
                v = np.stack([self.words[p : p + 16].view(np.uint32) for p in place], 1)
                words[window, eight] = np.where(C % 2, v[[1, 3]], v[[0, 2]])
        return words

    def part(self, stage: int, window: int, plane: int, row: int) -> np.ndarray:
        """``Parts``: where each lane's scale and zero point are, [32]."""
        first = (stage * 2) >> self.part_bits
        return ((first + window % self.parts) * 8 + G) * 8 + plane * 2 + row

    def first_input(self, stage: int, plane: int) -> int:
        """``copy_x``: of the box of x that a plane is multiplied by."""
        block = (stage * 2) >> self.block_bits
        before = ((block * (PLANES - 1)) << self.block_bits) + stage * 2
        return (before + (plane << self.block_bits)) * 32

    def left(self, words: np.ndarray, stage: int, plane: int) -> list[np.ndarray]:
        """The left sides [16, 16] of a plane's four products, of a warp.

        Register i of a lane has a pair of its row g or, if odd, 8 + g, and of its columns 2 * c
        or, from 2 on, 8 + 2 * c: wgmma's fragment of A, "Register Fragments" of the PTX ISA.
        """
        left = np.full((4, 16, 16), np.nan)
        for i in range(16):
            place = self.part(stage, i // 8, plane, i % 2)
            held = words[i // 8, i // 2 % 4, i % 2]
            pairs = unpack(held, plane, self.scales[place], self.zeros[place], self.dtype)
            register = i % 4
            for h in range(2):
                left[i // 4, G + 8 * (register % 2), C * 2 + h + 8 * (register // 2)] = pairs[:, h]
        return list(left)


def box(x: np.ndarray, token: int, tokens: int, first: int) -> np.ndarray:
    """What the copy engine brings: outside of x there are zeros."""
    part = x[token : token + tokens, first : first + BOX_INPUTS]
    return np.pad(part, ((0, tokens - len(part)), (0, BOX_INPUTS - part.shape[1])))


def tile_sums(
    x: np.ndarray, weights: Int4Weights, row_tile: int, token: int, tokens: int, stages: range
) -> np.ndarray:
    """What a warp makes of its row tile in some stages: [16, tokens]."""
    sums = np.zeros((16, tokens))
    found = Stages(weights, row_tile)
    for stage in stages:
        words = found.load(stage)
        for plane in range(PLANES):
            right = box(x, token, tokens, found.first_input(stage, plane))
            for i, left in enumerate(found.left(words, stage, plane)):
                sums += left @ right[:, i * 16 : i * 16 + 16].T
    return sums


def place(tile: int, tokens: int, warps: int, row_blocks: int, token_tiles: int) -> tuple[int, int]:
    """``Work::place``: the first row of x and the first row tile of a tile of y."""
    few_tiles = constant("TILES_ALONG_X", tokens)
    before = tile // (row_blocks * few_tiles) * few_tiles
    few = min(few_tiles, token_tiles - before)
    tile -= before * row_blocks
    return (before + tile % few) * tokens, tile // few * warps


def emulated(
    x: torch.Tensor, weights: Int4Weights, bias: torch.Tensor | None, cut: Cut, blocks: int
) -> np.ndarray:
    """y as the kernel's thread blocks and warps share it; each number is stored once."""
    row_tiles, k_tiles = weights.words.shape[:2]
    stages, warps = k_tiles // 4, cut.groups * WARPS
    row_blocks, token_tiles = -(-row_tiles // warps), -(-len(x) // cut.tokens)
    tiles = row_blocks * token_tiles
    step = tiles if cut.split > 1 else min(tiles, blocks)
    y = np.full((len(x), weights.out_features), np.nan)
    inputs = x.double().numpy()
    shares = [stages * rank // cut.split for rank in range(cut.split + 1)]
    for first in range(step):  # of a cluster
        for tile in range(first, tiles, step):
            token, first_row_tile = place(tile, cut.tokens, warps, row_blocks, token_tiles)
            rows = slice(token, min(token + cut.tokens, len(x)))
            for row_tile in range(first_row_tile, min(first_row_tile + warps, row_tiles)):
                sums = sum(
                    tile_sums(inputs, weights, row_tile, token, cut.tokens, range(*share))
                    for share in pairwise(shares)
                )
                features = slice(row_tile * 16, min(row_tile * 16 + 16, weights.out_features))
                assert np.isnan(y[rows, features]).all()
                y[rows, features] = sums[: y[:, features].shape[1], : rows.stop - token].T
    return y if bias is None else y + bias.double().numpy()


@pytest.mark.parametrize(
    ("case", "cut"),
    [
        (Case(3, 40, 1024, 128, dtype=BF16), Cut(32, 1)),
        (Case(70, 130, 2048, 128, bias=True, dtype=FP16), Cut(64, 2, split=2)),
        (Case(33, 40, 1536, 32, symmetric=False, bias=True, dtype=BF16), Cut(32, 3, split=4)),
        (Case(33, 40, 1536, 32, dtype=FP16), Cut(64, 4)),
        (Case(129, 200, 1280, 64, symmetric=False, dtype=FP16), Cut(128, 1)),
        (Case(40, 33, 1024, 64, dtype=BF16), Cut(32, 2, split=2)),
        (Case(9, 17, 136, -1, symmetric=False, dtype=BF16), Cut(32, 4)),
        (Case(9, 70, 1000, -1, bias=True, dtype=FP16), Cut(32, 1, split=4)),
        (Case(300, 16, 1536, 96, symmetric=False, dtype=FP16), Cut(256, 2)),
        (Case(40, 96, 4864, 96, dtype=BF16), Cut(64, 1, split=8)),
    ],
    ids=str,
)
def test_lanes_find_their_inputs(case, cut):
    weights, x, bias = pack(case, make_weight(case)), make_input(case), make_bias(case)
    weight = unpack_int4(weights).to(case.dtype)  # each number of it is rounded once
    wanted = x.double() @ weight.double().T
    wanted = (wanted if bias is None else wanted + bias.double()).numpy()
    y = emulated(x, weights, bias, cut, blocks=3)
    # NaN must fail
    assert np.linalg.norm(y - wanted) <= 1e-12 * np.linalg.norm(wanted)


def all_numbers(scale: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(What unpacking gives, the exact product) of all nibbles and zero points with scales [N]."""
    q, zero_point = np.meshgrid(np.arange(16), np.arange(16))
    words = np.broadcast_to(q.reshape(-1, 1) * 0x10001, (256, len(scale)))
    zero = -(zero_point.reshape(-1, 1) + (128.0 if dtype == BF16 else 1024.0))
    numbers = unpack(words, 0, scale[None], np.broadcast_to(zero, words.shape), dtype)
    assert np.array_equal(numbers[..., 0], numbers[..., 1], equal_nan=True)
    return numbers[..., 0], (q - zero_point).reshape(-1, 1) * scale.astype(float)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_numbers_are_rounded_once(dtype):
    """By all scales that float16 has; from float32 there are some that float16 has not."""
    scale = np.arange(1, 0x7C00, 7, dtype=np.uint16).view(np.float16).astype(np.float32)
    numbers, exact = all_numbers(scale, dtype)
    assert np.array_equal(numbers, rounded(exact, dtype))

    finer = scale[(scale > 1e-3) & (scale < 1e3)] * np.float32(1 + 2**-12)
    numbers, exact = all_numbers(finer, dtype)
    half_a_unit = 2**-9 if dtype == BF16 else 2**-12  # of a number from 1/2 to 1
    assert (np.abs(numbers - exact) <= 2.02 * half_a_unit * np.abs(exact)).all()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("row_blocks", [1, 3, 24])
@pytest.mark.parametrize("token_tiles", [1, 5, 64, 79])
def test_each_tile_has_its_turn(tokens, row_blocks, token_tiles):
    """And all of the weight is multiplied by some rows of x before by others."""
    for warps in (4, 12):
        tiles = row_blocks * token_tiles
        order = [place(i, tokens, warps, row_blocks, token_tiles) for i in range(tiles)]
        wanted = {(i * tokens, j * warps) for i in range(token_tiles) for j in range(row_blocks)}
        assert len(set(order)) == tiles and set(order) == wanted
        together = tokens * constant("TILES_ALONG_X", tokens)
        turns = [token // together for token, _ in order]
        assert together <= 2048 and turns == sorted(turns)


# --- how products are cut ---------------------------------------------------------------------

SHAPES = ((24576, 4096), (4096, 12288), (1024, 2048), (6144, 1024), (50, 1000), (16, 136))


def stages_of(inputs: int) -> int:
    return -(-inputs // int4_wgmma.STAGE_INPUTS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuts_fit(shape):
    row_tiles, stages = -(-shape[0] // 16), stages_of(shape[1])
    for rows in (1, 9, 17, 32, 33, 64, 65, 100, 128, 129, 256, 300, 1000, 5000):
        cuts = possible_cuts(rows, row_tiles, stages, H200)
        assert len(set(cuts)) == len(cuts)
        for us, cut in cuts:
            assert us > 0 and 1 <= cut.groups <= MOST_GROUPS[cut.tokens]
            tiles = -(-row_tiles // (cut.groups * WARPS)) * -(-rows // cut.tokens)
            if cut.split > 1:
                most = dict(zip(cuda_library.SIZES, H200, strict=True))[cut.split]
                assert cut.split <= stages and tiles <= most


def test_there_is_a_cut_for_any_number_of_rows():
    for features, inputs in SHAPES:
        row_tiles, stages = -(-features // 16), stages_of(inputs)
        for rows in range(1, 5001):
            cut = choose_cut(rows, row_tiles, stages, H200)
            assert cut.tokens in TOKENS
            assert cut.tokens >= min(rows, 64) and cut.tokens < 2 * max(rows, 32)


def test_a_gpu_that_runs_no_clusters_has_cuts_without():
    cut = choose_cut(17, 64, 8, (132, 0, 0, 0))
    assert cut.split == 1
    assert choose_cut(17, 64, 8, H200).split > 1


# --- the build --------------------------------------------------------------------------------


def test_python_and_the_source_agree():
    wanted = python_parameters(int4_wgmma.kernel)
    assert c_parameters(int4_wgmma.SOURCE, "folovllm_int4_wgmma") == wanted
    for tokens in TOKENS:
        assert constant("MOST_GROUPS", tokens) == MOST_GROUPS[tokens]
    assert constant("BOX_INPUTS") == int4_wgmma.BOX_INPUTS == BOX_INPUTS
    assert constant("PLANES") * BOX_INPUTS == int4_wgmma.STAGE_INPUTS
    assert constant("WARPS") * constant("TILE_ROWS") == int4_wgmma.GROUP_ROWS
    assert constant("STAGE_WORDS") == STAGE_WORDS
    # Full and empty barriers of both rings, eight bytes each, are before x.
    barriers = 2 * (constant("MOST_X_SLOTS") + constant("WORD_SLOTS"))
    assert barriers * 8 <= int(re.search(r"a\.x_at = (\d+);", SOURCE)[1])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    flags = int4_wgmma.nvcc_flags(9, 0)
    folder = tmp_path_factory.mktemp("cubin")
    return compile_kernels(int4_wgmma.SOURCE, "many_rows_kernel", flags, folder)


def test_the_kernels_compile(compiled):
    found, text = compiled
    assert {kernel.template for kernel in found} == {
        (bfloat16, common, tokens) for bfloat16 in (0, 1) for common in (0, 1) for tokens in TOKENS
    }
    assert len(found) == 16
    for kernel in found:
        assert max(kernel.stored, kernel.loaded) <= 16, kernel
    # Where it does not see that nobody touches registers in use, products wait for each other.
    assert not re.search(r"C75\d\d|serialized", text), text


def test_groups_that_ask_for_more_registers_get_them(compiled):
    """Else they wait for ever: only what others of the thread block gave away is there."""
    for kernel in compiled[0]:
        tokens = kernel.template[-1]
        wanted, left = constant("REGISTERS", tokens), constant("COPYING_REGISTERS")
        assert wanted % 8 == left % 8 == 0
        assert 24 <= left <= kernel.registers <= wanted <= 256, kernel
        most_groups = MOST_GROUPS[tokens]
        for groups in range(1, most_groups + 1):
            at_launch = (groups + 1) * kernel.registers
            assert groups * wanted + left <= at_launch, (kernel, groups)
        assert (most_groups + 1) * 128 * kernel.registers <= 64 * 1024


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path / "a cache"))
    monkeypatch.setattr(int4_wgmma.kernel, "_found", {})
    return tmp_path / "a cache" / "cuda_kernels"


@pytest.mark.parametrize("module", [int4_cuda, int4_wgmma])
def test_a_changed_header_makes_another_library(cache, tmp_path, monkeypatch, module):
    included = re.findall(r'#include "(.+)"', module.SOURCE.read_text(encoding="utf-8"))
    assert included and set(included) <= set(cuda_library.HEADERS)
    for name in (module.SOURCE.name, *cuda_library.HEADERS):
        shutil.copy(module.SOURCE.with_name(name), tmp_path)
    count = tmp_path / "count"
    fake_nvcc(monkeypatch, tmp_path, f"echo x >> '{count}'; {WRITES_NO_LIBRARY}")
    source = tmp_path / module.SOURCE.name
    copied = CudaLibrary(source, "function", [], module.nvcc_flags)
    built = [copied.build(9, 0)]
    for name in (*included, source.name):
        with (tmp_path / name).open("a") as file:
            file.write("// changed\n")
        built += [copied.build(9, 0)]
        assert copied.build(9, 0) == built[-1]
    assert len(set(built)) == len(built) == len(count.read_text().split())
    assert all(library.parent == cache and "sm_90" in library.name for library in built)


def test_an_installed_package_has_all_that_is_compiled():
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["*"]
    names = [int4_cuda.SOURCE.name, int4_wgmma.SOURCE.name, *cuda_library.HEADERS]
    folder = int4_wgmma.SOURCE.parent
    here = {path.name for path in folder.iterdir() if path.suffix in (".cu", ".cuh")}
    assert here == set(names)  # or a change of one would not make another library
    for name in names:
        assert any(fnmatch(name, pattern) for pattern in patterns), name


# --- what happens without it ------------------------------------------------------------------


def test_without_a_gpu_others_serve(cache):
    case = Case(9, dtype=BF16)
    weights = pack(case, make_weight(case))
    assert int4_wgmma.kernel.why_not(weights.device) == "it has not been prepared"
    assert "CUDA device" in int4_wgmma.kernel.prepare(weights.device)
    assert not int4_wgmma.serves(9, weights) and not int4_wgmma.serves_all(weights)
    with pytest.raises(RuntimeError, match="cannot serve: it needs a CUDA device"):
        int4_wgmma.many_rows_linear(make_input(case), weights)


@pytest.mark.parametrize(
    ("capability", "shared", "script", "message"),
    [
        ((8, 0), 163, "exit 0", "Hopper's generation, not sm_80"),
        ((10, 0), 227, "exit 0", "Hopper's generation, not sm_100"),
        ((12, 0), 99, "exit 0", "Hopper's generation, not sm_120"),
        ((9, 0), 100, "exit 0", "227 KB of shared memory for a thread block, not 100 KB"),
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
    check_reason(monkeypatch, int4_wgmma.kernel, device, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 256, dtype=BF16)}, "x must be"),
        ({"x": torch.zeros(512, dtype=BF16)}, "x must be"),
        ({"x": torch.zeros(9, 512, dtype=FP16)}, "x must be"),
        ({"x": torch.zeros(512, 9, dtype=BF16).T}, "contiguous"),
        ({"x": torch.zeros(9 * 512 + 1, dtype=BF16)[1:].view(9, 512)}, "multiple of 16 bytes"),
        ({"x": torch.zeros(0, 512, dtype=BF16)}, "a row at least"),
        ({"bias": torch.zeros(512, dtype=BF16)}, "bias must be"),
        ({"bias": torch.zeros(48)}, "bias must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(9, dtype=BF16)
    good = {"x": make_input(case), "weights": pack(case, make_weight(case))}
    with pytest.raises(ValueError, match=message):
        int4_wgmma.many_rows_linear(**{**good, **change})


@pytest.fixture
def ready(monkeypatch):
    """As if the kernel were ready on the CPU; returns what its launches are given."""
    launches = []
    found = {torch.device("cpu"): Ready(None, H200)}
    monkeypatch.setattr(int4_wgmma.kernel, "_found", found)
    monkeypatch.setattr(int4_wgmma.kernel, "launch", lambda *given: launches.append(given))
    return launches


def test_it_serves_from_some_rows_on(ready):
    case = Case(9, dtype=BF16)
    weights = pack(case, make_weight(case))
    assert int4_wgmma.serves_all(weights)
    served = [rows for rows in (1, 8, 9, 17, 5000) if int4_wgmma.serves(rows, weights)]
    assert served == [9, 17, 5000]
    assert not int4_wgmma.serves_all(replace(weights, dtype=torch.float32))


@pytest.mark.parametrize("inputs", [64, 128, 576])
def test_planes_of_32_inputs_are_left_to_others(ready, inputs):
    case = Case(9, 48, inputs, 32, dtype=BF16)
    weights = pack(case, make_weight(case))
    assert weights.plane == 32
    assert not int4_wgmma.serves(9, weights) and not int4_wgmma.serves_all(weights)
    with pytest.raises(ValueError, match="64 inputs or more, not 32"):
        int4_wgmma.many_rows_linear(make_input(case), weights)


def test_what_a_launch_is_given(ready):
    case = Case(100, 50, 4864, 32, symmetric=False, bias=True, dtype=FP16)
    weight = make_weight(case)
    weights, x, bias = pack(case, weight), make_input(case), make_bias(case)
    y = int4_wgmma.many_rows_linear(x, weights, bias, pdl=True)
    cut = choose_cut(100, 4, 19, H200)
    tensors = (x, weights.words, weights.scales, weights.zeros, bias, y)
    wanted = [1, *(tensor.data_ptr() for tensor in tensors), 100, 50, 4864, 4, 76, 64, 2, 2]
    wanted += [cut.tokens, cut.groups, cut.split, 132, False, True]
    assert ready == [(torch.device("cpu"), *wanted)]
    assert y.shape == (100, 50) and y.dtype == FP16
    assert len(wanted) == len(int4_wgmma.kernel._arguments)

    scales = weight.scales.float() * (1 + 2**-12)
    exact = Quantized(weight.codes, weight.zeros * 0 + 8, scales, 32)
    how = Cut(64, 1, 4)
    int4_wgmma.many_rows_linear(x, pack(case, exact), cut=how)
    given = ready[-1][1:]
    assert given[4] is given[5] is None  # no zero points, no bias
    assert given[-7:] == (4, 64, 1, 4, 132, False, False)


# --- who multiplies ---------------------------------------------------------------------------


class TestProduct:
    """Products choose by rows. Which rows are the first kernel's is said here, not asked."""

    @pytest.fixture
    def called(self, monkeypatch):
        pytest.importorskip("triton", reason="Triton is not installed")
        from m7_gptq import int4_product

        names = []

        def spy(name):
            return lambda x, *_, **options: names.append(name) or x

        monkeypatch.setattr(int4_cuda, "serves", lambda rows, _: rows <= 16 and rows != 4)
        monkeypatch.setattr(int4_cuda, "few_rows_linear", spy("few rows"))
        monkeypatch.setattr(int4_wgmma, "many_rows_linear", spy("more rows"))
        monkeypatch.setattr(int4_product.int4_matmul, "int4_linear", spy("triton"))
        monkeypatch.setattr(int4_product.DequantizedRoom, "linear", spy("room"))
        return names

    def multiply(self, case: Case):
        from m7_gptq.int4_product import DequantizedRoom, Int4Product

        room = DequantizedRoom()
        product = Int4Product(pack(case, make_weight(case)), room)
        for rows in (1, 4, 8, 9, 16, 17, 64, 5000):
            product(torch.zeros(rows, case.in_features, dtype=case.dtype), None)
        return room

    def test_on_hopper(self, called, ready):
        room = self.multiply(Case(dtype=BF16))
        few, more = "few rows", "more rows"
        assert called == [few, "triton", few, few, few, more, more, more]
        assert not room._memory.numel()

    @pytest.mark.parametrize("case", [Case(dtype=BF16), Case(1, 48, 576, 32, dtype=BF16)], ids=str)
    def test_where_it_does_not_serve(self, called, ready, monkeypatch, case):
        """Not at all, or not this weight."""
        if case.in_features == 512:
            monkeypatch.setattr(int4_wgmma.kernel, "_found", {})
        room = self.multiply(case)
        few = "few rows"
        assert called == [few, "triton", few, few, few, "triton", "triton", "room"]
        assert room._memory.numel() == case.features * case.in_features


@pytest.mark.parametrize(
    ("capability", "reasons", "wanted"),
    [
        ((9, 0), ["no nvcc", "no nvcc"], ["few rows are left to Triton", "more rows are left"]),
        ((9, 0), [None, "no nvcc"], ["more rows are left to Triton: no nvcc"]),
        ((9, 0), [None, None], []),
        ((8, 0), ["too old", "too old"], []),
    ],
)
def test_what_keeps_a_kernel_from_serving_is_a_warning(monkeypatch, capability, reasons, wanted):
    device = pretend_gpu(monkeypatch, capability)
    for module, reason in zip((int4_cuda, int4_wgmma), reasons, strict=True):
        monkeypatch.setattr(module.kernel, "prepare", lambda device, said=reason: said)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        packed_product._prepare_cuda(device)
    assert len(found) == len(wanted)
    for one, text in zip(found, wanted, strict=True):
        assert text in str(one.message)

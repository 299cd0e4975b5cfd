"""4-bit weights for the GPU: their layout, and the kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from int4_cases import Case, check, make_input, make_weight, pack, run

from m7_gptq.kernels.int4_layout import OFFSETS, choose_plane, repack_int4, unpack_int4
from m7_gptq.kernels.int4_matmul import dequantize_int4, int4_linear, int4_linear_reference
from m7_gptq.kernels.int4_tiling import Tiling, choose_tiling, uses_dequantize

# Triton decides at its first import whether it compiles or interprets, so these run in a child.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_in_interpreter")

SHAPES = {  # (features, in_features) of Qwen3-0.6B and 8B
    "qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072),
    "qkv 8B": (6144, 4096), "o 8B": (4096, 4096), "gate_up 8B": (24576, 4096),
    "down 8B": (4096, 12288), "SmolLM2": (960, 576), "SmolLM2 down": (576, 1536),
    "Llama 70B down": (8192, 28672),
}  # fmt: skip


# --- layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, -1])
@pytest.mark.parametrize("shape", [(16, 512), (50, 576), (3, 72), (17, 1000)], ids=str)
def test_what_is_repacked_unpacks_to_the_same(shape, group_size, symmetric):
    for dtype in OFFSETS:
        case = Case(1, *shape, group_size, symmetric, dtype=dtype)
        weight = make_weight(case)
        packed = pack(case, weight)
        assert torch.equal(unpack_int4(packed), weight.dequantize())
        assert (packed.zeros is None) == symmetric


def test_scales_are_kept_exactly():
    weight = make_weight(Case())
    for scale in (1.0, 1.0 + 2**-12, 1e-9, 1e9):  # not all are numbers of float16
        scales = torch.full_like(weight.scales, scale, dtype=torch.float32)
        packed = repack_int4(weight.codes, weight.zeros, scales, 128, torch.bfloat16)
        assert torch.equal(unpack_int4(packed), (weight.codes - 8.0) * scale)
        assert packed.scales.dtype == (torch.float16 if scale == 1.0 else torch.float32)


@pytest.mark.parametrize("name", SHAPES)
def test_padding_is_little(name):
    inputs = SHAPES[name][1]
    plane, part = choose_plane(inputs, 128 if inputs % 128 == 0 else 64, 2)
    padded = -(-inputs // (4 * plane)) * 4 * plane
    assert padded <= 1.12 * inputs and plane % part == 0
    if inputs % 512 == 0:
        assert (padded, plane) == (inputs, 128)


def test_a_thread_reads_sixteen_bytes_and_its_own_inputs():
    """The rule of the layout, word by word, from one code that is not zero at a time."""
    zeros, scales = torch.full((16, 1), 8), torch.ones(16, 1)
    for row, column in ((0, 0), (11, 37), (5, 511), (8, 130), (15, 300)):
        codes = torch.zeros(16, 512, dtype=torch.uint8)
        codes[row, column] = 15
        words = repack_int4(codes, zeros, scales, -1, torch.float16).words
        (place,) = words.nonzero().tolist()
        plane, k = divmod(column, 128)
        window, c, u, hi, h = k // 32, k % 32 // 8, k % 8 // 4, k % 4 // 2, k % 2
        r, g = divmod(row, 8)
        assert place == [0, 2 * window + u, 4 * g + c, 4 * r + 2 * hi + h]
        assert int(words[*place]) & 0xFFFF == 15 << 4 * plane


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(16, 512)}, "integers"),
        ({"codes": torch.full((16, 512), 16)}, "0 to 15"),
        ({"codes": torch.zeros(16, 500, dtype=torch.int32)}, "multiple of 8"),
        ({"zeros": torch.full((16, 4), -1)}, "zeros must be 0 to 15"),
        ({"zeros": torch.zeros(16, 3, dtype=torch.int32)}, r"zeros must be \[16, 4\]"),
        ({"scales": torch.ones(4, 16)}, r"scales must be \[16, 4\]"),
        ({"scales": torch.full((16, 4), float("nan"))}, "NaN"),
        ({"group_size": 16}, "multiples of 32"),
        ({"group_size": 0}, "multiples of 32"),
        ({"dtype": torch.float64}, "not supported"),
    ],
)
def test_weights_that_make_no_sense_are_refused(change, message):
    good = {
        "codes": torch.zeros(16, 512, dtype=torch.uint8),
        "zeros": torch.full((16, 4), 8),
        "scales": torch.ones(16, 4),
        "group_size": 128,
        "dtype": torch.float16,
    }
    repack_int4(**good)
    with pytest.raises(ValueError, match=message):
        repack_int4(**{**good, **change})


# --- how products are cut -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 32, 64, 200])
@pytest.mark.parametrize("name", SHAPES)
def test_tilings_cover_a_product(name, rows):
    features, inputs = SHAPES[name]
    for group_size in (32, 64, 128, -1):
        plane, part = choose_plane(inputs, group_size, 2)
        k_tiles, block = -(-inputs // (4 * plane)) * plane // 16, plane // 16
        how = choose_tiling(rows, features, k_tiles, block, plane // part)
        steps = how.steps(k_tiles)
        assert how.tile_m >= min(rows, 64) and how.tile_m % 8 == 0
        assert block % how.tiles == 0
        at_once = how.tiles * (1 if how.stages else how.warps)
        covered = steps * how.splits * at_once
        assert k_tiles <= covered < k_tiles + steps * at_once
        if how.stages:
            assert how.warps in (4, 8) and how.tiles * (plane // part) <= block
        else:
            assert how.tiles * steps <= 16 and how.warps in (4, 8)  # 64 registers for words


def test_many_rows_are_for_large_products():
    for features, inputs in SHAPES.values():
        assert not uses_dequantize(64, features, inputs)
        assert uses_dequantize(2048, features, inputs)
    counts = [uses_dequantize(rows, 24576, 4096) for rows in range(1, 1025)]
    assert counts == sorted(counts)


# --- the kernels --------------------------------------------------------------------------------

CASES = [
    # What the sizes choose for themselves, ragged in every direction.
    *[Case(rows, 40, 576, 64, rows % 2 == 0, bias=rows > 5) for rows in (1, 7, 16, 33)],
    Case(2, 20, 1000, 128, symmetric=False),
    Case(3, 33, 512, -1),
    Case(3, 16, 288, 96, symmetric=False),
    # Few rows: tiles of all sizes, groups smaller and larger than a warp's share of a plane.
    *[
        Case(5, 16, 1024, group, False, tiling=Tiling(8, tiles, 2))
        for group in (32, 128)
        for tiles in (2, 4, 8)
    ],
    Case(4, 70, 512, 64, False, True, tiling=Tiling(8, 4, 2)),
    Case(11, 30, 512, 32, tiling=Tiling(16, 4, 2, splits=2)),
    # More programs along K than it has, more rows than a tile.
    Case(20, 70, 1024, 128, False, True, tiling=Tiling(8, 4, 2, splits=3)),
    # Many rows: one step and several, groups of a plane and of a fourth of one, splits, padding.
    Case(20, 70, 1024, 128, False, True, tiling=Tiling(32, 8, 4, splits=2, stages=3)),
    Case(20, 140, 576, 32, False, True, tiling=Tiling(16, 2, 8, splits=2, stages=2)),
    Case(70, 33, 512, 64, False, tiling=Tiling(64, 4, 4, stages=4)),
    Case(40, 33, 512, 128, tiling=Tiling(64, 8, 4, stages=2)),
]


@in_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_interpreted(case):
    check(case)


@in_interpreter
def test_nothing_but_the_result_is_left_behind_interpreted():
    """Called again, with other inputs in between: the counters of split sums are zero again."""
    case = Case(5, 40, 1024, symmetric=False, tiling=Tiling(8, 4, 2, splits=2))
    weights = pack(case, make_weight(case))
    first, other = (make_input(case, seed=seed) for seed in (0, 1))
    wanted = run(case, weights, first)
    run(case, weights, other)
    assert torch.equal(run(case, weights, first), wanted)
    check(case, seed=2)


@in_interpreter
def test_a_row_depends_on_itself_only_interpreted():
    case = Case(12, 40, 1024, symmetric=False, tiling=Tiling(16, 4, 2, splits=2))
    weights, x = pack(case, make_weight(case)), make_input(case)
    y = run(case, weights, x)
    x[3] = float("nan")
    kept = torch.arange(12) != 3
    changed = run(case, weights, x)
    assert torch.equal(changed[kept], y[kept]) and changed[3].isnan().all()


@in_interpreter
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((40, 576), 64), ((16, 1000), 128), ((16, 512), 32)]
)
def test_dequantized_weights_interpreted(shape, group_size, symmetric):
    case = Case(1, *shape, group_size, symmetric)
    weight = make_weight(case)
    wanted = weight.dequantize().half()
    packed = pack(case, weight)
    assert torch.equal(dequantize_int4(packed), wanted)
    out = torch.empty(shape[0] + 1, shape[1], dtype=torch.float16).fill_(7)
    assert dequantize_int4(packed, out[:-1]).data_ptr() == out.data_ptr()
    assert torch.equal(out[:-1], wanted) and (out[-1] == 7).all()


@in_interpreter
def test_no_rows_give_no_rows_interpreted():
    case = Case(0)
    weights = pack(case, make_weight(case))
    assert run(case, weights, torch.empty(0, 512, dtype=torch.float16)).shape == (0, 48)


@in_interpreter
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(512)}, "x must be"),
        ({"x": torch.zeros(2, 256, dtype=torch.float16)}, r"contiguous \[2, 512\]"),
        ({"x": torch.zeros(2, 512)}, "float16"),
        ({"x": torch.zeros(512, 2, dtype=torch.float16).T}, "strides"),
        ({"bias": torch.zeros(47, dtype=torch.float16)}, r"bias must be contiguous \[48\]"),
        ({"tiling": Tiling(8, 16, 1)}, "more tiles"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_interpreted(change, message):
    case = Case()
    weights = pack(case, make_weight(case))
    good = {"x": torch.zeros(2, 512, dtype=torch.float16), "weights": weights}
    with pytest.raises(ValueError, match=message):
        int4_linear(**{**good, **change})
    with pytest.raises(ValueError, match=r"out must be contiguous \[48, 512\]"):
        dequantize_int4(weights, torch.empty(512, 48, dtype=torch.float16))


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_the_twin_needs_no_gpu_and_the_kernels_say_so():
    case = Case(3, 20, 96, 32, symmetric=False, bias=True, dtype=torch.float32)
    weight = make_weight(case)
    weights, x, bias = pack(case, weight), make_input(case), torch.randn(20)
    expected = torch.nn.functional.linear(x, weight.dequantize(), bias)
    torch.testing.assert_close(int4_linear_reference(x, weights, bias), expected)
    for call in (lambda: int4_linear(x, weights), lambda: dequantize_int4(weights)):
        with pytest.raises(ValueError, match="int4_linear_reference"):
            call()


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_triton_in_interpreter():
    import triton

    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("this Triton's interpreter cannot loop with this NumPy")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        [*command, "-k", "interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " skipped" not in child.stdout, child.stdout

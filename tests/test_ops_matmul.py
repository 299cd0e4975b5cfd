"""Matrix products of a few rows: interpreted on the CPU, where they pay, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from matmul_cases import Case, check

from common.ops.matmul import (
    Tiling,
    choose_tiling,
    max_norm_features,
    norm_pays,
    pays,
    skinny_linear,
    skinny_norm_linear,
)

# Triton decides at its first import whether it compiles or interprets, so these run in a child.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_in_interpreter")

BF16 = torch.bfloat16
SHAPES = {  # (features, in_features) of Qwen3-0.6B and 8B
    "qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072),
    "qkv 8B": (6144, 4096), "o 8B": (4096, 4096), "gate_up 8B": (24576, 4096),
    "down 8B": (4096, 12288), "lm_head": (151936, 1024), "SmolLM2": (960, 576),
}  # fmt: skip

EVERYTHING = {"norm": True, "residual": True, "bias": True, "silu": True}
CASES = [
    # What the sizes choose for themselves, ragged in every direction.
    *[Case(rows, 50, 72) for rows in (1, 2, 16, 17, 40)],
    *[Case(rows, 36, 200, **EVERYTHING) for rows in (1, 5)],
    *[Case(rows, 96, 64, torch.float16, norm=True) for rows in (1, 9)],
    *[Case(rows, 70, 136, torch.float16, bias=True, silu=True) for rows in (1, 12, 33)],
    # Several tiles along K, fewer of them in registers, split sums.
    Case(1, 40, 200, tiling=Tiling("single", 8, 32, 4, 3), **EVERYTHING),
    Case(1, 40, 96, tiling=Tiling("single", 4, 32, 4, 1), bias=True),
    Case(3, 40, 200, tiling=Tiling("few", 16, 64, 4, 2), **EVERYTHING),
    Case(10, 40, 200, tiling=Tiling("few", 16, 64, 2, 1, splits=2), bias=True, silu=True),
    Case(20, 40, 200, tiling=Tiling("many", 16, 32, 4, 2, splits=3), bias=True, silu=True),
    Case(3, 20, 64, tiling=Tiling("many", 32, 32, 4, 2, splits=4)),  # more programs than tiles
]


@in_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_interpreted(case):
    check(case)


@in_interpreter
def test_counters_are_left_as_found_interpreted():
    case = Case(5, 40, 96, tiling=Tiling("many", 16, 32, 4, 2, splits=3))
    for seed in range(2):
        check(case, seed=seed)


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


# ---- choosing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tilings_hold_together(shape, norm):
    features, in_features = shape
    for rows in (1, 2, 8, 9, 16) if norm else (1, 2, 8, 16, 17, 32, 64, 65, 128):
        how = choose_tiling(rows, features, in_features, norm)
        for size in (how.tile_n, how.tile_k, how.warps):
            assert size.bit_count() == 1, how  # Triton's tiles are powers of two
        assert how.depth >= 1 and how.splits * how.tile_k < in_features + how.tile_k * how.splits
        assert not (norm and how.splits > 1)  # a part of a row cannot be normalised
        assert how.kernel != "single" or (rows == 1 and how.splits == 1)
        assert how.kernel != "few" or rows <= 16


def test_products_pay_on_few_rows_of_half_precision():
    for features, in_features in SHAPES.values():
        assert pays(1, features, in_features, BF16)
        assert not pays(129, features, in_features, BF16)
        assert not pays(1, features, in_features, torch.float32)
        assert norm_pays(1, features, in_features, BF16) == (in_features <= max_norm_features(1))
        assert not norm_pays(17, features, in_features, BF16)
    assert not pays(1, 1000, 577, BF16)  # rows of weights without alignment


# ---- refusing ------------------------------------------------------------------------------------


def make(rows=2, features=4, in_features=8, dtype=torch.float16):
    return torch.zeros(rows, in_features, dtype=dtype), torch.zeros(features, in_features).to(dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x[0], w), r"x must be 1 to 128 rows"),
        (lambda x, w: (x[:0], w), r"x must be 1 to 128 rows"),
        (lambda x, w: (x.repeat(65, 1), w), r"not \[130, 8\]"),
        (lambda x, w: (x, w[:, :4]), r"weight must be contiguous \[4, 8\]"),
        (lambda x, w: (x, w.T.contiguous().T), r"weight must be contiguous.*strides \(1, 4\)"),
        (lambda x, w: (x, w.float()), r"weight must be .*float16, not .*float32"),
        (lambda x, w: (x, w, x[0, :3]), r"bias must be contiguous \[4\]"),
    ],
)
def test_arguments_that_do_not_go_together(change, message):
    with pytest.raises(ValueError, match=message):
        skinny_linear(*change(*make()))


def test_gate_and_up_of_unequal_length():
    with pytest.raises(ValueError, match="equally long"):
        skinny_linear(*make(features=5), silu_mul=True)


@pytest.mark.parametrize(("rows", "in_features"), [(17, 64), (1, 8200), (2, 2056)])
def test_rows_too_large_for_a_norm(rows, in_features):
    x, weight = make(rows, in_features=in_features)
    with pytest.raises(ValueError, match="normalise it first"):
        skinny_norm_linear(x, None, x[0], 1e-6, weight)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_the_cpu_is_refused():
    with pytest.raises(ValueError, match=r"CUDA device.*functional\.linear"):
        skinny_linear(*make())

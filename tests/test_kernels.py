"""The paged kernels on the CPU: the PyTorch twin, Triton in its interpreter, and the host code."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, check_attention, check_reshape_and_cache, make_inputs

from common import nvcc
from m3_paged.kernels import cuda_kernels, get_kernels, launch, reference

# Triton decides at its first import whether it compiles or interprets, so these run in a child.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_in_interpreter")

TWIN_CASES = [
    *[Case(head_dim=d) for d in (16, 64, 80, 96, 128, 256)],
    *[Case(group=g, num_kv_heads=h) for g, h in ((1, 3), (3, 3), (4, 1), (8, 2), (17, 1))],
    *[Case(block_size=b) for b in (8, 32, 256)],
    *[Case(dtype=t) for t in (torch.float16, torch.bfloat16)],
    Case(lengths=(130,)),
    Case(lengths=(48, 48, 48)),
    Case(lengths=(0, 0)),
    Case(lengths=(1,)),
]


@pytest.mark.parametrize("case", TWIN_CASES, ids=str)
def test_twin_equals_float64(case):
    check_attention(get_kernels("torch", "cpu"), case)


@pytest.mark.parametrize("gathered", [1, 64, 150])
def test_twin_does_not_depend_on_how_the_batch_is_cut(monkeypatch, gathered):
    monkeypatch.setattr(reference, "GATHERED_TOKENS", gathered)
    check_attention(get_kernels("torch", "cpu"), Case(lengths=(5, 70, 0, 70, 16, 1, 33)))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    block_size=st.sampled_from([8, 16, 24]),
    group=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_twin_on_any_batch(lengths, block_size, group, seed):
    case = Case(head_dim=16, group=group, block_size=block_size, lengths=tuple(lengths))
    check_attention(get_kernels("torch", "cpu"), case, seed=seed)


def test_twin_takes_an_empty_batch():
    out = get_kernels("torch", "cpu").paged_attention(
        torch.empty(0, 4, 64),
        torch.empty(3, 16, 2, 64),
        torch.empty(3, 16, 2, 64),
        torch.empty(0, 5, dtype=torch.int32),
        torch.empty(0, dtype=torch.int32),
        1.0,
    )
    assert out.shape == (0, 4, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twin_writes_the_slots_it_is_told(dtype):
    check_reshape_and_cache(get_kernels("torch", "cpu"), Case(dtype=dtype))


# ---- Triton, interpreted -------------------------------------------------------------------------


@in_interpreter
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(head_dim=128, group=1, num_kv_heads=1, block_size=8, lengths=(70, 0)),
        Case(head_dim=80, group=3, num_kv_heads=1, block_size=32, dtype=torch.float16),
        Case(head_dim=16, group=17, num_kv_heads=1, block_size=256, lengths=(40, 300)),
    ],
    ids=str,
)
def test_triton_attention_interpreted(case, num_splits):
    check_attention(get_kernels("triton", "cpu"), case, num_splits=num_splits)


@in_interpreter
@pytest.mark.parametrize("case", [Case(), Case(head_dim=80, num_kv_heads=3)], ids=str)
def test_triton_cache_write_interpreted(case):
    check_reshape_and_cache(get_kernels("triton", "cpu"), case)


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_triton_in_interpreter():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
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


# ---- choosing a backend --------------------------------------------------------------------------


def test_auto_is_torch_on_the_cpu():
    assert get_kernels("auto", "cpu").name == "torch"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_a_gpu_backend_without_gpu_is_refused(backend):
    with pytest.raises(ValueError, match=r"needs a CUDA device.*'torch'"):
        get_kernels(backend, "cpu")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"unknown attention backend 'flash'.*triton"):
        get_kernels("flash", "cpu")


def test_importing_the_package_loads_no_gpu_kernels():
    code = (
        "import sys, m3_paged.kernels as k; k.get_kernels('auto', 'cpu'); "
        "sys.exit(any(name.startswith('m3_paged.kernels.') and 'reference' not in name "
        "for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- the host side of the GPU kernels ------------------------------------------------------------


@pytest.mark.parametrize(
    ("programs", "max_context", "splits"),
    [(8, 4096, 16), (64, 4096, 8), (64, 32768, 8), (512, 4096, 1), (8, 200, 1), (1, 10**6, 528)],
)
def test_splits_fill_an_h200(monkeypatch, programs, max_context, splits):
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 132)
    assert launch.choose_num_splits(torch.device("cuda"), programs, max_context) == splits


def attention_arguments():
    inputs = make_inputs(Case())
    return {
        "q": inputs.q,
        "k_cache": inputs.k_cache,
        "v_cache": inputs.v_cache,
        "block_tables": inputs.block_tables,
        "context_lens": inputs.context_lens,
        "out": torch.empty(inputs.q.shape),
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x.half(), "dtype must be equal"),
        ("q", lambda x: x[:, :3], "multiple of Hkv"),
        ("q", lambda x: x[..., ::2].repeat(1, 1, 2).transpose(1, 2).contiguous().mT, "contiguous"),
        ("k_cache", lambda x: x.transpose(1, 2), "must both be"),
        ("v_cache", lambda x: x[:, :8], "must both be"),
        ("block_tables", lambda x: x.long(), "must be int32"),
        ("block_tables", lambda x: x[:2], "max_blocks"),
        ("block_tables", lambda x: x.T.contiguous().T, "contiguous"),
        ("context_lens", lambda x: x.long(), "must be int32"),
        ("out", lambda x: x.half(), "out must be"),
        ("out", lambda x: x.mT.contiguous().mT, "out must be"),
    ],
)
def test_arguments_a_kernel_would_misread_are_refused(name, change, message):
    arguments = attention_arguments()
    launch.check_paged_attention(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        launch.check_paged_attention(**arguments)


def test_a_slot_mapping_of_the_wrong_type_or_length_is_refused():
    cache, k = torch.zeros(2, 8, 1, 16), torch.zeros(3, 1, 16)
    slots = torch.arange(3)
    launch.check_reshape_and_cache(k, k, cache, cache, slots)
    with pytest.raises(ValueError, match="int64"):
        launch.check_reshape_and_cache(k, k, cache, cache, slots.int())
    with pytest.raises(ValueError, match=r"k must be \[2, Hkv, D\]"):
        launch.check_reshape_and_cache(k, k, cache, cache, slots[:2])


def fake_nvcc(folder: Path, script: str) -> Path:
    compiler = folder / "nvcc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return compiler


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path / "a cache"))
    return tmp_path / "a cache"


def test_a_missing_nvcc_names_the_triton_path(cache, monkeypatch):
    for module in (nvcc, cuda_kernels):
        monkeypatch.setattr(module, "find_nvcc", lambda: None)
    for needs_nvcc in (cuda_kernels.require_nvcc, lambda: cuda_kernels.build("sm_90", 128)):
        with pytest.raises(RuntimeError, match=r"(?s)not found.*toolkit.*backend='triton'"):
            needs_nvcc()


def test_a_failed_build_shows_the_compiler_and_leaves_nothing(cache, tmp_path, monkeypatch):
    compiler = fake_nvcc(tmp_path, "echo no such target >&2; exit 1")
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: compiler)
    message = r"(?s)-arch=sm_90 -DHEAD_SIZE=128.*no such target.*attention_backend='triton'"
    with pytest.raises(RuntimeError, match=message):
        cuda_kernels.build("sm_90", 128)
    assert not list((cache / "cuda_kernels").iterdir())


def test_a_library_is_built_once(cache, tmp_path, monkeypatch):
    count = tmp_path / "count"
    last = 'for target; do [ "$previous" = -o ] && echo made > "$target"; previous=$target; done'
    compiler = fake_nvcc(tmp_path, f"echo x >> '{count}'; {last}")
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: compiler)
    library = cuda_kernels.build("sm_90", 128)
    assert library == cuda_kernels.build("sm_90", 128)
    assert library.read_text() == "made\n" and count.read_text() == "x\n"
    assert library not in (cuda_kernels.build("sm_80", 128), cuda_kernels.build("sm_90", 64))

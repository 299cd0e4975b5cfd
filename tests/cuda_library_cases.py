"""The kernels in CUDA C++ without a GPU: what nvcc makes of them, and a GPU that is not there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common import nvcc
from m7_gptq.kernels.cuda_library import CudaLibrary

H200 = (132, 66, 30, 15)  # clusters of 1, 2, 4 and 8 thread blocks at once
# A compiler that writes its name into what it should make, and one that makes nothing.
WRITES_NO_LIBRARY = 'while [ "$1" != -o ]; do shift; done; echo no library > "$2"'
FAILS = "echo no such target >&2; exit 1"


@dataclass(frozen=True)
class Compiled:
    """A kernel, by the arguments of its template: registers of a thread, bytes that spill."""

    template: tuple[int, ...]
    registers: int
    stored: int
    loaded: int


def compile_kernels(
    source: Path, name: str, flags: Sequence[str], folder: Path
) -> tuple[list[Compiled], str]:
    """All instantiations of a kernel, and what the compiler said; skips where there is none."""
    compiler = nvcc.find_nvcc()
    if compiler is None:
        pytest.skip("nvcc is not installed")
    command = [str(compiler), "-std=c++17", "-O3", "-cubin", *flags, "-Xptxas", "-v"]
    command += ["-o", str(folder / "kernels.cubin"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pattern = rf"""Compiling\ entry\ function\ '\w*{name}I((?:L[bi]\d+E)+)E
        .*? (\d+)\ bytes\ spill\ stores,\ (\d+)\ bytes\ spill\ loads .*? Used\ (\d+)\ registers"""
    return [
        Compiled(
            tuple(map(int, re.findall(r"\d+", match[1]))),
            registers=int(match[4]),
            stored=int(match[2]),
            loaded=int(match[3]),
        )
        for match in re.finditer(pattern, result.stderr, re.DOTALL | re.VERBOSE)
    ], result.stderr


def fake_nvcc(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str | None) -> None:
    """Let a script be the compiler; None: there is none."""
    compiler = folder / "nvcc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: compiler if script else None)


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], shared: int = 227
) -> torch.device:
    """A GPU by its compute capability and KB of shared memory; nothing can run on it."""

    class Properties:
        shared_memory_per_block_optin = shared << 10

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    return torch.device("cuda", 0)


def check_reason(
    monkeypatch: pytest.MonkeyPatch, kernel: CudaLibrary, device: torch.device, message: str
) -> None:
    """What keeps it from serving is said, kept, and not tried again."""
    assert re.search(message, kernel.prepare(device))
    monkeypatch.setattr(kernel, "_load", None)
    assert re.search(message, kernel.prepare(device))
    assert re.search(message, kernel.why_not(device))
    assert kernel.ready(device) is None
    with pytest.raises(RuntimeError, match=f"(?s)cannot serve: .*({message})"):
        kernel.launch(device)


def c_parameters(source: Path, function: str) -> list[str]:
    """``pointer`` or ``int`` for each parameter of a C function."""
    text = source.read_text(encoding="utf-8")
    parameters = re.search(rf'extern "C" int {function}\((.*?)\)', text, re.DOTALL)[1]
    return [
        "pointer" if re.search(r"\*|cudaStream_t", parameter) else "int"
        for parameter in parameters.split(",")
    ]


def python_parameters(kernel: CudaLibrary) -> list[str]:
    """The same of what Python hands over; a stream is last."""
    kinds = ["int" if kind.__name__ == "c_int" else "pointer" for kind in kernel._arguments]
    return [*kinds, "pointer"]

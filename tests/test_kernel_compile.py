"""The GPU kernels compile for Ampere, Hopper and Blackwell, and fit: registers, spills, shared.

Without a GPU: ``compiled_kernels`` launches them on a pretended one, in a process for each.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import pytest
from support import ROOT

from common.nvcc import find_nvcc
from m3_paged.kernels import cuda_kernels

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block may use
LEAST_KERNELS = {80: 50, 90: 90, 100: 50}
MAX_STACK = 64  # bytes a thread; spilled registers live there
REGISTERS = 64 * 1024  # of a multiprocessor
# Several programs must fit on a multiprocessor, so that one computes while another waits. Three of
# four warps may have 168 registers a thread.
LEAST_PROGRAMS = 3
# Those that bring their own parallelism: large tiles, or as many loads in flight as registers hold.
FEWER_PROGRAMS = {
    "flash_prefill_kernel": 1,
    "flash_decode_fused_kernel": 2,  # with few sequences, its first tile in registers
    "single_row_kernel": 1,
    "few_rows_kernel": 2,
    "rms_norm_kernel": 1,  # of 16 warps, for rows of 16384
    "int4_few_rows_kernel": 2,  # with all its weights in registers
    "int4_many_rows_kernel": 1,  # of 8 warps, with large tiles
}

KERNEL_FOLDERS = ("common/ops", "m3_paged/kernels", "m4_flash/kernels", "m7_gptq/kernels")


def written_kernels() -> set[str]:
    """Names of all kernels that can be launched; what they call has other names."""
    files = [file for folder in KERNEL_FOLDERS for file in (ROOT / folder).glob("*.py")]
    functions = [f for file in files for f in ast.parse(file.read_text(encoding="utf-8")).body]
    return {
        f.name
        for f in functions
        if isinstance(f, ast.FunctionDef)
        and f.name.endswith("_kernel")
        and any("triton.jit" in ast.unparse(decorator) for decorator in f.decorator_list)
    }


def programs_that_fit(kernel: dict) -> int:
    """Programs that the registers of a multiprocessor are enough for."""
    threads = 32 * int(re.search(r"num_warps=(\d+)", kernel["constants"])[1])
    return REGISTERS // (-(-kernel["registers"] // 8) * 8 * threads)


def in_a_process(*arguments: str) -> Any:
    """What Python prints as JSON; of its own, as a pretended GPU stays for good."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, *arguments]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_kernels_compile_and_fit(arch):
    kernels = in_a_process(str(ROOT / "tests" / "compiled_kernels.py"), str(arch))
    assert len(kernels) >= LEAST_KERNELS[arch]
    assert {kernel["name"] for kernel in kernels} == written_kernels()
    for kernel in kernels:
        assert kernel["stack"] <= MAX_STACK, kernel
        assert kernel["shared"] <= SHARED_LIMIT[arch], kernel
        least = FEWER_PROGRAMS.get(kernel["name"], LEAST_PROGRAMS)
        assert programs_that_fit(kernel) >= least, kernel


INT4_PRODUCT = """
import json, torch
from compiled_kernels import launch_int4
from pretended_gpu import PretendedGpu
with PretendedGpu((9, 0)) as gpu:
    launch_int4(gpu, 1, 24576, 4096, 128, False, torch.bfloat16)
    launch_int4(gpu, 64, 24576, 4096, 128, False, torch.bfloat16)
names = ("int4_few_rows_kernel", "int4_many_rows_kernel")
print(json.dumps([gpu.instructions(name) for name in names]))
"""


@pytest.fixture(scope="module")
def int4_instructions() -> list[dict[str, int]]:
    """Of a product with one row and of one with 64."""
    return in_a_process("-c", INT4_PRODUCT)


def test_weights_of_4_bits_go_from_memory_to_tensor_cores_by_themselves(int4_instructions):
    """One row: a thread has the 512 weights that it multiplies: it loads, unpacks, multiplies."""
    found, _ = int4_instructions

    def count(pattern: str) -> int:
        return sum(number for name, number in found.items() if re.match(pattern, name))

    words, scales_and_zeros, inputs = 16, 4, 32
    assert count(r"LDG\..*128") == words + scales_and_zeros + inputs
    assert count(r"LDG\.(?!.*128)") == 0
    assert count("HMMA") == 16 * 4  # tiles, planes
    assert count("I2F") == 0
    assert count(r"SHFL\.IDX") == count("LDSM") == 0  # nothing is exchanged
    assert count("BAR") <= 6 and count("LDS") <= 12  # but the sums, at the end
    assert sum(found.values()) <= 3 * 512


def test_tiles_of_weights_of_4_bits_come_while_others_are_multiplied(int4_instructions):
    """64 rows: the loop waits for no load of its own, and moves all it reads 16 bytes at a time.

    Words and scales go from shared memory to registers, x nowhere: tensor cores read it there.
    """
    _, found = int4_instructions

    def count(pattern: str) -> int:
        return sum(number for name, number in found.items() if re.match(pattern, name))

    assert count("HGMMA") == 4 * 4  # planes, sixteenths of them
    assert count(r"LDG\.(?!.*STRONG)") == 0  # only other programs' sums are loaded directly
    assert count(r"LDGSTS\..*128") == count("LDGSTS") > 0
    assert count("LDSM") == count("I2F") == 0


@pytest.mark.parametrize("head_dim", [80, 256])
def test_cuda_kernels_compile_and_fit(head_dim, tmp_path):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    command = [str(nvcc), "-std=c++17", "-O3", "-fatbin", *targets, f"-DHEAD_SIZE={head_dim}"]
    command += ["-Xptxas", "-v", "-o", str(tmp_path / "kernels.fatbin"), str(cuda_kernels.SOURCE)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", result.stderr)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", result.stderr)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", result.stderr)]
    # two targets; 3 dtypes, each with 3 group sizes and a combine kernel; one cache write
    assert len(registers) == 2 * (3 * (3 + 1) + 1)
    assert max(spills) <= MAX_STACK
    assert max(registers) <= 168
    assert max(shared) <= 48 * 1024  # static shared memory has this limit on every GPU

"""The GPU kernels compile for Ampere and Hopper, and fit: registers, spills, shared memory. No GPU.

Run as a script, this file compiles the Triton kernels for one architecture and prints what each one
uses as JSON; the test does that in a child, so that an interpreting Triton cannot get in the way.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from m3_paged.kernels import cuda_kernels

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes one block may use
# Several programs must fit on a multiprocessor (65536 registers) to hide the latency of memory.
MAX_REGISTERS = 168
MAX_STACK = 64  # bytes a thread; spilled registers live there


def triton_usage(arch: int) -> dict[str, dict[str, int]]:
    """Compile each kernel in the shapes that matter; registers, stack and shared bytes by name."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from m3_paged.kernels import triton_kernels as kernels

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def usage(kernel, types: dict[str, str], constants: dict[str, object], **options) -> dict:
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
        strides = [names.index(n) for n in ("q_stride", "k_stride", "v_stride") if n in names]
        source = ASTSource(
            kernel,
            signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in pointers + strides},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            command = [str(cuobjdump), "--dump-resource-usage", str(cubin)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
        return {
            "registers": int(registers),
            "stack": int(stack),
            "shared": compiled.metadata.shared,
        }

    found = {}
    for name, dtype, head_dim in (
        *[("bf16", torch.bfloat16, d) for d in (64, 96, 128, 256)],
        *[("fp32", torch.float32, d) for d in (64, 128, 256)],
    ):
        padded = triton.next_power_of_2(head_dim)
        tile = kernels.tile_tokens(padded, dtype)
        types = {
            **dict.fromkeys(("q", "k_cache", "v_cache"), f"*{name}"),
            **dict.fromkeys(("block_tables", "context_lens"), "*i32"),
            **dict.fromkeys(("out", "log_sums"), "*fp32"),
            "scale_log2": "fp32",
            **dict.fromkeys(("num_splits", "q_stride", "table_stride"), "i32"),
        }
        constants = {
            "GROUP": 2, "HKV": 8, "D": head_dim, "PADDED_D": padded, "BLOCK_SIZE": 16,
            "ROWS": kernels.HEAD_ROWS, "TILE": tile, "SPLIT": True,
        }
        found[f"paged_attention D{head_dim} {name}"] = usage(
            kernels.paged_attention_kernel, types, constants, num_warps=4, num_stages=2
        )
    types = {
        **dict.fromkeys(("partial", "log_sums"), "*fp32"),
        "context_lens": "*i32", "out": "*bf16", "num_splits": "i32",
    }
    found["combine"] = usage(
        kernels.combine_kernel, types, {"D": 128, "PADDED_D": 128, "TILE": 64}, num_warps=1
    )
    types = {
        **dict.fromkeys(("k", "v", "k_cache", "v_cache"), "*bf16"),
        "slot_mapping": "*i64", "k_stride": "i32", "v_stride": "i32",
    }
    found["reshape_and_cache"] = usage(
        kernels.reshape_and_cache_kernel, types, {"ROW": 1024, "PADDED_ROW": 1024}, num_warps=4
    )
    return found


@pytest.mark.parametrize("arch", [80, 90])
def test_triton_kernels_compile_and_fit(arch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, *sys.path])
    child = subprocess.run(
        [sys.executable, __file__, str(arch)], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    kernels = json.loads(child.stdout)
    assert len(kernels) == 9
    for name, uses in kernels.items():
        assert uses["stack"] <= MAX_STACK, (name, uses)
        assert uses["registers"] <= MAX_REGISTERS, (name, uses)
        assert uses["shared"] <= SHARED_LIMIT[arch], (name, uses)


@pytest.mark.parametrize("head_dim", [80, 256])
def test_cuda_kernels_compile_and_fit(head_dim, tmp_path):
    nvcc = cuda_kernels.find_nvcc()
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
    assert max(registers) <= MAX_REGISTERS
    assert max(shared) <= 48 * 1024  # static shared memory has this limit on every GPU


if __name__ == "__main__":
    print(json.dumps(triton_usage(int(sys.argv[1]))))

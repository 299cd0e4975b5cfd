"""A GPU that is not there: kernels are compiled for it instead of being launched.

    with PretendedGpu((9, 0)) as gpu:
        rms_norm(gpu.tensor(8, 1024), gpu.tensor(1024), 1e-6)
    gpu.kernels()          # [Kernel(name="rms_norm_kernel", registers=27, stack=0, shared=16, ...)]

Constants, warps, stages and what Triton knows of the arguments come from the code that launches, so
it is the very kernels of that GPU that are compiled. Needs a process of its own: it changes Triton
and torch for good.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NUM_MULTIPROCESSORS = 132
NUM_THREADS = 2  # that compile


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and what it takes: of a thread registers and stack, of a block shared."""

    name: str
    constants: str  # and options, to tell it from others of the name
    registers: int
    stack: int  # bytes; spilled registers live there
    shared: int  # bytes


class PretendedGpu(TorchFunctionMode):
    """Within it tensors say that they are on a GPU, have no memory, and nothing is launched.

    Args:
        capability: of the GPU: (9, 0) is Hopper.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self._compiled: dict[int, tuple[str, str, triton.FutureKernel]] = {}
        self._executor = ThreadPoolExecutor(NUM_THREADS)
        self._compiling = triton.AsyncCompileMode(self._executor)
        _pretend(capability)
        triton.JITFunction.__getitem__ = lambda kernel, grid: _Launch(kernel, self._compiled)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function == Tensor.device.__get__:
            return torch.device("cuda", 0)
        if function == Tensor.is_cuda.__get__:
            return True
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)

    def __enter__(self) -> PretendedGpu:
        self._compiling.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._compiling.__exit__(*error)  # waits for the threads, and raises what they raised
        self._executor.shutdown()

    def tensor(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def kernels(self) -> list[Kernel]:
        """All that were compiled, each once."""
        with ThreadPoolExecutor(NUM_THREADS) as executor:
            return list(executor.map(_describe, *zip(*self._compiled.values(), strict=True)))

    def instructions(self, name: str) -> dict[str, int]:
        """How often each instruction, like "LDG.E.128", stands in the kernels of that name."""
        found: Counter[str] = Counter()
        for kernel, _, future in self._compiled.values():
            if kernel == name:
                text = _dump(future.result(), "--dump-sass")
                found.update(re.findall(r"^ +/\*\w+\*/ +(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M))
        return dict(found)


@dataclass(frozen=True)
class _Launch:
    """``kernel[grid]``; called, it compiles, and stands for what was compiled."""

    kernel: triton.JITFunction
    compiled: dict[int, tuple[str, str, triton.FutureKernel]]  # name, constants, kernel; by its id

    def __call__(self, *args: Any, **options: Any) -> _Launch:
        compiled = self.kernel.run(*args, grid=None, warmup=True, **options)
        named = {**dict(zip(self.kernel.arg_names, args, strict=False)), **options}
        constants = [f"{name}={x}" for name, x in named.items() if isinstance(x, int)]
        dtype = str(next(x.dtype for x in args if isinstance(x, Tensor))).removeprefix("torch.")
        text = " ".join([dtype, *constants])
        self.compiled.setdefault(id(compiled), (self.kernel.__name__, text, compiled))
        return self

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: None  # the same again: `common.ops.launch` has kept it


def _pretend(capability: tuple[int, int]) -> None:
    """Answer what is asked about the GPU."""
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    for name, answer in {
        "get_device_capability": capability,
        "get_device_properties": SimpleNamespace(multi_processor_count=NUM_MULTIPROCESSORS),
        "current_device": 0,
        "current_stream": SimpleNamespace(synchronize=lambda: None),
        "is_current_stream_capturing": False,
        "device_of": nullcontext(),
    }.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)


def _describe(name: str, constants: str, future: triton.FutureKernel) -> Kernel:
    """Read from the machine code what a kernel takes."""
    compiled = future.result()
    text = _dump(compiled, "--dump-resource-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return Kernel(name, constants, int(registers), int(stack), compiled.metadata.shared)


def _dump(compiled: Any, what: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(CUOBJDUMP), what, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

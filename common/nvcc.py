"""Shared libraries from CUDA C++, built by ``nvcc`` on first use.

    library = build_library(Path("product.cu"), "product_sm_90", ("-arch=sm_90",))
    ctypes.CDLL(str(library))

The sources have a plain C interface and no PyTorch header, so a build takes seconds rather than a
minute. A library is kept in ``$FOLOVLLM_CACHE`` (``~/.cache/folovllm``) under a hash of all that
went into it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.checkpoint import cache_folder

NVCC_FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC")
NO_NVCC = (
    "the CUDA kernels are compiled on first use, and nvcc was not found on PATH, in CUDA_HOME or "
    "in /usr/local/cuda: install the CUDA toolkit"
)


def find_nvcc() -> Path | None:
    """The CUDA compiler: on PATH, or in CUDA_HOME, or where CUDA installs itself."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes if home)]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    return Path(found) if found else None


def build_library(
    source: Path, name: str, flags: Sequence[str], headers: Sequence[Path] = ()
) -> Path:
    """The library of ``source`` with these flags, unless an earlier run built it.

    Args:
        source: what is compiled.
        name: what the library's file name begins with.
        flags: besides ``NVCC_FLAGS``; they say for which GPU.
        headers: what the source may include of its own; with them in the hash, a change is built.

    Raises:
        RuntimeError: there is no nvcc, or it failed; the message has its output.
    """
    flags = (*NVCC_FLAGS, *flags)
    texts = [*(file.read_bytes() for file in (source, *headers)), " ".join(flags).encode()]
    key = hashlib.sha256(b"".join(texts)).hexdigest()[:16]
    library = cache_folder() / "cuda_kernels" / f"{name}_{key}.so"
    if library.exists():
        return library
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(NO_NVCC)
    library.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed: another process sees the whole library or none.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name
        command = [str(nvcc), *flags, "-o", str(unfinished), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(
                f"nvcc could not build the CUDA kernels ({' '.join(command)}):\n"
                f"{result.stderr or result.stdout}"
            )
        unfinished.replace(library)
    return library

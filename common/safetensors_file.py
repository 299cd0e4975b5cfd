"""Reading and writing of `*.safetensors`, one tensor in memory at a time.

    for name, tensor in read_tensors(path, device="cpu"): ...
    write_tensors(path, {"w": (torch.float32, (2, 3))}, iter([("w", tensor)]))

The format is eight bytes with the header's length, a JSON header (dtype, shape and byte range of
every tensor), then the bytes: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""What is known of a tensor before it is read: dtype and shape."""

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def tensor_names(path: Path) -> list[str]:
    """The tensors of a file. Raises ValueError for one that is no safetensors file, or cut off."""
    with _open(path) as file:
        return list(file.keys())


def read_tensors(
    path: Path, device: torch.device | str, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) on `device`, all of the file's or `names` only.

    The file is opened anew for each tensor: it is mapped into memory, and what has been read of a
    mapping stays resident as long as that lives, so a single one would end up holding a second
    copy of all the weights.
    """
    for name in tensor_names(path) if names is None else names:
        with _open(path, device) as file:
            tensor = file.get_tensor(name)
        yield name, tensor
        del tensor


def write_tensors(
    path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the tensors that `specs` announces, in whatever order they come, and sync to disk.

    Raises ValueError for a tensor that is missing or differs from its spec.
    """
    # Wide elements first keep every tensor aligned to the size of its own elements.
    ordered = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in ordered:
        dtype, shape = specs[name]
        starts[name] = end
        end += dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        data_start = file.tell()
        for name, tensor in tensors:
            if name not in starts:
                raise ValueError(f"tensor {name!r} was not announced, or comes twice")
            if (tensor.dtype, tuple(tensor.shape)) != (specs[name][0], tuple(specs[name][1])):
                raise ValueError(
                    f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, announced as "
                    f"{specs[name][0]} {list(specs[name][1])}"
                )
            file.seek(data_start + starts.pop(name))
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        if starts:
            raise ValueError(f"tensors announced but not given: {', '.join(starts)}")
        file.flush()
        os.fsync(file.fileno())


def tensor_specs(path: Path) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor in a file, from its header alone."""
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: (dtypes[part.get_dtype()], tuple(part.get_shape()))
            for name, part in slices.items()
        }


def _open(path: Path, device: torch.device | str = "cpu") -> safe_open:
    """`safe_open`, whose errors say neither which file it was nor what to do."""
    try:
        return safe_open(path, framework="pt", device=str(device))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); fetch or convert it again"
        ) from error

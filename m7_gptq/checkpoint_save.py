"""Writing of quantized checkpoints: complete, or not at all.

stored = StoredConfig.of(QuantizeConfig(bits=4, group_size=128))
save_quantized(Path("out"), source, stored, linear)     # linear(name) gives a PackedLinear
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.config import ModelConfig
from common.presets import weight_shapes
from common.safetensors_file import TensorSpec, write_tensors

from .checkpoint_format import PARTS, StoredConfig
from .packing import PackedLinear

_SHARD_BYTES = 4 * 1024**3


def save_quantized(
    folder: Path,
    source: Checkpoint,
    stored: StoredConfig,
    linear: Callable[[str], PackedLinear],
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a folder that `QuantizedCheckpoint`, gptqmodel and transformers read.

    source: where config, tokenizer and unquantized weights come from; linear: gives the packed
    weight of a projection by its name, asked once for each projection of every decoder layer.

    The folder appears complete or not at all. Raises ValueError if it exists and is not empty.
    """
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_descriptions(unfinished, source, stored)
        _write_weights(unfinished, source, stored, linear, shard_bytes)
        unfinished.chmod(0o755)  # mkdtemp's folders are closed to other users
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_existing(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; remove it or name another folder")


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name and [out, in] of each linear layer that is quantized: those of the decoder layers."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in weight_shapes(config).items()
        if name.endswith("_proj.weight")
    }


def _write_descriptions(folder: Path, source: Checkpoint, stored: StoredConfig) -> None:
    config = source.config.to_dict()
    contents = {
        "generation_config.json": {key: config[key] for key in ("bos_token_id", "eos_token_id")},
        "config.json": {**config, "quantization_config": stored.to_dict()},
        "quantize_config.json": stored.to_dict(),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if source.tokenizer is not None:
        source.tokenizer.save(folder)


def _write_weights(
    folder: Path,
    source: Checkpoint,
    stored: StoredConfig,
    linear: Callable[[str], PackedLinear],
    shard_bytes: int,
) -> None:
    """One model.safetensors, or shards of about `shard_bytes` and their index."""
    quantized = projections(source.config)
    specs: dict[str, TensorSpec] = {}
    for name, spec in source.weight_specs().items():
        module = name.removesuffix(".weight")
        if module in quantized:
            parts = stored.specs(*quantized[module])
            specs.update({f"{module}.{part}": parts[part] for part in PARTS})
        else:
            specs[name] = spec

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.weights("cpu"):
            module = name.removesuffix(".weight")
            if module in quantized:
                packed = linear(module)
                if (packed.bits, packed.checkpoint_format) != (
                    stored.bits, stored.checkpoint_format,
                ):  # fmt: skip
                    raise ValueError(f"{module} is not packed as the configuration says")
                yield from ((f"{module}.{part}", getattr(packed, part)) for part in PARTS)
            else:
                yield name, tensor

    shards = _shards(specs, shard_bytes)
    stream, weight_map = tensors(), {}
    for index, names in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        own = {name: specs[name] for name in names}
        write_tensors(folder / file, own, (next(stream) for _ in names))
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_bytes, specs.values()))}}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({**index, "weight_map": weight_map}, indent=2) + "\n", encoding="utf-8"
        )


def _shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a shard would outgrow its size."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + _bytes(spec) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _bytes(spec)
    return shards


def _bytes(spec: TensorSpec) -> int:
    dtype, shape = spec
    return dtype.itemsize * torch.Size(shape).numel()

"""Quantized checkpoints as auto-gptq and gptqmodel write them.

    checkpoint = QuantizedCheckpoint("mine", Path("folder"))
    checkpoint.quantization.bits, checkpoint.linears        # names of the quantized projections
    checkpoint.linear("model.layers.0.mlp.up_proj")         # a PackedLinear, checked
    model = load_model(checkpoint, ...)                     # with dequantized weights

A folder has config.json (with "quantization_config", or quantize_config.json beside it), and
safetensors with, for each quantized projection, `.qweight`, `.qzeros`, `.scales`, `.g_idx` in the
place of `.weight` (`m7_gptq.packing` says what they mean).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.config import ModelConfig
from common.presets import weight_shapes
from common.safetensors_file import TensorSpec, read_tensors, tensor_names, tensor_specs
from common.tokenizer import Tokenizer

from .gptq import QuantizeConfig
from .packing import FORMATS, V1, V2, PackedLinear, check_bits, words

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class StoredConfig:
    """What a checkpoint says of its quantization; `meta` is for people, not for loading."""

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = V1
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: QuantizeConfig, checkpoint_format: str | None = None) -> StoredConfig:
        """Of a quantization of ours; by default version 1, asymmetric ones version 2.

        Version 1 has no way to say "zero point 0" that all readers understand, and gptqmodel takes
        asymmetric files of version 1 from itself only.
        """
        return cls(
            bits=config.bits,
            group_size=config.group_size,
            sym=config.sym,
            desc_act=config.desc_act,
            checkpoint_format=checkpoint_format or (V1 if config.sym else V2),
            meta={
                "quantizer": ["folovllm:0.1.0"],
                "damp_percent": config.damp_percent,
                "static_groups": config.static_groups,
                "true_sequential": config.true_sequential,
            },
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> StoredConfig:
        """Read a quantization_config. ValueError for one that is not GPTQ or not supported."""
        method = config.get("quant_method") or config.get("method") or "gptq"
        if method != "gptq":
            raise ValueError(f"{where}: the weights are quantized by {method!r}, not by GPTQ")
        bits, group_size = config.get("bits"), config.get("group_size")
        if type(bits) is not int or type(group_size) is not int:
            raise ValueError(f"{where} must give bits and group_size as integers")
        try:
            check_bits(bits)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if group_size != -1 and group_size < 1:
            raise ValueError(f"{where}: group_size must be positive or -1, got {group_size}")
        stored_as = config.get("checkpoint_format") or config.get("format") or V1
        if config.get("is_marlin_format"):
            stored_as = "marlin"
        if stored_as not in FORMATS:
            raise ValueError(
                f"{where}: checkpoint format {stored_as!r} is not supported; "
                f"supported: {', '.join(FORMATS)}"
            )
        if config.get("pack_dtype", "int32") != "int32":
            raise ValueError(f"{where}: words of {config['pack_dtype']!r} are not supported")
        if config.get("dynamic"):
            raise ValueError(
                f"{where}: settings that differ by layer ('dynamic') are not supported"
            )
        return cls(
            bits=bits,
            group_size=group_size,
            sym=bool(config.get("sym", True)),
            desc_act=bool(config.get("desc_act", False)),
            checkpoint_format=stored_as,
            meta=dict(config.get("meta") or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """The quantization_config that gptqmodel, transformers and vLLM read."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
            "meta": dict(self.meta),
        }

    def specs(self, outputs: int, inputs: int) -> dict[str, TensorSpec]:
        """Dtype and shape of the tensors of a linear layer."""
        groups = 1 if self.group_size == -1 else -(-inputs // self.group_size)
        return {
            "qweight": (torch.int32, (words(inputs, self.bits, "in_features"), outputs)),
            "qzeros": (torch.int32, (groups, words(outputs, self.bits, "out_features"))),
            "scales": (torch.float16, (groups, outputs)),
            "g_idx": (torch.int32, (inputs,)),
        }


class QuantizedCheckpoint(Checkpoint):
    """A folder of GPTQ weights; as a `Checkpoint`, it gives them dequantized."""

    def __init__(self, name: str, folder: Path) -> None:
        """Raises ValueError where the folder is not GPTQ, not supported, or not complete."""
        self.folder = folder
        description = _read_json(folder / "config.json")
        self.quantization = read_stored_config(folder)
        generation = folder / "generation_config.json"
        super().__init__(
            name,
            ModelConfig.from_dict(
                description, _read_json(generation) if generation.is_file() else None
            ),
        )
        self.shapes = weight_shapes(self.config)
        self.files = _files_by_tensor(folder)
        self.linears = tuple(
            name.removesuffix(".weight")
            for name in self.shapes
            if name.removesuffix("weight") + "qweight" in self.files
        )
        """Names of the projections that are quantized; the others have a `.weight` as always."""
        if not self.linears:
            raise ValueError(f"{folder} has no quantized weights, though its configuration says so")
        self._refuse_strangers()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_folder(self.folder)

    def linear(self, name: str, device: torch.device | str = "cpu") -> PackedLinear:
        """The tensors of one projection. ValueError, naming it, where they are damaged."""
        stored = self.quantization
        outputs, inputs = self.shapes[f"{name}.weight"]
        try:
            expected = stored.specs(outputs, inputs)
            parts = {
                part: self._read(f"{name}.{part}", device)
                for part in PARTS
                if f"{name}.{part}" in self.files
            }
            if "g_idx" not in parts:
                parts["g_idx"] = self._default_g_idx(inputs, device)
            for part, (_, shape) in expected.items():
                if part not in parts:
                    raise ValueError(f"{part} is missing")
                if tuple(parts[part].shape) != shape:
                    raise ValueError(
                        f"{part} has shape {list(parts[part].shape)}; {list(shape)} goes with "
                        f"{outputs} outputs, {inputs} inputs, {stored.bits} bits and group_size "
                        f"{stored.group_size}"
                    )
            bias = f"{name}.bias"
            return PackedLinear(
                bits=stored.bits,
                bias=self._read(bias, device) if bias in self.shapes else None,
                checkpoint_format=stored.checkpoint_format,
                **parts,
            )
        except ValueError as error:
            raise ValueError(f"weights: {name}: {error}") from None

    def others(self, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of what is not quantized: embeddings, norms, biases, the head."""
        for name in self._plain_names():
            tensor = self._read(name, device)
            if not tensor.isfinite().all():
                raise ValueError(f"weights: {name} contains NaN or infinity")
            yield name, tensor

    def weights(self, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        """All weights of the model, dequantized to float32 where they are quantized."""
        yield from self.others(device)
        for name in self.linears:
            yield f"{name}.weight", self.linear(name, device).dequantize()

    def weight_specs(self) -> dict[str, TensorSpec]:
        in_files = {
            name: spec
            for file in dict.fromkeys(self.files.values())
            for name, spec in tensor_specs(file).items()
        }
        specs = {name: in_files[name] for name in self._plain_names()}
        for name in self.linears:
            specs[f"{name}.weight"] = (torch.float32, self.shapes[f"{name}.weight"])
        return specs

    def _plain_names(self) -> list[str]:
        quantized = {f"{name}.weight" for name in self.linears}
        return [name for name in self.shapes if name not in quantized and name in self.files]

    def _default_g_idx(self, inputs: int, device: torch.device | str) -> Tensor:
        if self.quantization.desc_act:
            raise ValueError(
                "g_idx is missing; with desc_act nothing else says which group an input is in"
            )
        size = inputs if self.quantization.group_size == -1 else self.quantization.group_size
        return torch.arange(inputs, dtype=torch.int32, device=device) // size

    def _refuse_strangers(self) -> None:
        """Every tensor must be part of the model, or one that does not change it.

        auto-gptq gives every linear layer a bias, of zeros where the model has none.
        """
        parts = {f"{name}.{part}" for name in self.linears for part in PARTS}
        for name in self.files.keys() - self.shapes.keys() - parts:
            module, _, kind = name.rpartition(".")
            if kind == "bias" and module in self.linears:
                if self._read(name, "cpu").any():
                    raise ValueError(
                        f"weights: {name} is not zero, but the model has no bias there"
                    )
            elif not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
                raise ValueError(
                    f"weights: {name} does not belong to this config.json "
                    f"({self.config.architecture})"
                )

    def _read(self, name: str, device: torch.device | str) -> Tensor:
        return next(read_tensors(self.files[name], device, [name]))[1]


def is_quantized(folder: Path) -> bool:
    """Whether a folder's configuration speaks of quantization, of whatever method."""
    config = folder / "config.json"
    return (folder / "quantize_config.json").is_file() or (
        config.is_file() and "quantization_config" in _read_json(config)
    )


def read_stored_config(folder: Path) -> StoredConfig:
    """From config.json, as transformers has it, or from quantize_config.json, as auto-gptq has."""
    inside = _read_json(folder / "config.json").get("quantization_config")
    if inside is not None:
        return StoredConfig.from_dict(inside, f"{folder / 'config.json'}: quantization_config")
    beside = folder / "quantize_config.json"
    if not beside.is_file():
        raise ValueError(
            f"{folder} is not a GPTQ checkpoint: config.json has no 'quantization_config' and "
            "there is no quantize_config.json"
        )
    return StoredConfig.from_dict(_read_json(beside), str(beside))


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    """Every tensor's file: by an index, or the one file called as any of the tools call it."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no 'weight_map'")
        for file in sorted(set(weight_map.values())):
            if not (folder / file).is_file():
                raise ValueError(f"{index.name} names {file}, which is not in {folder}")
            there = set(tensor_names(folder / file))
            absent = {name for name, place in weight_map.items() if place == file} - there
            if absent:
                raise ValueError(f"{index.name} has {min(absent)} in {file}, but it is not there")
        return {name: folder / file for name, file in weight_map.items()}
    files = sorted(folder.glob("model.safetensors")) or sorted(
        folder.glob("gptq_model-*.safetensors")
    )
    if len(files) != 1:
        raise ValueError(
            f"{folder} must have one model.safetensors or gptq_model-*.safetensors, or an index of "
            f"several; found {len(files)}"
        )
    return dict.fromkeys(tensor_names(files[0]), files[0])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content

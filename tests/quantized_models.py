"""Tiny quantized layers and models, and what they are in full precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from m7_gptq.checkpoint_format import QuantizedCheckpoint, StoredConfig
from m7_gptq.checkpoint_load import Quantized, open_checkpoint
from m7_gptq.checkpoint_save import save_quantized
from m7_gptq.gptq import QuantizeConfig, round_to_nearest
from m7_gptq.packing import PackedLinear, pack_linear
from m7_gptq.quant_linear import QuantLinear

NAME = "model.layers.0.self_attn.q_proj"


def save_random(
    folder: Path, model: str, change: Callable[[str, PackedLinear], PackedLinear] | None = None
) -> Path:
    """Write the folder of "random:tiny-llama-gptq" and the like; `change` edits a projection."""
    checkpoint = open_checkpoint(model)

    def linear(name: str) -> PackedLinear:
        packed = checkpoint.linear(name)
        return packed if change is None else change(name, packed)

    save_quantized(folder, checkpoint, checkpoint.quantization, linear)
    return folder


def save_rounded(folder: Path, preset: str, bits: int) -> Path:
    """Write a preset, rounded to nearest: asymmetric, groups of 32 inputs that act-order chose."""
    source, config = open_checkpoint(preset), QuantizeConfig(bits, 32, sym=False, desc_act=True)
    stored, weights = StoredConfig.of(config), dict(source.weights("cpu"))

    def linear(name: str) -> PackedLinear:
        weight = weights[f"{name}.weight"]
        g_idx = torch.arange(weight.shape[1]).flip(0) // 32
        it = round_to_nearest(weight, config, name, g_idx)
        parts = (it.codes, it.zeros, it.scales, it.g_idx)
        return pack_linear(*parts, bits=bits, checkpoint_format=stored.checkpoint_format)

    save_quantized(folder, source, stored, linear)
    return folder


def save_dequantized(folder: Path, quantized: Path | str) -> Path:
    """Write the same model in full precision: any milestone, and transformers, run it."""
    open_checkpoint(str(quantized)).save(folder)
    return folder


def own_order(name: str, linear: PackedLinear) -> PackedLinear:
    """Each projection with inputs in groups of its own choice, as if quantized by itself."""
    generator = torch.Generator().manual_seed(len(name) + sum(name.encode()))
    order = torch.randperm(len(linear.g_idx), generator=generator)
    return replace(linear, g_idx=linear.g_idx[order])


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of `NAME`, by kind; remove those given as None."""
    tensors = load_file(folder / "model.safetensors")
    for kind, tensor in changes.items():
        tensors.pop(f"{NAME}.{kind}", None)
        if tensor is not None:
            tensors[f"{NAME}.{kind}"] = tensor
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change what a folder says of its quantization."""
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text())
        content.get("quantization_config", content).update(changes)
        (folder / name).write_text(json.dumps(content))


def dequantize_in_place(folder: Path, *names: str) -> None:
    """Store some projections as if they had never been quantized."""
    checkpoint: Quantized = QuantizedCheckpoint("it", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        tensors[f"{name}.weight"] = checkpoint.linear(name).dequantize()
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{name}.{part}"]
    save_file(tensors, folder / "model.safetensors")


def add_biases(folder: Path) -> None:
    """Give every linear layer of a Llama a bias."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "attention_bias": True, "mlp_bias": True})
    )
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".scales")]:
        generator = torch.Generator().manual_seed(len(tensors))
        bias = torch.randn(tensors[name].shape[1], generator=generator)
        tensors[name.replace("scales", "bias")] = bias
    save_file(tensors, folder / "model.safetensors")


def as_auto_gptq_writes(folder: Path) -> None:
    """Lay a folder out anew by hand, nibble by nibble, as auto-gptq 0.7 has it.

    Its own file name, a bias of zeros for every linear layer, quantize_config.json only, and no
    word on the format, which is version 1: zero points less one.
    """
    checkpoint = QuantizedCheckpoint("it", folder)
    tensors = dict(checkpoint.others("cpu"))
    for name in checkpoint.linears:
        linear = checkpoint.linear(name)
        codes, zeros = linear.codes().tolist(), linear.zeros().tolist()
        tensors[f"{name}.qweight"] = torch.tensor(
            [[_word(column) for column in zip(*codes[row : row + 8], strict=True)]
             for row in range(0, len(codes), 8)],
            dtype=torch.int32,
        )  # fmt: skip
        tensors[f"{name}.qzeros"] = torch.tensor(
            [[_word([z - 1 for z in row[column : column + 8]]) for column in range(0, len(row), 8)]
             for row in zeros],
            dtype=torch.int32,
        )  # fmt: skip
        tensors[f"{name}.scales"] = linear.scales.half()
        tensors[f"{name}.g_idx"] = linear.g_idx.to(torch.int32)
        tensors.setdefault(f"{name}.bias", torch.zeros(linear.out_features).half())
    (folder / "model.safetensors").unlink()
    size = checkpoint.quantization.group_size
    save_file(tensors, folder / f"gptq_model-4bit-{size}g.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    described = {"bits": 4, "group_size": size, "desc_act": checkpoint.quantization.desc_act,
                 "sym": True, "damp_percent": 0.01, "true_sequential": True,
                 "model_name_or_path": None, "model_file_base_name": None}  # fmt: skip
    (folder / "quantize_config.json").write_text(json.dumps(described))


def _word(nibbles: list[int]) -> int:
    """Eight of them, least significant first, as a signed 32-bit number."""
    word = sum(nibble << (4 * place) for place, nibble in enumerate(nibbles))
    return word - (1 << 32) if word >= 1 << 31 else word


def random_linear(
    bits: int, outputs: int, g_idx: Tensor, seed: int, **options: Any
) -> PackedLinear:
    """A projection of random integers; options as of `pack_linear`."""
    generator = torch.Generator().manual_seed(seed)
    groups = int(g_idx.max()) + 1
    codes = torch.randint(0, 1 << bits, (outputs, len(g_idx)), generator=generator)
    zeros = torch.randint(1, 1 << bits, (outputs, groups), generator=generator)
    scales = torch.rand(outputs, groups, generator=generator) * 0.1 / (1 << bits)
    return pack_linear(codes, zeros, scales, g_idx, bits=bits, **options)


def loaded(
    shards: list[PackedLinear], dtype: torch.dtype = torch.float32, **options: Any
) -> QuantLinear:
    """A layer of these projections, ready to multiply."""
    linear = QuantLinear(
        shards[0].in_features,
        [shard.out_features for shard in shards],
        shards[0].bias is not None,
        name="it",
        dtype=dtype,
        device="cpu",
        bits=shards[0].bits,
        checkpoint_format=shards[0].checkpoint_format,
        **options,
    )
    for index, shard in enumerate(shards):
        for kind in linear.kinds:
            linear.load_shard(kind, index, getattr(shard, kind))
    linear.finish_loading()
    return linear


def product(x: Tensor, shards: list[PackedLinear]) -> Tensor:
    """By the dequantized weights."""
    return torch.cat([F.linear(x, shard.dequantize(), shard.bias) for shard in shards], dim=-1)


ORDERED = torch.arange(96) // 32
SHUFFLED, OTHER = (ORDERED[torch.randperm(96, generator=torch.Generator().manual_seed(s))]
                   for s in (1, 2))  # fmt: skip

"""GGUF files (llama.cpp's format) converted into a folder as Hugging Face has them.

    convert_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), folder)

The folder then holds config.json, generation_config.json, model.safetensors (float32, exactly the
values that the quantized blocks stand for) and the tokenizer. The format is described at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, its tensors' names and the permutation
of q and k by llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from common.config import ModelConfig
from common.gguf_tokenizer import build_tokenizer, end_token_ids
from common.safetensors_file import write_tensors

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in `path` into `folder`, which must exist.

    One tensor is in memory at a time. Raises ValueError for a file that is damaged, or whose
    architecture, tokenizer, quantization or rope scaling is not supported, and says which.
    """
    model = GGUFModel(path)
    config = model.config().to_dict()
    tokenizer = build_tokenizer(model.metadata)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder)
    specs = {name: (torch.float32, shape) for name, shape in model.shapes().items()}
    write_tensors(folder / "model.safetensors", specs, model.weights())


class GGUFModel:
    """A GGUF file: its metadata as a dict, its tensors under Hugging Face's names."""

    def __init__(self, path: Path) -> None:
        try:
            reader = gguf.GGUFReader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        # What the reader happens to stumble over in a file that is cut off or is something else.
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ValueError(f"{path} is not a complete GGUF file: {error}") from error
        self.path = path
        name = self.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise ValueError(
                f"{path}: GGUF architecture {name!r} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        self.architecture: str = name
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._rope_factors = tensors.pop(_ROPE_FACTORS, None)
        self._tensors = {self._hf_name(name): tensor for name, tensor in tensors.items()}

    def config(self) -> ModelConfig:
        """What the metadata says of the model, in config.json's words."""
        heads = self._require("attention.head_count")
        kv_heads = self._get("attention.head_count_kv", heads)
        if isinstance(heads, list) or isinstance(kv_heads, list):
            raise ValueError(f"{self.path}: head counts that differ by layer are not supported")
        if self._get("expert_count", 0):
            raise ValueError(f"{self.path}: mixtures of experts are not supported")
        if self._get("attention.sliding_window", 0):
            raise ValueError(f"{self.path}: sliding window attention is not supported")
        head_dim = self._get("attention.key_length", self._require("embedding_length") // heads)
        if self._get("rope.dimension_count", head_dim) != head_dim:
            raise ValueError(f"{self.path}: heads of which only a part is rotated: not supported")
        epsilon = np.float32(self._require("attention.layer_norm_rms_epsilon"))
        return ModelConfig.from_dict(
            {
                "architectures": [ARCHITECTURES[self.architecture]],
                "vocab_size": self.shapes()["model.embed_tokens.weight"][0],
                "hidden_size": self._require("embedding_length"),
                "intermediate_size": self._require("feed_forward_length"),
                "num_hidden_layers": self._require("block_count"),
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": head_dim,
                "rms_norm_eps": float(str(epsilon)),  # 1e-5, not the float32 nearest to it
                "max_position_embeddings": self._require("context_length"),
                "rope_parameters": self._rope_parameters(head_dim),
                "tie_word_embeddings": "lm_head.weight" not in self._tensors,
                "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
                "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self._tensors,
                "dtype": "float32",
                "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
                "eos_token_id": end_token_ids(self.metadata),
            }
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; GGUF writes them innermost first."""
        return {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, float32 tensor), dequantizing one at a time."""
        for name, tensor in self._tensors.items():
            try:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: {name} is quantized as {tensor.tensor_type.name}, which the "
                    "gguf package can't expand"
                ) from None
            if self.architecture == "llama":
                values = self._unpermuted(name, values)
            # copy: a view into the file's mapping would be read-only
            yield name, torch.from_numpy(np.array(values, dtype=np.float32))

    def _unpermuted(self, name: str, values: np.ndarray) -> np.ndarray:
        """Undo llama.cpp's order of q and k rows.

        It rotates neighbouring rows of a head (0,1), (2,3)…, Hugging Face rows half a head apart,
        so the converter interleaved each head's two halves. Only for `llama`: llama.cpp rotates
        qwen2 and qwen3 by halves too.
        """
        if ".q_proj." in name:
            heads = self._require("attention.head_count")
        elif ".k_proj." in name:
            heads = self._get("attention.head_count_kv", self._require("attention.head_count"))
        else:
            return values
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def _rope_parameters(self, head_dim: int) -> dict[str, Any]:
        theta = float(self._get("rope.freq_base", 10_000.0))
        if self._rope_factors is not None:
            factors = np.asarray(self._rope_factors.data, dtype=np.float32).reshape(-1)
            return llama3_parameters(factors, theta, head_dim)
        kind = self._get("rope.scaling.type", "none")
        factor = float(self._get("rope.scaling.factor", 1.0))
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            return {"rope_type": "default", "rope_theta": theta}
        parameters = {"rope_type": kind, "rope_theta": theta, "factor": factor}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = self._require(
                "rope.scaling.original_context_length"
            )
        elif kind != "linear":
            raise ValueError(f"{self.path}: rope scaling {kind!r} is not supported in GGUF files")
        return parameters

    def _hf_name(self, name: str) -> str:
        """model.layers.3.self_attn.q_proj.weight for blk.3.attn_q.weight."""
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if layer and layer[2] in _LAYER_NAMES:
            return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"
        if stem in _TOP_NAMES:
            return f"{_TOP_NAMES[stem]}.{kind}"
        raise ValueError(f"{self.path}: tensor {name!r} is not part of a {self.architecture} model")

    def _get(self, key: str, default: Any) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def _require(self, key: str) -> Any:
        try:
            return self.metadata[f"{self.architecture}.{key}"]
        except KeyError as error:
            raise ValueError(f"{self.path}: the metadata {error} is missing") from None


def llama3_parameters(factors: np.ndarray, theta: float, head_dim: int) -> Mapping[str, Any]:
    """The llama3 rope parameters behind the table of frequency divisors a GGUF file has instead.

    factors: [D / 2], 1 for short wavelengths, the scaling factor for long ones, between them a
    blend. All Llama 3 models share the limits of the blend, so only the factor is to be found.
    Raises ValueError for a table that no llama3 scaling gives.
    """
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"the GGUF file's {_ROPE_FACTORS} are not those of a llama3 rope scaling, "
            "the only one supported in this form"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }

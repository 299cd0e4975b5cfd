"""Models with random weights: tiny ones for tests, and real shapes for benchmarks.

    config = preset_config("qwen3-8b")
    for name, tensor in random_weights(config, seed=0, device="cpu"): ...

They read and write bytes (`Tokenizer.of_bytes`) and say nothing sensible, but their tokens depend
on all of the context: weights are scaled so that activations stay near one in every layer.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from common.config import ModelConfig

PREFIX = "random:"

_END_OF_TURN, _END_OF_TEXT = 258, 256  # of the byte tokenizer

_TINY = {
    "vocab_size": 320,  # beyond the tokenizer's 259, as real models are padded too
    "hidden_size": 64,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "dtype": "float32",
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "dtype": "bfloat16",
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny-llama": {
        **_TINY,
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "tiny-qwen2": {
        **_TINY,
        "architectures": ["Qwen2ForCausalLM"],
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    # Heads wider than the hidden size divided among them, as in every Qwen3 but the largest.
    "tiny-qwen3": {
        **_TINY,
        "architectures": ["Qwen3ForCausalLM"],
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}

_SMALL = 10_000_000
"""Parameters up to which weights are drawn on the CPU, so that every device gets the same."""


def preset_names() -> list[str]:
    """What `--model` accepts: "random:tiny-llama" and so on."""
    return [PREFIX + name for name in PRESETS]


def preset_config(name: str) -> ModelConfig:
    """The configuration of a preset, without the "random:". ValueError for an unknown one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3) or list(PRESETS)
        known = ", ".join(PREFIX + preset for preset in near)
        raise ValueError(f"there is no model {PREFIX + name!r}; did you mean {known}?")
    eos = {"eos_token_id": [_END_OF_TURN, _END_OF_TEXT]}
    return ModelConfig.from_dict({**PRESETS[name], **eos})


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and the shape of every weight of a model."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Projection: outputs, inputs, whether it has a bias.
    projections = {
        "self_attn.q_proj": (q, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        for name, (outputs, inputs, has_bias) in projections.items():
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def random_weights(
    config: ModelConfig,
    seed: int,
    device: torch.device | str,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Draw the weights of a model, all or those named, in the configuration's dtype on `device`.

    A tensor depends on `seed` and on its own name only. Small models are drawn on the CPU and
    moved, so they are the same everywhere; large ones differ between CPU and GPU.
    """
    dtype = getattr(torch, config.dtype)
    for name, shape in weight_shapes(config).items():
        if names is not None and name not in names:
            continue
        generator = random_generator(config, seed, name, device)
        tensor = torch.empty(shape, dtype=dtype, device=generator.device)
        if len(shape) == 2:
            tensor.normal_(0.0, shape[1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            tensor.normal_(0.0, 0.3, generator=generator)
        else:
            tensor.normal_(1.0, 0.1, generator=generator)
        yield name, tensor.to(device)


def random_generator(
    config: ModelConfig, seed: int, name: str, device: torch.device | str
) -> torch.Generator:
    """Draws what belongs to one weight: on the CPU for small models, else on `device`."""
    is_small = sum(config.num_parameters().values()) <= _SMALL
    generator = torch.Generator(torch.device("cpu" if is_small else device))
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
    return generator.manual_seed(int.from_bytes(digest, "little"))

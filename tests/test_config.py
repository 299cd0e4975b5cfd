"""Reading config.json, and what follows from it before any weight is read."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from common.config import ModelConfig, RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {
    **LLAMA,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

VARIANTS = {
    "llama": LLAMA,
    "llama with biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "llama without grouping": {**LLAMA, "num_key_value_heads": None},
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3 with biases": {**QWEN3, "attention_bias": True, "tie_word_embeddings": True},
}


def read(base: dict = LLAMA, **changes) -> ModelConfig:
    return ModelConfig.from_dict({**base, **changes})


def hf_config(config: dict) -> PreTrainedConfig:
    return AutoConfig.for_model(**deepcopy(config))  # which writes into what it is given


# Reading


def test_sizes_by_our_names():
    config = read()
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert config.head_dim == 8  # hidden_size / num_attention_heads
    assert (config.q_size, config.kv_size) == (32, 16)


def test_head_dim_of_its_own():
    assert read(QWEN3).q_size == 64 != read(QWEN3).hidden_size


@pytest.mark.parametrize("base", [LLAMA, QWEN2, QWEN3])
def test_what_is_left_out_is_filled_in_as_transformers_does(base):
    bare = {
        key: value for key, value in base.items() if key not in ("head_dim", "num_key_value_heads")
    }
    theirs = hf_config({**bare, "num_key_value_heads": None})
    ours = read(bare)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.rope == RopeConfig("default", theirs.rope_parameters["rope_theta"])
    assert ours.tie_word_embeddings is theirs.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("config", "biases"),
    [
        (LLAMA, (False, False, False)),
        ({**LLAMA, "attention_bias": True}, (True, True, False)),
        ({**LLAMA, "mlp_bias": True}, (False, False, True)),
        (QWEN2, (True, False, False)),
        ({**QWEN2, "attention_bias": False, "mlp_bias": True}, (True, False, False)),
        (QWEN3, (False, False, False)),
        ({**QWEN3, "attention_bias": True, "mlp_bias": True}, (True, True, False)),
    ],
)
def test_biases(config, biases):
    ours = ModelConfig.from_dict(config)
    assert (ours.qkv_bias, ours.o_bias, ours.mlp_bias) == biases


def test_only_qwen3_normalises_queries_and_keys():
    assert [read(base).qk_norm for base in (LLAMA, QWEN2, QWEN3)] == [False, False, True]


def test_architecture_from_model_type():
    assert read(architectures=None).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "float32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
    ],
)
def test_dtype(fields, name):
    assert read(**fields).dtype == name


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "expected"),
    [
        (None, None, ()),
        (7, None, (7,)),
        ([7, 8], None, (7, 8)),
        (7, 8, (7, 8)),
        (None, [8, 9], (8, 9)),
        ([7, 8], [8, 7, 9], (7, 8, 9)),
        (0, 0, (0,)),
    ],
)
def test_end_tokens_of_both_files(in_config, in_generation_config, expected):
    generation_config = {"eos_token_id": in_generation_config}
    config = ModelConfig.from_dict({**LLAMA, "eos_token_id": in_config}, generation_config)
    assert config.eos_token_ids == expected


# Rope


def test_rope_of_transformers_5_and_older_agree():
    newer = read(rope_parameters={**LLAMA3_ROPE, "rope_theta": 500_000.0})
    older = read(rope_scaling=LLAMA3_ROPE, rope_theta=500_000.0)
    assert newer.rope == older.rope
    assert (older.rope.rope_type, older.rope.theta) == ("llama3", 500_000.0)
    assert older.rope.params["factor"] == 8.0


def test_rope_type_by_its_oldest_name():
    assert read(rope_scaling={"type": "linear", "factor": 2.0}).rope.rope_type == "linear"


def test_rope_theta_alone():
    assert read(rope_theta=1e6, rope_scaling=None).rope == RopeConfig("default", 1e6)


@pytest.mark.parametrize(
    "where",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_original_length_is_looked_for_where_transformers_looks(where):
    theirs = hf_config({**LLAMA, **where})
    theirs.standardize_rope_params()  # once more, as its rotary embedding does
    name = "original_max_position_embeddings"
    assert read(**where).rope.params[name] == theirs.rope_parameters[name]


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, 64),
        ({"rope_type": "linear", "factor": 2.5}, 160),
        ({"rope_type": "dynamic", "factor": 4.0}, 256),
        (LLAMA3_ROPE, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}, 64),
    ],
)
def test_max_model_len(rope, expected):
    assert read(rope_scaling=rope).max_model_len == expected


# What is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": None, "model_type": "gpt2"}, ["gpt2", "LlamaForCausalLM"]),
        ({"architectures": None, "model_type": None}, ["architectures"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["longrope", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": None}}, ["factor", "None"]),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, ["factor", "'2'"]),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["low_freq_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["layer type"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"dtype": "float8_e4m3fn"}, ["float8_e4m3fn", "bfloat16"]),
        ({"hidden_size": 0}, ["hidden_size", "0"]),
        ({"vocab_size": "96"}, ["vocab_size", "'96'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "num_key_value_heads"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads"]),
        ({"hidden_size": 30}, ["head_dim", "hidden_size"]),
        ({"head_dim": 7}, ["head_dim", "even"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding window"]),
        (
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            ["sliding window"],
        ),
    ],
)
def test_refusals_say_what_is_wrong(changes, named):
    with pytest.raises(ValueError) as caught:
        read(**changes)
    for name in named:
        assert name in str(caught.value)


@pytest.mark.parametrize("name", [key for key in LLAMA if key[:4] not in ("arch", "mode")])
def test_a_missing_field_is_named(name):
    config = {key: value for key, value in LLAMA.items() if key != name}
    if name == "num_key_value_heads":
        assert ModelConfig.from_dict(config).num_kv_heads == 4
    else:
        with pytest.raises(ValueError, match=name):
            ModelConfig.from_dict(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 16},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ],
)
def test_a_window_that_no_layer_uses_is_fine(changes):
    read(QWEN2, **changes)


# Writing


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_written_config_reads_back(config):
    ours = ModelConfig.from_dict({**config, "eos_token_id": [3, 5], "dtype": "bfloat16"})
    assert ModelConfig.from_dict(ours.to_dict()) == ours


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_parameters_are_those_of_transformers_reading_what_we_write(config):
    ours = ModelConfig.from_dict(config)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(hf_config(ours.to_dict()))
    parts = ours.num_parameters()
    assert sum(parts.values()) == theirs.num_parameters()
    attention = theirs.model.layers[0].self_attn
    norms = [p for name, p in attention.named_parameters() if "norm" in name]
    of_one_layer = sum(p.numel() for p in attention.parameters()) - sum(p.numel() for p in norms)
    assert parts["attention"] == 2 * of_one_layer
    assert parts["embed"] == theirs.model.embed_tokens.weight.numel()


# Costs


def test_kv_bytes_per_token():
    assert read().kv_bytes_per_token(2) == 2 * 2 * 2 * 8 * 2  # k and v, layers, heads, size, bytes


def test_flops_of_one_token():
    config = read()
    weights = config.num_parameters()
    expected = 2 * (weights["attention"] + weights["mlp"] + weights["lm_head"])
    expected += 2 * config.num_layers * 2 * config.q_size * 10  # q·k and p·v with 10 tokens
    assert config.flops(num_tokens=1, context_len=10, logits=1) == expected


def test_flops_of_a_prompt_are_those_of_its_tokens():
    config = read()
    one_by_one = sum(config.flops(1, length, 0) for length in range(6, 11))
    assert config.flops(5, 10, 2) == one_by_one + 2 * 2 * 32 * 96

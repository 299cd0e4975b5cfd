"""GGUF files: tensors, configuration and tokenizer, and their one-time conversion."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantization
from tokenizers import Tokenizer as Backend

import common.gguf
from common.checkpoint import converted, load_model, open_checkpoint
from common.gguf import ARCHITECTURES, GGUFModel, convert_gguf, llama3_parameters
from common.gguf_tokenizer import build_tokenizer
from common.tokenizer import BYTE_OF_CHARACTER

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: rows i and i + D/2 of each head become neighbours."""
    order = []
    head_dim = len(rows) // heads
    for head in range(heads):
        for pair in range(head_dim // 2):
            order += [head * head_dim + pair, head * head_dim + pair + head_dim // 2]
    return rows[order]


def byte_vocabulary() -> list[str]:
    """256 bytes in order, "he" and "Ġhe", and three special tokens."""
    characters = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.__getitem__)
    return [*characters, "he", "Ġhe", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]


def write_gguf(
    path: Path,
    model: str = "random:tiny-llama",
    quantization: Quantization = Quantization.F32,
    change=None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    seed: int = 0,
) -> Path:
    """A random model as llama.cpp's converter writes it; `change(fields)` alters the metadata."""
    checkpoint = open_checkpoint(model, seed=seed)
    config = checkpoint.config
    name = {hf: short for short, hf in ARCHITECTURES.items()}[config.architecture]
    tokens = byte_vocabulary()
    u32, f32, string = "add_uint32", "add_float32", "add_string"
    fields = {
        f"{name}.block_count": (u32, config.num_layers),
        f"{name}.context_length": (u32, config.max_position_embeddings),
        f"{name}.embedding_length": (u32, config.hidden_size),
        f"{name}.feed_forward_length": (u32, config.intermediate_size),
        f"{name}.attention.head_count": (u32, config.num_heads),
        f"{name}.attention.head_count_kv": (u32, config.num_kv_heads),
        f"{name}.attention.key_length": (u32, config.head_dim),
        f"{name}.attention.layer_norm_rms_epsilon": (f32, config.rms_norm_eps),
        f"{name}.rope.freq_base": (f32, config.rope.theta),
        "tokenizer.ggml.model": (string, "gpt2"),
        "tokenizer.ggml.pre": (string, "smollm"),
        "tokenizer.ggml.tokens": ("add_array", tokens),
        "tokenizer.ggml.token_type": ("add_array", [1] * 258 + [3, 3, 3, 4]),
        "tokenizer.ggml.merges": ("add_array", ["h e", "Ġ he"]),
        "tokenizer.ggml.bos_token_id": (u32, 259),
        "tokenizer.ggml.eos_token_id": (u32, 258),
        "tokenizer.chat_template": (string, "{% for m in messages %}{{ m.content }}{% endfor %}"),
    }
    if change is not None:
        change(fields)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", (string, name))[1])
    for key, (method, value) in fields.items():
        getattr(writer, method)(key, value)
    for hf_name, tensor in checkpoint.weights("cpu"):
        values = tensor.numpy()
        if name == "llama" and ".q_proj." in hf_name:
            values = permuted(values, config.num_heads)
        if name == "llama" and ".k_proj." in hf_name:
            values = permuted(values, config.num_kv_heads)
        if values.ndim == 2 and quantization is not Quantization.F32:
            data = gguf.quants.quantize(values, quantization)
            writer.add_tensor(gguf_name(hf_name), data, raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name(hf_name), values)
    for tensor_name, values in (extra_tensors or {}).items():
        writer.add_tensor(tensor_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def setting(key: str, value, method: str = "add_uint32"):
    return lambda fields: fields.update({key: (method, value)})


def without(key: str):
    return lambda fields: fields.pop(key)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Conversions go into a folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FOLOVLLM_CACHE", str(folder))
    return folder


# Tensors


@pytest.mark.parametrize("model", ["random:tiny-llama", "random:tiny-qwen2", "random:tiny-qwen3"])
def test_float_weights_come_back_exactly(tmp_path, model):
    path = write_gguf(tmp_path / "model.gguf", model)
    checkpoint = open_checkpoint(str(path))
    weights = dict(checkpoint.weights("cpu"))
    expected = dict(open_checkpoint(model).weights("cpu"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    original = open_checkpoint(model).config.to_dict()
    read = checkpoint.config.to_dict()
    differing = {key for key in original if original[key] != read[key]}
    assert differing == {"bos_token_id", "eos_token_id"}
    load_model(checkpoint, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q5_1", 5e-2), ("Q4_1", 0.1), ("Q4_0", 0.15)],
)
def test_quantized_weights_are_the_values_of_their_blocks(tmp_path, quantization, tolerance):
    kind = Quantization[quantization]
    path = write_gguf(tmp_path / "model.gguf", quantization=kind)
    weights = dict(open_checkpoint(str(path)).weights("cpu"))
    original = dict(open_checkpoint("random:tiny-llama").weights("cpu"))
    for name, tensor in original.items():
        assert weights[name].dtype == torch.float32
        if tensor.ndim == 1:
            assert torch.equal(weights[name], tensor)
            continue
        # Rows are quantized each by itself, so their order does not matter here.
        block_values = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
        assert torch.equal(weights[name], torch.from_numpy(block_values))
        error = (weights[name] - tensor).abs().max() / tensor.abs().max()
        assert error < tolerance


# Configuration


def test_rope_scaling_of_the_metadata(tmp_path):
    def scaled(fields):
        fields["qwen2.rope.scaling.type"] = ("add_string", "yarn")
        fields["qwen2.rope.scaling.factor"] = ("add_float32", 4.0)
        fields["qwen2.rope.scaling.original_context_length"] = ("add_uint32", 2048)

    path = write_gguf(tmp_path / "yarn.gguf", "random:tiny-qwen2", change=scaled)
    rope = GGUFModel(path).config().rope
    assert (rope.rope_type, rope.params["factor"]) == ("yarn", 4.0)
    assert GGUFModel(path).config().max_model_len == 8192


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_in_its_table(tmp_path, factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, head_dim = 500_000.0, 128
    parameters = {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=4096, head_dim=head_dim, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(torch.arange(0, head_dim, 2) / head_dim)
    table = (plain / scaled).numpy().astype(np.float32)
    assert llama3_parameters(table, theta, head_dim) == pytest.approx(parameters)

    with pytest.raises(ValueError, match="rope_freqs"):
        llama3_parameters(table**2, theta, head_dim)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (setting("general.architecture", "gemma", "add_string"), "architecture 'gemma'"),
        (setting("tokenizer.ggml.model", "llama", "add_string"), "tokenizer 'llama'"),
        (setting("tokenizer.ggml.pre", "deepseek-r1", "add_string"), "'deepseek-r1'.*smollm"),
        (without("tokenizer.ggml.pre"), "pre-tokenizer None"),
        (without("tokenizer.ggml.merges"), "merges"),
        (without("llama.block_count"), "llama.block_count"),
        (setting("llama.rope.scaling.type", "longrope", "add_string"), "longrope"),
        (setting("llama.expert_count", 8), "experts"),
        (setting("llama.attention.sliding_window", 4096), "sliding window"),
        (setting("llama.rope.dimension_count", 8), "rotated"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, complaint):
    path = write_gguf(tmp_path / "model.gguf", change=change)
    with pytest.raises(ValueError, match=complaint):
        open_checkpoint(str(path))


def test_tensor_of_another_model_is_named(tmp_path):
    extra = {"blk.0.ffn_gate_exps.weight": np.zeros((4, 4), np.float32)}
    path = write_gguf(tmp_path / "model.gguf", extra_tensors=extra)
    with pytest.raises(ValueError, match="ffn_gate_exps"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.999])
def test_damaged_file(tmp_path, keep):
    path = write_gguf(tmp_path / "model.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=r"model\.gguf is not a complete GGUF file"):
        open_checkpoint(str(path))


def test_file_of_another_kind(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(ValueError, match="not a complete GGUF file"):
        open_checkpoint(str(path))


# Tokenizer


def tokenizer_metadata(**fields) -> dict:
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": byte_vocabulary(),
        "token_type": [1] * 258 + [3, 3, 3, 4],
        "merges": ["h e", "Ġ he"],
        "bos_token_id": 259,
        "eos_token_id": 258,
        **fields,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def splits(backend: Backend, text: str) -> list[str]:
    """The text's pieces before any merge."""
    return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["I", "'ve", " had", " ", "1", "2", "3", "4", " cats", ",", "\n", "\n", "ok"]),
        ("gpt-2", ["I", "'ve", " had", " 1234", " cats", ",", "\n", "\n", "ok"]),
        ("llama-bpe", ["I", "'ve", " had", " ", "123", "4", " cats", ",\n\n", "ok"]),
        ("qwen2", ["I", "'ve", " had", " ", "1", "2", "3", "4", " cats", ",\n\n", "ok"]),
    ],
)
def test_each_pre_tokenizer_splits_its_way(pre, pieces):
    tokenizer = build_tokenizer(tokenizer_metadata(pre=pre))
    assert splits(tokenizer.backend, "I've had 1234 cats,\n\nok") == pieces


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_tokens_of_the_metadata(pre):
    tokenizer = build_tokenizer(tokenizer_metadata(pre=pre, add_bos_token=False))
    assert tokenizer.encode("he he<|im_end|><tool>") == [256, 257, 260, 261]
    assert tokenizer.special_ids == {258, 259, 260}
    assert tokenizer.decode([256, 257, 260, 261]) == "he he<tool>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (259, 258)


def test_first_token_where_the_file_asks_for_it():
    assert build_tokenizer(tokenizer_metadata()).encode("he") == [256]
    with_bos = build_tokenizer(tokenizer_metadata(add_bos_token=True))
    assert with_bos.encode("he") == [259, 256]
    assert with_bos.encode("he", add_special_tokens=False) == [256]
    llama3 = build_tokenizer(tokenizer_metadata(pre="llama-bpe"))
    assert llama3.encode("he") == [259, 256]


def test_tokens_that_only_fill_up_the_vocabulary_have_no_text():
    tokens, types = [*byte_vocabulary(), "[PAD262]"], [1] * 258 + [3, 3, 3, 4, 5]
    tokenizer = build_tokenizer(tokenizer_metadata(tokens=tokens, token_type=types))
    assert tokenizer.decode([256, 262]) == "he"
    assert len(tokenizer.encode("[PAD262]")) == 8


def test_qwen2_composes_characters():
    tokenizer = build_tokenizer(tokenizer_metadata(pre="qwen2"))
    assert tokenizer.encode("a\u0300") == list("\u00e0".encode())


def test_llama3_takes_whole_words_of_the_vocabulary_first():
    tokens = byte_vocabulary()
    tokens[257] = "Ġhehe"  # which no merges lead to
    tokenizer = build_tokenizer(
        tokenizer_metadata(pre="llama-bpe", tokens=tokens, merges=["h e"], add_bos_token=False)
    )
    assert tokenizer.encode(" hehe") == [257]


def test_chat_turns_end_generation(tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config.eos_token_ids == (258, 260)  # the file's own, and <|im_end|>
    assert checkpoint.config.bos_token_id == 259
    assert checkpoint.tokenizer.has_chat_template


# Conversion


def unfinished(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.name.startswith(".")]


def test_converted_once_until_the_file_changes(tmp_path, cache, monkeypatch):
    conversions = []

    def counting(path, folder):
        conversions.append(path)
        convert_gguf(path, folder)

    monkeypatch.setattr(common.gguf, "convert_gguf", counting)
    path = write_gguf(tmp_path / "model.gguf")
    assert converted(path) == converted(path)
    assert len(conversions) == 1
    first = converted(path)
    write_gguf(path, seed=1)
    os.utime(path, (1, 1))
    assert converted(path) != first
    assert len(conversions) == 2
    assert unfinished(cache) == []


def test_failed_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    def failing(path, folder):
        convert_gguf(path, folder)
        raise KeyboardInterrupt

    path = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(common.gguf, "convert_gguf", failing)
    with pytest.raises(KeyboardInterrupt):
        converted(path)
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path / "file" / "cache"))
    path = write_gguf(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="FOLOVLLM_CACHE"):
        open_checkpoint(str(path))


def _convert_together(path: Path, barrier, results) -> None:
    """In a process of its own: convert, but finish only when all have got as far."""
    whole = common.gguf.convert_gguf

    def together(path: Path, folder: Path) -> None:
        whole(path, folder)
        barrier.wait(60)

    common.gguf.convert_gguf = together
    checkpoint = open_checkpoint(str(path))
    total = sum(tensor.double().sum().item() for _, tensor in checkpoint.weights("cpu"))
    results.put((str(checkpoint.folder), total))


def test_processes_that_convert_at_once_agree(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=_convert_together, args=(path, barrier, results)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    answers = {results.get(timeout=90) for _ in workers}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(answers) == 1
    assert [str(folder) for folder in cache.iterdir()] == [answers.pop()[0]]


def _convert_half(path: Path, reached) -> None:
    """In a process of its own: write a folder that looks good but is cut off, and hang."""
    whole = common.gguf.convert_gguf

    def half(path: Path, folder: Path) -> None:
        whole(path, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        reached.set()
        time.sleep(600)

    common.gguf.convert_gguf = half
    converted(path)


def test_killed_conversion_is_not_trusted_and_later_swept(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf")
    context = multiprocessing.get_context("spawn")
    reached = context.Event()
    worker = context.Process(target=_convert_half, args=(path, reached))
    worker.start()
    assert reached.wait(60)
    worker.kill()
    worker.join(60)
    (rest,) = unfinished(cache)

    checkpoint = open_checkpoint(str(path))
    load_model(checkpoint, dtype=torch.float32, device="cpu")
    assert rest.exists()  # it might be another process's that is still at work

    long_ago = time.time() - 7200
    for file in (*rest.iterdir(), rest):
        os.utime(file, (long_ago, long_ago))
    for file in checkpoint.folder.iterdir():
        file.unlink()
    checkpoint.folder.rmdir()
    open_checkpoint(str(path))
    assert unfinished(cache) == []

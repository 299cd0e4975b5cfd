"""The transformer against Hugging Face's of the same weights, and the parts it is made of."""

from __future__ import annotations

import weakref
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.config import ModelConfig
from common.layers import Linear, Ops
from common.model import Transformer

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
QWEN2 = {**TINY, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**TINY, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 20}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}

VARIANTS = {
    "llama": TINY,
    "llama tied": {**TINY, "tie_word_embeddings": True},
    "llama of one kv head": {**TINY, "num_key_value_heads": 1},
    "llama without grouping": {**TINY, "num_key_value_heads": 4},
    "llama with biases": {**TINY, "attention_bias": True, "mlp_bias": True},
    "llama with wide heads": {**TINY, "head_dim": 32},
    "llama with yarn": {**TINY, "rope_scaling": YARN},
    "qwen2": QWEN2,
    "qwen2 tied, grouped by 4": {**QWEN2, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3": QWEN3,
    "qwen3 tied, with biases": {**QWEN3, "tie_word_embeddings": True, "attention_bias": True},
}


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each row: [B, T, heads, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class AttendPacked:
    """Causal attention of [T, heads, D], each token within its own sequence."""

    def __init__(self, lengths: list[int]) -> None:
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self.mask = (sequence[:, None] == sequence).tril()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
        return out.transpose(0, 1)


class AttendCached:
    """Causal attention of [T, heads, D] to all tokens so far of one sequence."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for cache, new in ((self.keys, k), (self.values, v)):
            cache[layer] = torch.cat((cache[layer], new)) if layer in cache else new
        q, k, v = (x.transpose(0, 1) for x in (q, self.keys[layer], self.values[layer]))
        mask = torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]).bool()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(0, 1)


def hf_model(config: dict, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random weights, of which none is 0 or 1 as biases and norms are when new."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**deepcopy(config))).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            around = 1.0 if "norm" in name else 0.0
            parameter.normal_(around, 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
    return theirs.to(dtype)


def ours_of(theirs: PreTrainedModel, config: dict, **options) -> Transformer:
    dtype = theirs.dtype
    model = Transformer(ModelConfig.from_dict(config), dtype=dtype, device="cpu", **options)
    model.load_weights(theirs.state_dict().items())
    return model


def both(
    config: dict, dtype: torch.dtype = torch.float32, **options
) -> tuple[Transformer, PreTrainedModel]:
    theirs = hf_model(config, dtype)
    return ours_of(theirs, config, **options), theirs


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, TINY["vocab_size"], shape)


def logits_of(model: Transformer, ids: Tensor) -> Tensor:
    """ids [B, T] -> logits [B, T, V]."""
    return model.compute_logits(
        model(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), attend)
    )


# Logits


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_float32_logits(config):
    ours, theirs = both(config)
    ids = random_ids(2, 30)
    with torch.no_grad():
        expected = theirs(ids).logits
    logits = logits_of(ours, ids)
    assert logits.shape == (2, 30, 99)
    assert expected.abs().max() > 1  # or else the tolerance says nothing
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("config", [TINY, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_bfloat16_logits(config):
    ours, theirs = both(config, torch.bfloat16)
    ids = random_ids(2, 30)
    with torch.no_grad():
        expected, exact = theirs(ids).logits, theirs.float()(ids).logits
    logits = logits_of(ours, ids)
    assert logits.dtype == torch.bfloat16
    # As near to the exact result as theirs is, up to chance.
    assert (logits - exact).abs().mean() < 1.2 * (expected - exact).abs().mean()
    assert (logits - expected).abs().max() < 0.2


def test_float16_logits():
    ours, theirs = both(QWEN3, torch.float16)
    ids = random_ids(1, 20)
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(logits_of(ours, ids), expected, rtol=0, atol=3e-2)


@pytest.mark.parametrize("config", [TINY, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_packed_is_padded_without_the_padding(config):
    ours, _ = both(config)
    lengths = [7, 1, 12]
    ids = [random_ids(length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = ours(torch.cat(ids), positions, AttendPacked(lengths))
    assert hidden.shape == (20, 48)
    packed = ours.compute_logits(hidden).split(lengths)
    for one, its_ids in zip(packed, ids, strict=True):
        torch.testing.assert_close(one, logits_of(ours, its_ids[None])[0], rtol=1e-5, atol=1e-5)


def test_of_no_tokens():
    ours, _ = both(TINY)
    none = torch.empty(0, dtype=torch.int64)
    hidden = ours(none, none, lambda layer, q, k, v: q)
    assert ours.compute_logits(hidden).shape == (0, 99)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [TINY, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rope", [None, YARN, DYNAMIC], ids=["default", "yarn", "dynamic"])
def test_logits_on_the_gpu(config, rope, dtype):
    config = {**config, "rope_scaling": rope}
    theirs = hf_model(config)
    ours = Transformer(ModelConfig.from_dict(config), dtype=dtype, device="cuda")
    ours.load_weights(theirs.state_dict().items())
    ids = random_ids(2, 60)
    with torch.no_grad():
        expected = theirs(ids).logits
    logits = logits_of(ours, ids.cuda())
    assert logits.dtype == dtype and logits.is_cuda
    tolerance = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(logits.cpu().float(), expected, rtol=0, atol=tolerance)


# Decoding with a cache


def generate(model: Transformer, prompt: list[int], num_tokens: int) -> list[int]:
    attend_cached, tokens, new = AttendCached(), list(prompt), prompt
    for _ in range(num_tokens):
        positions = torch.arange(len(tokens) - len(new), len(tokens))
        rope_lens = (positions + 1).clamp(min=len(prompt))
        hidden = model(torch.tensor(new), positions, attend_cached, rope_lens)
        new = [int(model.compute_logits(hidden[-1]).argmax())]
        tokens += new
    return tokens[len(prompt) :]


@pytest.mark.parametrize("config", [TINY, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("rope", "prompt_len"),
    [(None, 5), (YARN, 5), (YARN, 90), *((DYNAMIC, length) for length in (5, 61, 64, 65, 90))],
)
def test_greedy_tokens_with_a_cache(config, rope, prompt_len):
    """64 positions are the original length of the dynamic type: some runs cross it."""
    ours, theirs = both({**config, "rope_scaling": rope}, max_positions=200)
    prompt = random_ids(1, prompt_len)
    with torch.no_grad():
        expected = theirs.generate(
            prompt, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(prompt)
        )
    assert generate(ours, prompt[0].tolist(), 20) == expected[0, prompt_len:].tolist()


def test_dynamic_rope_is_not_the_default_one():
    scaled, theirs = both({**TINY, "rope_scaling": DYNAMIC})
    plain = ours_of(theirs, TINY, max_positions=200)
    ids = random_ids(1, 90)
    lens = torch.full_like(ids, 90)
    positions = torch.arange(90)[None]
    assert torch.allclose(
        scaled(ids[:, :64], positions[:, :64], attend),
        plain(ids[:, :64], positions[:, :64], attend),
    )
    assert not torch.allclose(
        scaled(ids, positions, attend, lens), plain(ids, positions, attend), atol=1e-2
    )


# Loading


class CountingOps(Ops):
    calls = 0

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        self.calls += 1
        return super().silu_mul(gate_up)


def test_the_operations_can_be_exchanged():
    ops = CountingOps()
    ours, _ = both(TINY, ops=ops)
    logits_of(ours, random_ids(1, 3))
    assert ops.calls == TINY["num_hidden_layers"]


class HalvedLinear(nn.Module):
    """Keeps two halves of each weight, as tensors of kinds of its own."""

    kinds = ("first", "second")
    made: tuple[str, ...] = ()

    def __init__(self, in_features, shard_sizes, bias, *, name, dtype, device) -> None:
        super().__init__()
        self.shards = [{} for _ in shard_sizes]
        self.finished = False
        HalvedLinear.made += (name,)

    def load_shard(self, kind: str, index: int, tensor: Tensor) -> None:
        self.shards[index][kind] = tensor.clone()

    def finish_loading(self) -> None:
        self.finished = True

    def forward(self, x: Tensor) -> Tensor:
        assert self.finished
        weights = [torch.cat((shard["first"], shard["second"])) for shard in self.shards]
        return F.linear(x, torch.cat(weights))


def test_the_linear_layers_can_be_exchanged():
    plain, theirs = both(TINY)
    halved = []
    for name, tensor in theirs.state_dict().items():
        if "_proj" in name:
            stem, half = name.removesuffix("weight"), tensor.shape[0] // 2
            halved += [(stem + "first", tensor[:half]), (stem + "second", tensor[half:])]
        else:
            halved.append((name, tensor))
    config = ModelConfig.from_dict(TINY)
    ours = Transformer(config, dtype=torch.float32, device="cpu", linear=HalvedLinear)
    ours.load_weights(halved)
    assert "model.layers.2.self_attn.qkv_proj" in HalvedLinear.made
    ids = random_ids(1, 5)
    torch.testing.assert_close(logits_of(ours, ids), logits_of(plain, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_that_follow_from_others_are_passed_over(tied):
    theirs = hf_model({**TINY, "tie_word_embeddings": tied})
    weights = dict(theirs.state_dict())
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    weights.pop("lm_head.weight") if tied else None
    config = ModelConfig.from_dict({**TINY, "tie_word_embeddings": tied})
    ours = Transformer(config, dtype=torch.float32, device="cpu")
    ours.load_weights(weights.items())
    if tied:
        ours = Transformer(config, dtype=torch.float32, device="cpu")
        ours.load_weights([*weights.items(), ("lm_head.weight", torch.zeros(99, 48))])
    ids = random_ids(1, 4)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("model.norm.weight"), ["missing model.norm.weight", "unexpected none"]),
        (lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"), ["layers.1.self_attn.k_proj"]),
        (lambda w: w.pop("lm_head.weight"), ["missing lm_head.weight"]),
        (lambda w: w.update(odd=torch.zeros(1)), ["missing none", "unexpected odd", "LlamaFor"]),
        (
            lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(80)}),
            ["up_proj.bias"],
        ),
        (lambda w: w.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(1)}), ["layers.3"]),
        (lambda w: w.clear(), ["and 25 more"]),
        (
            lambda w: w.update({"model.layers.0.self_attn.v_proj.weight": torch.zeros(48, 48)}),
            ["model.layers.0.self_attn.v_proj.weight has shape [48, 48]", "[24, 48]"],
        ),
        (
            lambda w: w.update({"model.embed_tokens.weight": torch.zeros(98, 48)}),
            ["model.embed_tokens.weight has shape [98, 48]", "[99, 48]"],
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, named):
    weights = dict(hf_model(TINY).state_dict())
    change(weights)
    model = Transformer(ModelConfig.from_dict(TINY), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError) as caught:
        model.load_weights(weights.items())
    for text in named:
        assert text in str(caught.value)


def test_one_tensor_is_alive_at_a_time():
    theirs = hf_model(TINY)

    def lazily():
        previous = None
        for name, tensor in theirs.state_dict().items():
            assert previous is None or previous() is None
            item = (name, tensor.clone())
            previous = weakref.ref(item[1])
            yield item
            del item

    model = Transformer(ModelConfig.from_dict(TINY), dtype=torch.float32, device="cpu")
    model.load_weights(lazily())


def test_weights_are_cast_to_the_dtype_of_the_model():
    theirs = hf_model(TINY)
    model = Transformer(ModelConfig.from_dict(TINY), dtype=torch.bfloat16, device="cpu")
    model.load_weights(theirs.state_dict().items())
    ids = random_ids(1, 8)
    assert model.dtype == torch.bfloat16
    expected = logits_of(ours_of(theirs.bfloat16(), TINY), ids)
    assert torch.equal(logits_of(model, ids), expected)


# Parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_computes_the_same_in_its_own_layout(dtype, bias):
    torch.manual_seed(0)
    linear = Linear(40, [24, 7], bias, name="two", dtype=dtype, device="cpu")
    for index, size in enumerate((24, 7)):
        for kind in linear.kinds:
            tensor = torch.randn(size, 40) / 6 if kind == "weight" else torch.randn(size)
            linear.load_shard(kind, index, tensor.to(dtype))
    rows = torch.randn(65, 40).to(dtype)
    plain = linear(rows)
    linear.finish_loading()
    tolerance = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    for num_rows in (0, 1, 2, 8, 65):
        result = linear(rows[:num_rows])
        assert result.dtype == dtype and result.shape == (num_rows, 31)
        torch.testing.assert_close(result, plain[:num_rows], rtol=0, atol=tolerance)
    assert linear(rows.view(5, 13, 40)).shape == (5, 13, 31)
    strided = rows.t().contiguous().t()
    torch.testing.assert_close(linear(strided), plain, rtol=0, atol=tolerance)


def test_a_wrong_shard_is_refused():
    linear = Linear(40, [24, 7], False, name="two", dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"\[24, 40\].*\[7, 40\]"):
        linear.load_shard("weight", 1, torch.zeros(24, 40))


def test_operations_leave_their_arguments_alone():
    ops, q, k = Ops(), torch.randn(3, 4, 12), torch.randn(3, 2, 12)
    x, residual, weight = torch.randn(3, 48), torch.randn(3, 48), torch.rand(48)
    cos, sin, norm = torch.randn(3, 1, 12), torch.randn(3, 1, 12), torch.rand(12)
    arguments = (q, k, x, residual, weight, cos, sin, norm)
    before = [tensor.clone() for tensor in arguments]
    ops.rms_norm(x, weight, 1e-6)
    ops.add_rms_norm(x, residual, weight, 1e-6)
    ops.silu_mul(x)
    ops.qk_norm_rope(q, k, norm, norm, 1e-6, cos, sin)
    ops.qk_norm_rope(q, k, None, None, 1e-6, cos, sin)
    for tensor, copy in zip(arguments, before, strict=True):
        assert torch.equal(tensor, copy)


def test_flops_are_those_that_are_counted(monkeypatch):
    """A decode step, in the plain layout, whose products torch's counter knows."""
    monkeypatch.setattr(Linear, "finish_loading", lambda self: None)
    ours, _ = both(QWEN3)
    config, context_len = ours.config, 17
    kv = torch.randn(config.num_heads, context_len, config.head_dim)

    def attend_to_kv(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q.transpose(0, 1) @ kv.mT, dim=-1)
        return (weights @ kv).transpose(0, 1)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = ours(random_ids(1), torch.tensor([context_len - 1]), attend_to_kv)
        ours.compute_logits(hidden)
    assert counter.get_total_flops() == config.flops(1, context_len, logits=1)

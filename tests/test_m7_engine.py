"""m7 as an engine: quantized models say what the same models in full precision say."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from quantized_models import (
    NAME,
    OTHER,
    SHUFFLED,
    add_biases,
    as_auto_gptq_writes,
    dequantize_in_place,
    edit_config,
    edit_tensors,
    loaded,
    own_order,
    product,
    random_linear,
    save_dequantized,
    save_random,
    save_rounded,
)
from safetensors.torch import load_file, save_file
from support import (
    GREEDY,
    INTERPRETED,
    TINY_MODELS,
    assert_cache_is_empty,
    new_engine,
    new_llm,
    random_prompts,
    run_interpreted,
    run_to_end,
    small_cache,
    tokens,
)

from common.checkpoint import open_checkpoint as open_dense
from common.layers import Linear
from common.sampling_params import SamplingParams
from m7_gptq.checkpoint_format import StoredConfig
from m7_gptq.checkpoint_load import open_checkpoint, shard_names, stored_bytes
from m7_gptq.checkpoint_save import projections
from m7_gptq.packed_product import ProductMaker
from m7_gptq.packing import SUPPORTED_BITS
from m7_gptq.quant_linear import QuantLinear
from m7_gptq.random_checkpoint import fitting_group_size
from m7_gptq.run import describe_weights

M6, M7 = "m6_prefix", "m7_gptq"
FORMS = ("packed", "dequantized")
PROMPTS = random_prompts(1, (1, 5, 16, 17, 40, 70))
PARAMS = replace(GREEDY, max_tokens=12, ignore_eos=True)


# ---------------------------------------------------------------- models


def answers(llm, params=PARAMS) -> list[list[list[int]]]:
    return [tokens(output) for output in llm.generate(PROMPTS, params)]


def dense_answers(oracle, folder) -> list[list[list[int]]]:
    # Transformers stop at an end token and we do not: what it says up to there is compared.
    return [[oracle(folder).greedy(prompt, PARAMS.max_tokens)] for prompt in PROMPTS]


def assert_same(ours, theirs):
    for own, other in zip(ours, theirs, strict=True):
        assert other[0]
        assert own[0][: len(other[0])] == other[0]


@pytest.mark.parametrize("suffix", ["-gptq", "-gptq-act-order"])
@pytest.mark.parametrize("model", TINY_MODELS)
def test_tokens_are_those_of_the_dequantized_model_in_transformers(
    model, suffix, tmp_path, oracle
):
    folder = save_random(tmp_path / "quantized", model + suffix)
    expected = dense_answers(oracle, save_dequantized(tmp_path / "dense", folder))
    for form in FORMS:
        assert_same(answers(new_llm(M7, folder, weight_form=form)), expected)
        # What is in the folder is what the name means.
        assert_same(answers(new_llm(M7, model + suffix, weight_form=form)), expected)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_any_number_of_bits(bits, tmp_path):
    """Asymmetric, and with act-order."""
    folder = save_rounded(tmp_path / "it", "random:tiny-qwen3", bits)
    expected = answers(new_llm(M6, save_dequantized(tmp_path / "dense", folder)))
    for form in FORMS:
        assert answers(new_llm(M7, folder, weight_form=form)) == expected


def test_a_model_in_full_precision_is_that_of_m6():
    """With samples and log-probabilities."""
    params = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=8, logprobs=2)
    outputs = [
        llm.generate(PROMPTS, params)
        for llm in (new_llm(M6), new_llm(M7), new_llm(M7, weight_form="dequantized"))
    ]
    for first, second, third in zip(*outputs, strict=True):
        assert first.outputs == second.outputs == third.outputs
    assert new_llm(M7).stats()["linear_bytes"] == {}


def test_projections_that_were_quantized_each_by_itself(tmp_path, oracle):
    """q, k and v with inputs in orders of their own: three products, the same tokens."""
    folder = save_random(tmp_path / "it", "random:tiny-qwen2-gptq-act-order", own_order)
    expected = dense_answers(oracle, save_dequantized(tmp_path / "dense", folder))
    llm = new_llm(M7, folder, weight_form="packed")
    assert_same(answers(llm), expected)
    for layer in llm.engine.model.layers:
        assert layer.qkv_proj.num_products == 3
        assert layer.down_proj.num_products == 1


@pytest.mark.parametrize("model", [*TINY_MODELS, "with biases"])
def test_the_down_projection_needs_no_order(model, tmp_path, oracle):
    """Gate and up give their outputs in the order of its groups."""
    biases = model == "with biases"
    folder = save_random(tmp_path / "it", f"{TINY_MODELS[0] if biases else model}-gptq-act-order")
    if biases:
        add_biases(folder)
    expected = dense_answers(oracle, save_dequantized(tmp_path / "dense", folder))
    llm = new_llm(M7, folder, weight_form="packed")
    assert_same(answers(llm), expected)
    for layer in llm.engine.model.layers:
        has_order = [
            any(segment.order is not None for segment in module._segments)
            for module in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
        ]
        assert has_order == [True, True, True, False]


@pytest.mark.parametrize("form", FORMS)
def test_the_layout_of_auto_gptq(form, tmp_path):
    folder = save_random(tmp_path / "it", "random:tiny-llama-gptq-act-order")
    expected = answers(new_llm(M7, folder))
    as_auto_gptq_writes(folder)
    assert not (folder / "model.safetensors").exists()
    assert answers(new_llm(M7, folder, weight_form=form)) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "names",
    [
        (NAME,),  # one of three that share a module
        [f"model.layers.1.{part}_proj" for part in (
            "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up",
            "mlp.down")],
    ],
)  # fmt: skip
def test_some_projections_may_be_in_full_precision(form, names, tmp_path):
    folder = save_random(tmp_path / "it", "random:tiny-qwen3-gptq-act-order")
    before = new_llm(M7, folder, weight_form=form)
    expected = answers(before)
    dequantize_in_place(folder, *names)
    llm = new_llm(M7, folder, weight_form=form)
    assert answers(llm) == expected
    grown, was = (x.stats()["linear_bytes"] for x in (llm, before))
    assert grown["stored"] > was["stored"]
    assert grown["full"] == was["full"]
    is_packed = [
        isinstance(module, QuantLinear)
        for layer in llm.engine.model.layers
        for module in {module for _, module, _ in layer.shards()}
    ]
    assert sum(is_packed) == {"packed": 8 - len(set(map(module_of, names))), "dequantized": 0}[form]


def module_of(name: str) -> str:
    for module in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        joined = ".".join([*name.split(".")[:3], module])
        if name in shard_names(joined):
            return joined
    return name


def test_a_quantized_head(tmp_path):
    """gptqmodel can quantize the head too; it is dequantized, as it is no part of the factory."""
    folder = save_random(tmp_path / "it", "random:tiny-qwen3-gptq")
    tensors = load_file(folder / "model.safetensors")
    head = random_linear(4, len(tensors.pop("lm_head.weight")), torch.arange(64) // 32, 5)
    parts = StoredConfig(4, 32).specs(320, 64)
    tensors |= {f"lm_head.{part}": getattr(head, part).to(parts[part][0]) for part in parts}
    save_file(tensors, folder / "model.safetensors")
    expected = answers(new_llm(M6, save_dequantized(tmp_path / "dense", folder)))
    assert answers(new_llm(M7, folder, weight_form="packed")) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_activations(dtype):
    """The two forms round at other places: they agree where the choice is clear, at the start."""
    params = replace(PARAMS, max_tokens=1, logprobs=320)
    forms = [
        new_llm(M7, "random:tiny-llama-gptq", dtype=dtype, weight_form=form).generate(
            PROMPTS, params
        )
        for form in FORMS
    ]
    for packed, dense in zip(*forms, strict=True):
        (ours,), (theirs,) = packed.outputs[0].logprobs, dense.outputs[0].logprobs
        for token, entry in ours.items():
            assert entry.logprob == pytest.approx(theirs[token].logprob, abs=0.15)


# ---------------------------------------------------------------- in company

COMPANY = {
    "one after the other": {"max_num_seqs": 1},
    "few at once": {"max_num_seqs": 3},
    "chunks": {"max_num_batched_tokens": 9, "max_num_seqs": 8},
    "preemption": small_cache(M7, 96),
    "no overlap": {"overlap": False},
    "hashes": {"prefix_index": "hash", "block_size": 8},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", COMPANY)
def test_tokens_do_not_depend_on_the_company(form, name, quantized_answers):
    model = "random:tiny-qwen3-gptq-act-order"
    llm = new_llm(M7, model, weight_form=form, **COMPANY[name])
    assert answers(llm) == quantized_answers
    if name == "preemption":
        assert llm.stats()["num_preemptions"] > 0
    again = answers(llm)  # prompts and outputs are in the cache of prefixes now
    assert again == quantized_answers
    if name != "preemption":
        assert llm.stats()["prefix_cache"]["num_hit_tokens"] > 0
    assert_cache_is_empty(llm.engine)


@pytest.fixture(scope="module")
def quantized_answers():
    """Each prompt alone in an engine of its own."""
    model = "random:tiny-qwen3-gptq-act-order"
    return [
        tokens(new_llm(M7, model, weight_form="packed").generate(prompt, PARAMS)[0])
        for prompt in PROMPTS
    ]


def test_a_prompt_that_joins_late(quantized_answers):
    engine = new_engine(M7, "random:tiny-qwen3-gptq-act-order", weight_form="packed")
    for place, prompt in enumerate(PROMPTS):
        engine.add_request(str(place), prompt, PARAMS)
        engine.step()
    outputs = run_to_end(engine)
    assert [tokens(outputs[str(i)]) for i in range(len(PROMPTS))] == quantized_answers


@pytest.mark.skipif(not INTERPRETED, reason="run by test_in_interpreter")
class TestInterpreted:
    """The int4 kernels, in layers and in the engine; what they compute has tests of its own."""

    def test_few_rows_and_many(self, monkeypatch):
        """Many go through a room, which layers share: the smaller one first, then a larger."""
        from m7_gptq.int4_product import Int4Product
        from m7_gptq.kernels import int4_matmul

        dequantize, places = int4_matmul.dequantize_int4, []

        def spy(weights, out):
            places.append(out.data_ptr())
            return dequantize(weights, out=out)

        monkeypatch.setattr(int4_matmul, "dequantize_int4", spy)
        monkeypatch.setattr(int4_matmul, "uses_dequantize", lambda rows, *_: rows > 16)
        make_product = ProductMaker()
        layers = []
        for outputs in (32, 96):
            shards = [random_linear(4, outputs, order, outputs) for order in (SHUFFLED, OTHER)]
            layers.append((loaded(shards, make_product=make_product), shards))
        for rows in (2, 20):
            x = torch.randn(rows, 96)
            for linear, shards in layers:
                assert isinstance(linear._segments[0].product, Int4Product)
                torch.testing.assert_close(linear(x), product(x, shards), rtol=1e-4, atol=1e-4)
            # Each layer has two products: their inputs stand in orders of their own.
            assert len(places) == (0 if rows == 2 else 4)
        assert len(set(places)) == 1

    def test_beside_fused_operations(self):
        """Kernels for plain weights leave packed ones alone, with a single row too."""
        model = "random:tiny-qwen3-gptq-act-order"
        params = replace(GREEDY, max_tokens=1, logprobs=320)
        options = {"attention_backend": "flash", "ops": "fused", "dtype": "float16"}
        llm = new_llm(M7, model, weight_form="packed", **options)
        (output,) = llm.generate(PROMPTS[0], params)
        (expected,) = new_llm(M7, model, weight_form="dequantized").generate(PROMPTS[0], params)
        (ours,), (theirs,) = output.outputs[0].logprobs, expected.outputs[0].logprobs
        for token, entry in ours.items():
            assert entry.logprob == pytest.approx(theirs[token].logprob, abs=0.05)


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_in_interpreter():
    run_interpreted(__file__)


# ---------------------------------------------------------------- names and sizes


def test_hub_ids(tmp_path, monkeypatch):
    import huggingface_hub

    folder = save_random(tmp_path / "it", "random:tiny-llama-gptq")
    as_auto_gptq_writes(folder)
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda model, **options: asked.append((model, options)) or str(folder),
    )
    llm = new_llm(M7, "somebody/tiny-llama-GPTQ", weight_form="packed")
    (model, options), = asked  # fmt: skip
    assert model == "somebody/tiny-llama-GPTQ"
    assert "*.safetensors" in options["allow_patterns"]
    assert "*.json" in options["allow_patterns"]
    assert answers(llm) == answers(new_llm(M7, "random:tiny-llama-gptq"))


@pytest.mark.parametrize("model", TINY_MODELS)
def test_random_weights_repeat_and_leave_the_rest_alone(model):
    first, again, other = (
        dict(open_checkpoint(f"{model}-gptq", seed=seed).weights("cpu")) for seed in (3, 3, 4)
    )
    plain = open_dense(model, seed=3)
    expected = dict(plain.weights("cpu"))
    assert first.keys() == expected.keys()
    linears = projections(plain.config)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name.removesuffix(".weight") in linears:
            assert not torch.equal(tensor, other[name])
            assert not torch.equal(tensor, expected[name])
            assert float(tensor.std()) == pytest.approx(float(expected[name].std()), rel=0.1)
        else:
            assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("preset", "size"), [("tiny-qwen2", 32), ("qwen3-8b", 128), ("qwen3-0.6b", 128)]
)
def test_group_sizes_fit_all_layers(preset, size):
    config = open_dense(f"random:{preset}").config
    assert fitting_group_size(config) == size
    assert all(inputs % size == 0 for _, inputs in projections(config).values())


@pytest.mark.parametrize("preset", ["qwen3-8b", "qwen3-0.6b"])
def test_four_bits_are_a_quarter_and_what_scales_take(preset):
    shapes = projections(open_dense(f"random:{preset}").config).values()
    full = sum(2 * outputs * inputs for outputs, inputs in shapes)
    stored = sum(stored_bytes(StoredConfig(4, 128), *shape) for shape in shapes)
    per_weight = 4 + (16 + 4) / 128  # bits: a scale and a zero point for every 128
    assert stored == full * per_weight / 16
    assert stored < 0.3 * full


def test_bytes_of_the_linear_layers():
    packed, dense = (
        new_llm(M7, "random:tiny-llama-gptq", weight_form=form).stats()["linear_bytes"]
        for form in FORMS
    )
    outputs_by_inputs = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 160)
    assert packed["full"] == dense["full"] == dense["memory"] == 4 * outputs_by_inputs
    assert packed["stored"] == dense["stored"] == outputs_by_inputs * (4 + 20 / 32) / 8
    assert packed["stored"] < packed["memory"] < 0.3 * packed["full"]


def test_the_demonstration_says_what_to_do():
    text = describe_weights(new_engine(M7))
    for part in ("0.3 MB in float32", "--bits 4 --group-size 32", "m7_gptq.quantize"):
        assert part in text
    text = describe_weights(new_engine(M7, "random:tiny-llama-gptq"))
    assert "0.0 MB in the checkpoint, 0.3 MB in memory" in text


def test_plain_layers_are_plain():
    """Dequantized, each is the very class that m6 has, which the fused operations look for."""
    for layer in new_engine(M7, "random:tiny-llama-gptq").model.layers:
        assert {type(module) for _, module, _ in layer.shards()} == {Linear}


# ---------------------------------------------------------------- bad input


@pytest.fixture
def folder(tmp_path, pristine):
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("gptq") / "it", "random:tiny-llama-gptq")


DAMAGES = {
    "another method": (
        lambda folder: edit_config(folder, quant_method="awq"), "quantized by 'awq', not by GPTQ"
    ),
    "bits": (lambda folder: edit_config(folder, bits=5), "supported: 2, 3, 4, 8"),
    "group size": (lambda folder: edit_config(folder, group_size=64), "qzeros has shape"),
    "no order": (
        lambda folder: [edit_config(folder, desc_act=True), edit_tensors(folder, g_idx=None)],
        "g_idx is missing",
    ),
    "no scales": (lambda folder: edit_tensors(folder, scales=None), "scales is missing"),
    "no codes": (
        lambda folder: edit_tensors(folder, qweight=None), f"{NAME}"
    ),
    "shape": (
        lambda folder: edit_tensors(folder, qweight=torch.zeros(8, 96, dtype=torch.int32)),
        "qweight has shape [8, 96]",
    ),
    "NaN": (
        lambda folder: edit_tensors(folder, scales=torch.full((2, 64), torch.nan).half()), "NaN"
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "found 0"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_when_the_engine_starts(form, name, folder):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(ValueError) as raised:
        new_engine(M7, folder, weight_form=form)
    assert message in str(raised.value)


def test_the_command_line_says_it_in_a_line(folder, capsys):
    from common import cli
    from m7_gptq.config import EngineConfig
    from m7_gptq.engine import LLMEngine

    edit_config(folder, quant_method="awq")
    argv = ["--model", str(folder), "--device", "cpu", "--prompt", "Hi"]
    assert cli.main(LLMEngine, EngineConfig, None, "", argv) == cli.EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "by 'awq', not by GPTQ" in captured.err.replace("\n", " ")
    assert "Traceback" not in captured.err


def test_earlier_milestones_say_who_can(folder):
    with pytest.raises(ValueError, match="quantized: m7_gptq runs"):
        new_engine(M6, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_form": "int4"}, "unknown weight_form 'int4': use auto, packed, dequantized"),
        ({"weight_form": "packed"}, "random:tiny-llama is not quantized, so"),
        ({"model": "random:tiny-lama-gptq"}, "did you mean random:tiny-llama"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(ValueError, match=message):
        new_engine(M7, **options)

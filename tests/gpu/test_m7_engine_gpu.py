"""m7 on a GPU: packed weights in whole engines, by the int4 kernels and without."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from quantized_models import save_rounded
from support import assert_cache_is_empty, new_engine, new_llm, random_prompts, small_cache, tokens

from common.metrics import EngineStats
from common.presets import PRESETS
from common.sampling_params import SamplingParams
from m7_gptq.cuda_graphs import StepGraphs
from m7_gptq.int4_product import DequantizedRoom, Int4Product
from m7_gptq.kernels import int4_matmul, int4_wgmma
from m7_gptq.kernels.int4_layout import repack_int4
from m7_gptq.kernels.int4_matmul import dequantize_int4
from m7_gptq.kernels.prefill_plan import round_up
from m7_gptq.packed_product import UnpackingProduct
from m7_gptq.quant_linear import QuantLinear

pytestmark = pytest.mark.gpu

MILESTONE = "m7_gptq"
MODELS = [f"random:tiny-{name}-gptq{suffix}"
          for name in ("llama", "qwen2", "qwen3") for suffix in ("", "-act-order")]  # fmt: skip
PROMPTS = random_prompts(0, (30, 20, 40, 9, 64, 5, 33, 1))
PARAMS = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture
def without_wgmma(monkeypatch):
    """As on a GPU that is not Hopper's: many rows are Triton's, or multiplied by a weight made."""
    monkeypatch.setattr(int4_wgmma, "serves_all", lambda weights: False)


@pytest.fixture
def wide(monkeypatch):
    """A model with planes that Hopper's kernel serves, and the rows of all products it makes."""
    if reason := int4_wgmma.kernel.prepare(torch.device("cuda")):
        pytest.skip(reason)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    monkeypatch.setitem(PRESETS, "wide-qwen3", {**PRESETS["tiny-qwen3"], **sizes})
    multiply, rows = int4_wgmma.many_rows_linear, []

    def spy(x, *args, **options):
        rows.append(len(x))
        return multiply(x, *args, **options)

    monkeypatch.setattr(int4_wgmma, "many_rows_linear", spy)
    return "random:wide-qwen3-gptq", rows


def on_gpu(model, **options):
    return new_llm(MILESTONE, model, **{"device": "cuda", "max_num_seqs": 8, **options})


def answers(llm, params=PARAMS):
    return [tokens(output) for output in llm.generate(PROMPTS, params)]


def products(llm):
    """The classes of all products; every layer must be packed."""
    modules = {module for layer in llm.engine.model.layers for _, module, _ in layer.shards()}
    assert all(isinstance(module, QuantLinear) for module in modules)
    return {type(segment.product) for module in modules for segment in module._segments}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 20}, small_cache("m7", 160)]
)
def test_in_float32_tokens_are_those_of_the_cpu(model, options):
    """By unpacking: there are no int4 kernels for float32."""
    expected = answers(new_llm(MILESTONE, model))
    llm = on_gpu(model, dtype="float32", weight_form="packed", **options)
    assert products(llm) == {UnpackingProduct}
    assert answers(llm) == expected
    assert answers(llm) == expected  # from the cache of prefixes
    assert_cache_is_empty(llm.engine)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_in_cuda_graphs(bits, tmp_path):
    folder = save_rounded(tmp_path / "it", "random:tiny-qwen3", bits)
    expected = answers(new_llm(MILESTONE, folder))
    for form in ("packed", "auto"):
        assert answers(on_gpu(folder, dtype="float32", weight_form=form)) == expected


def check_logprobs(model, dtype):
    """Those of the kernels are near those of float32 on the CPU."""
    params = replace(PARAMS, max_tokens=1, logprobs=320)
    llm = on_gpu(model, dtype=dtype)
    assert products(llm) == {Int4Product}
    exact = new_llm(MILESTONE, model).generate(PROMPTS, params)
    for output, expected in zip(llm.generate(PROMPTS, params), exact, strict=True):
        (ours,), (theirs,) = output.outputs[0].logprobs, expected.outputs[0].logprobs
        errors = [abs(ours[token].logprob - theirs[token].logprob) for token in ours]
        assert sum(errors) / len(errors) < (0.05 if dtype == "bfloat16" else 0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", MODELS)
def test_the_kernels_in_an_engine(model, dtype):
    """They are what `auto` takes."""
    check_logprobs(model, dtype)


@pytest.mark.parametrize("model", MODELS)
def test_the_kernels_of_other_gpus_in_an_engine(model, without_wgmma):
    check_logprobs(model, "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("suffix", ["", "-act-order"])
def test_hoppers_kernel_in_an_engine(wide, suffix, dtype):
    model, rows = wide
    check_logprobs(model + suffix, dtype)
    assert round_up(sum(map(len, PROMPTS))) in rows  # all prompts in one step


def check_graphs(model, num_seqs):
    """Batches as large as their graphs, so that every product has the same shape in both."""
    prompts = random_prompts(1, (12,) * num_seqs)
    outputs = []
    for enforce_eager in (False, True):
        options = {"enforce_eager": enforce_eager, "max_num_seqs": num_seqs}
        llm = on_gpu(model, dtype="bfloat16", **options)
        outputs.append([tokens(output) for output in llm.generate(prompts, PARAMS)])
        assert (llm.stats()["num_graph_steps"] > 0) != enforce_eager
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("model", MODELS[1::2])
def test_graphs_replay_what_is_launched_without_them(model):
    check_graphs(model, num_seqs=4)


def test_graphs_replay_hoppers_kernel(wide):
    model, rows = wide
    check_graphs(model + "-act-order", num_seqs=32)
    assert {32, 12 * 32} <= set(rows)


def random_products(shapes):
    """Products that share a room, and what to multiply by instead."""
    generator = torch.Generator("cuda").manual_seed(0)
    room, products, weights = DequantizedRoom(), [], []
    for features, inputs in shapes:
        codes = torch.randint(16, (features, inputs), generator=generator, device="cuda")
        scales = torch.rand((features, inputs // 128), generator=generator, device="cuda")
        zeros = torch.full_like(scales, 8, dtype=torch.uint8)
        packed = repack_int4(codes, zeros, scales * inputs**-0.5 / 2, 128, torch.bfloat16)
        products.append(Int4Product(packed, room))
        weights.append(dequantize_int4(packed))
    return products, weights


def test_weights_made_ahead(without_wgmma):
    """By a second branch of a graph, each in time and none too early."""
    shapes = [(4096, 2048), (2048, 4096), (8192, 2048), (2048, 8192)]
    products, weights = random_products(shapes * 3)

    def chain(x):
        for product in products:
            x = product(x, None)
        return x

    def expected(x):
        for weight in weights:
            x = F.linear(x, weight)
        return x

    inputs = torch.randn((300, 2048), dtype=torch.bfloat16, device="cuda")
    assert torch.equal(chain(inputs), expected(inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = chain(inputs)
    for _ in range(20):
        inputs.copy_(torch.randn_like(inputs))
        graph.replay()
        assert torch.equal(output, expected(inputs))
        assert torch.equal(chain(inputs), output)


def test_a_capture_that_breaks_off_while_a_weight_is_made(without_wgmma):
    """It ends with its own error, and the next one begins anew."""
    products, weights = random_products([(1024, 1024)] * 4)
    graphs = StepGraphs(SimpleNamespace(version=0), EngineStats())
    x = torch.randn((300, 1024), dtype=torch.bfloat16, device="cuda")
    results = []

    def step(num_products):
        y = x
        for product in products[:num_products]:
            y = product(y, None)
        if num_products < len(products):
            raise torch.OutOfMemoryError("no room")
        results.append(y)

    step(4)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        graphs.capture("one", lambda: step(2))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    graphs.capture("one", lambda: step(4)).graph.replay()
    expected = x
    for weight in weights:
        expected = F.linear(expected, weight)
    assert torch.equal(results[0], expected)
    assert torch.equal(results[1], expected)


def test_many_rows_are_multiplied_in_full_precision(monkeypatch, without_wgmma):
    """Long prompts: dequantized, then cuBLAS; their decodes by the kernel again."""
    monkeypatch.setattr(int4_matmul, "uses_dequantize", lambda rows, *_: rows > 64)
    prompts = random_prompts(2, (700, 3))
    params = replace(PARAMS, max_tokens=4, logprobs=320)
    ours, theirs = (
        llm.generate(prompts, params)
        for llm in (on_gpu(MODELS[1], dtype="float16"), new_llm(MILESTONE, MODELS[1]))
    )
    for output, expected in zip(ours, theirs, strict=True):
        our_first, their_first = (x.outputs[0].logprobs[0] for x in (output, expected))
        for token, entry in our_first.items():
            assert entry.logprob == pytest.approx(their_first[token].logprob, abs=0.1)


def test_memory_is_that_of_four_bits():
    """Of a model with shapes that need no padding; embedding and head stay in 16 bits."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = new_engine(
        MILESTONE, "random:qwen3-0.6b-gptq", device="cuda", dtype="bfloat16", num_kv_blocks=8
    )
    sizes, config = engine.stats()["linear_bytes"], engine.model_config
    assert sizes["memory"] < 0.3 * sizes["full"]
    embedding = 2 * config.vocab_size * config.hidden_size
    scratch = 2 * 2 * config.intermediate_size * config.hidden_size
    rope_sampler_and_cache = 200 * 2**20
    taken = torch.cuda.memory_allocated() - before
    assert taken < sizes["memory"] + embedding + scratch + rope_sampler_and_cache

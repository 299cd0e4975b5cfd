"""m4 on a GPU: backends agree, CUDA graphs change no token, and long prompts fit."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from support import (
    GREEDY,
    MILESTONES,
    TINY_MODELS,
    assert_cache_is_empty,
    new_llm,
    random_prompts,
    run_to_end,
    small_cache,
    tokens,
)

from common.presets import preset_config
from common.sampling_params import SamplingParams
from m4_flash.attention import AttentionBatch
from m4_flash.backends import choose_backend

pytestmark = pytest.mark.gpu

# From m4 on there are graphs and backends.
LATER = tuple(name for name in MILESTONES if name >= "m4")
BACKENDS = ("torch", "paged", "flash") + (("flash_attn",) if find_spec("flash_attn") else ())
PROMPTS = random_prompts(0, (3, 40, 17, 64, 1, 25, 130, 16))
LONG_GREEDY = replace(GREEDY, max_tokens=40, ignore_eos=True)
MIXED = (
    SamplingParams(temperature=1.0, seed=1, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1.5, seed=2, top_k=30, max_tokens=25, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, top_p=0.8, min_p=0.01, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=4, repetition_penalty=1.3, frequency_penalty=0.5,
                   max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.0, logit_bias={7: 5.0}, min_tokens=5, max_tokens=12),
    SamplingParams(temperature=0.8, seed=5, logprobs=3, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=6, n=3, max_tokens=17, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
)  # fmt: skip


def generate(milestone, model, prompts=PROMPTS, params=LONG_GREEDY, **options):
    llm = new_llm(milestone, model, device="cuda", **options)
    outputs = [tokens(output) for output in llm.generate(prompts, params)]
    assert_cache_is_empty(llm.engine)
    return outputs, llm.stats()


@pytest.fixture(scope="module", params=TINY_MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def expected(model):
    llm = new_llm("m1_basic", model)
    return [tokens(output) for output in llm.generate(PROMPTS, LONG_GREEDY)]


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("ops", ["torch", "fused"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "flash_attn"])
@pytest.mark.parametrize("milestone", LATER)
def test_float32_tokens_are_those_of_the_cpu(milestone, model, backend, ops, eager, expected):
    outputs, stats = generate(
        milestone, model, attention_backend=backend, ops=ops, enforce_eager=eager
    )
    assert outputs == expected
    assert (stats["num_graph_steps"] > 30) == (not eager and backend != "torch")


@pytest.mark.parametrize("block_size", [8, 24, 256])
@pytest.mark.parametrize("milestone", LATER)
def test_any_block_size(milestone, model, block_size, expected):
    outputs, _ = generate(milestone, model, block_size=block_size)
    assert outputs == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("milestone", LATER)
def test_graphs_change_no_token_whatever_the_options(milestone, model, dtype):
    """Every sampling option in one batch that shrinks as they end; float32 also as on the CPU."""
    eager, _ = generate(milestone, model, params=MIXED, dtype=dtype, enforce_eager=True)
    graphs, stats = generate(milestone, model, params=MIXED, dtype=dtype)
    assert stats["num_graph_steps"] > 30
    if dtype == "float32":  # 16-bit products of other shapes round otherwise: graphs are padded
        assert graphs == eager
        alone = new_llm("m1_basic", model).generate(PROMPTS, MIXED)
        assert graphs == [tokens(output) for output in alone]
    assert [[len(t) for t in sample] for sample in graphs] == [
        [len(t) for t in sample] for sample in eager
    ]


@pytest.mark.parametrize("milestone", LATER)
def test_graphs_with_preemption_forks_and_aborts(milestone, model):
    prompts = random_prompts(1, (10, 12, 14, 15, 9, 11))
    params = SamplingParams(
        temperature=1.0, seed=3, n=2, max_tokens=30, ignore_eos=True, frequency_penalty=0.3
    )
    llm = new_llm(milestone, model, device="cuda", **small_cache(milestone, 160))
    for index, prompt in enumerate(prompts):
        llm.engine.add_request(str(index), prompt, params)
    for _ in range(7):
        llm.engine.step()
    llm.engine.abort_request("3")
    outputs = run_to_end(llm.engine)
    assert llm.stats()["num_preemptions"] > 0 and llm.stats()["num_graph_steps"] > 10
    assert_cache_is_empty(llm.engine)
    alone = new_llm("m1_basic", model)
    for index, prompt in enumerate(prompts):
        alone.engine.add_request(str(index), prompt, params)
    wanted = run_to_end(alone.engine)
    for index in (0, 1, 2, 4, 5):
        assert tokens(outputs[str(index)]) == tokens(wanted[str(index)]), index


@pytest.mark.parametrize("milestone", LATER)
def test_more_requests_than_rows_at_first(milestone, model):
    """The sampler's tables grow while graphs that read them exist."""
    llm = new_llm(milestone, model, device="cuda", max_num_seqs=2, **small_cache(milestone, 64))
    few = [tokens(o) for o in llm.generate(PROMPTS[:2], replace(GREEDY, max_tokens=20))]
    bias = dict.fromkeys(range(40), 1.0)
    params = SamplingParams(temperature=0.0, max_tokens=20, logit_bias=bias)
    biased = [tokens(o) for o in llm.generate([PROMPTS[0], PROMPTS[2]], params)]
    again = [tokens(o) for o in llm.generate(PROMPTS[:2], replace(GREEDY, max_tokens=20))]
    assert few == again
    alone = new_llm("m1_basic", model).generate([PROMPTS[0], PROMPTS[2]], params)
    assert biased == [tokens(output) for output in alone]


def make_batch(query_lens, cached_lens, block_size, num_blocks, device="cuda"):
    lens = [q + c for q, c in zip(query_lens, cached_lens, strict=True)]
    width = -(-max(lens) // block_size)
    ids = torch.randperm(num_blocks)[: len(lens) * width].view(len(lens), width)
    slots = [
        ids[i, p // block_size] * block_size + p % block_size
        for i, (q, c) in enumerate(zip(query_lens, cached_lens, strict=True))
        for p in range(c, c + q)
    ]
    return AttentionBatch(
        slot_mapping=torch.tensor(slots, device=device),
        block_tables=ids.int().to(device),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        query_lens=query_lens,
        cached_lens=cached_lens,
    )


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("query_lens", "cached_lens"),
    [
        ((5, 70, 1, 300), (0, 0, 0, 0)),
        ((5, 70, 1, 300), (100, 0, 33, 16)),
        ((1, 1, 1), (7, 600, 0)),  # as a decode step, too
    ],
)
def test_backends_give_one_result(query_lens, cached_lens, dtype, block_size):
    """The same batch, the same cache, unrotated or rotated queries: the same attention."""
    torch.manual_seed(0)
    config = preset_config("qwen3-0.6b")
    num_blocks = 4096 // block_size
    total, heads = sum(query_lens), (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    packed = torch.randn(total, sum(heads), config.head_dim, device="cuda").to(dtype)
    q, k, v = packed.split(heads, dim=1)
    batch = make_batch(query_lens, cached_lens, block_size, num_blocks)
    shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
    keys, values = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    results = {}
    for name in BACKENDS:
        if name == "flash_attn" and (dtype == torch.float32 or block_size != 256):
            continue
        backend = choose_backend(name, config, dtype, torch.device("cuda"), block_size)
        attend = backend(config, num_blocks, block_size, dtype=dtype, device=torch.device("cuda"))
        plans = ["prefill"] + (["decode"] if set(query_lens) == {1} else [])
        for plan in plans:
            attend.keys.copy_(keys)
            attend.values.copy_(values)
            if plan == "prefill":
                attend.plan_prefill(batch, lambda array: torch.from_numpy(array).cuda())
            else:
                attend.plan_decode(replace(batch, query_lens=(), cached_lens=()))
            results[name, plan] = attend(3, q, k, v).float()
    wanted = results.pop(("torch", "prefill"))
    for (name, plan), result in results.items():
        error = (result - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1.5e-2), (name, plan)


@pytest.mark.parametrize("milestone", LATER)
def test_a_long_prompt_takes_memory_in_proportion(milestone):
    """32,000 tokens: the scores alone would be 65 GB in float32; activations are what is left."""
    llm = new_llm(
        milestone, "random:qwen3-0.6b", device="cuda", dtype="bfloat16", max_model_len=33_000,
        num_kv_blocks=2100,
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = llm.generate([[5] * 32_000], replace(GREEDY, max_tokens=4))[0]
    assert output.outputs[0].finish_reason == "length"
    assert torch.cuda.max_memory_allocated() - before < 4 << 30


@pytest.mark.parametrize("milestone", LATER)
def test_a_capture_that_breaks_off_spoils_no_other(milestone):
    """Out of memory in the first of all captures, then once more beside one that is there."""
    engine = new_llm(milestone, device="cuda").engine
    graphs = engine.model_runner._decode_graphs._graphs
    x = torch.ones(8, device="cuda")

    def broken():
        x.mul(2)
        raise torch.OutOfMemoryError("no room")

    for key in ("first", "second"):
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            graphs.capture(key, broken)
        made = graphs.capture(key, lambda: x.add_(1))
        made.graph.replay()
    assert x.tolist() == [3.0] * 8

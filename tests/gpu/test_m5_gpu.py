"""m5 on a GPU: chunks beside decodes, steps that overlap, and mixed steps from CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import (
    TINY_MODELS,
    assert_cache_is_empty,
    new_engine,
    new_llm,
    random_prompts,
    run_to_end,
    small_cache,
    tokens,
)

from common.presets import preset_config
from common.sampling_params import SamplingParams
from m5_chunked.attention import AttentionBatch
from m5_chunked.backends import choose_backend
from m5_chunked.mixed_graphs import MixedGraphs

pytestmark = pytest.mark.gpu

MILESTONE = "m5_chunked"
PROMPTS = random_prompts(0, (30, 20, 40, 9, 64, 5, 33, 1, 50, 17))
FREE = SamplingParams(temperature=1.0, seed=1, max_tokens=24, ignore_eos=True)
GREEDY = replace(FREE, temperature=0.0)
MIXED = (
    FREE,
    replace(FREE, seed=2, temperature=1.5, top_k=30),
    replace(FREE, seed=3, top_p=0.8, min_p=0.01, max_tokens=12),
    replace(FREE, seed=4, repetition_penalty=1.3, frequency_penalty=0.5),
    replace(GREEDY, ignore_eos=False, logit_bias={7: 5.0}, min_tokens=5),
    replace(FREE, seed=5, logprobs=3, prompt_logprobs=2, max_tokens=9),
    replace(FREE, seed=6, n=3),
    replace(FREE, seed=7, stop_token_ids=list(range(60))),
    GREEDY,
    replace(FREE, seed=8, n=2, max_tokens=1),
)


@pytest.fixture(scope="module", params=TINY_MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def expected(model):
    """What each request says alone on the CPU, by the name of its parameters."""
    llm = new_llm("m1_basic", model)
    return {
        name: [tokens(output) for output in llm.generate(PROMPTS, params)]
        for name, params in (("greedy", GREEDY), ("mixed", list(MIXED)))
    }


@pytest.fixture
def replays(monkeypatch):
    """Of every step with chunks that may come from a graph, whether it did."""
    original, seen = MixedGraphs.run, []

    def run(self, arrays):
        sampled, replayed = original(self, arrays)
        seen.append(replayed)
        return sampled, replayed

    monkeypatch.setattr(MixedGraphs, "run", run)
    return seen


def new(model, **options):
    """Chunks of at most 40 tokens, beside up to 7 decodes."""
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "device": "cuda"}
    return new_engine(MILESTONE, model, **{**sizes, **options})


def arrive(engine, params):
    """Two requests every three steps, to the end."""
    outputs = {}
    for place, (prompt, own) in enumerate(zip(PROMPTS, params, strict=True)):
        engine.add_request(str(place), prompt, own)
        for _ in range(3 * (place % 2)):
            outputs.update((output.request_id, output) for output in engine.step())
    outputs.update(run_to_end(engine))
    assert_cache_is_empty(engine)
    return [tokens(outputs[str(place)]) for place in range(len(PROMPTS))]


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("backend", ["torch", "paged", "flash"])
def test_float32_tokens_are_those_of_the_cpu(
    model, backend, eager, overlap, expected, replays
):
    """The same work three times: what comes for the third time is replayed."""
    engine = new(
        model, attention_backend=backend, enforce_eager=eager, overlap=overlap
    )
    has_graphs = not eager and backend != "torch"
    for turn in range(3):
        replays.clear()
        before = engine.stats()
        assert arrive(engine, [GREEDY] * len(PROMPTS)) == expected["greedy"], turn
        after = engine.stats()
        steps, replayed = (after[n] - before[n] for n in ("num_steps", "num_graph_steps"))
        assert (replayed > 0) == has_graphs
    if has_graphs and backend == "flash":
        assert len(replays) > 5 and all(replays)
        assert replayed == steps
    else:
        assert not replays


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_preemption_and_every_sampling_option(model, eager, overlap, expected):
    engine = new(
        model, enforce_eager=eager, overlap=overlap, max_model_len=96,
        **small_cache(MILESTONE, 120),
    )  # fmt: skip
    for _ in range(2):
        assert arrive(engine, MIXED) == expected["mixed"]
    assert engine.stats()["num_preemptions"] > 0


@pytest.mark.parametrize("step", range(1, 12, 2))
def test_aborts_while_a_step_is_under_way(model, step, expected):
    """The others go on; the tokens of the aborted one's last step are nobody's."""
    engine = new(model, **small_cache(MILESTONE, 200), max_model_len=96)
    for place, prompt in enumerate(PROMPTS):
        engine.add_request(str(place), prompt, GREEDY)
    outputs = {}
    for _ in range(step):
        outputs.update((output.request_id, output) for output in engine.step())
    for place in (0, 2):
        aborted = tokens(engine.abort_request(str(place)))[0]
        assert aborted == expected["greedy"][place][0][: len(aborted)]
        outputs.pop(str(place), None)
    outputs.update(run_to_end(engine))
    assert_cache_is_empty(engine)
    assert {int(place): tokens(output) for place, output in outputs.items()} == {
        place: answer for place, answer in enumerate(expected["greedy"]) if place not in (0, 2)
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_request_ends_in_16_bits(model, dtype):
    """Products of other shapes round otherwise, so that tokens may differ; their number not."""
    engine = new(model, dtype=dtype)
    params = replace(GREEDY, max_tokens=10)
    answers = arrive(engine, [params] * len(PROMPTS))
    assert [len(answer[0]) for answer in answers] == [10] * len(PROMPTS)


def make_batch(cached_lens, query_lens, num_decodes, block_size, num_blocks):
    """Less than none cached: a decode that is padding, stored nowhere."""
    lens = [q + c for q, c in zip(query_lens, cached_lens, strict=True)]
    width = -(-max(lens) // block_size)
    ids = torch.randperm(num_blocks)[: len(lens) * width].view(len(lens), width)
    slots = [
        int(ids[i, p // block_size]) * block_size + p % block_size if c >= 0 else -1
        for i, (q, c) in enumerate(zip(query_lens, cached_lens, strict=True))
        for p in range(c, c + q)
    ]
    return AttentionBatch(
        slot_mapping=torch.tensor(slots, device="cuda"),
        block_tables=ids.int().to("cuda"),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device="cuda"),
        query_lens=query_lens,
        cached_lens=cached_lens,
        num_decodes=num_decodes,
    )


@pytest.mark.parametrize("block_size", [16, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("cached_lens", "query_lens", "num_decodes"),
    [
        ((7, 600, 33, 100, 0), (1, 1, 1, 70, 5), 3),
        ((900, 0), (1, 300), 1),
        ((0, 16, 200), (40, 1, 129), 0),
        ((250, 31, -1, -1, 64, 0), (1, 1, 1, 1, 200, 9), 4),
        ((50, 1, 2, 3), (1, 1, 1, 1), 2),  # chunks of a single token, too
    ],
)
def test_flash_computes_mixed_batches_as_torch_does(
    cached_lens, query_lens, num_decodes, dtype, block_size
):
    """Also with a plan that is rounded up, as for a graph; the same is in the cache after it."""
    torch.manual_seed(0)
    config = preset_config("qwen3-0.6b")
    num_blocks = 8192 // block_size
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    packed = torch.randn(sum(query_lens), sum(heads), config.head_dim, device="cuda").to(dtype)
    q, k, v = packed.split(heads, dim=1)
    batch = make_batch(cached_lens, query_lens, num_decodes, block_size, num_blocks)
    shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
    keys, values = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    used = torch.ones(sum(query_lens), dtype=torch.bool, device="cuda")
    used[:num_decodes] = batch.seq_lens[:num_decodes] > 0
    results = {}
    for name, padded in (("torch", False), ("flash", False), ("flash", True)):
        backend = choose_backend(name, config, dtype, torch.device("cuda"), block_size)
        attend = backend(config, num_blocks, block_size, dtype=dtype, device=torch.device("cuda"))
        attend.keys.copy_(keys)
        attend.values.copy_(values)
        attend.plan_prefill(batch, lambda array: torch.from_numpy(array).cuda(), padded=padded)
        if num_decodes:
            attend.plan_decode(batch)
        result = attend(3, q, k, v)
        assert result.isfinite().all()
        results[name, padded] = result[used].float(), attend.keys[3].clone(), attend.values[3]
    wanted, *caches = results.pop(("torch", False))
    for key, (result, *own_caches) in results.items():
        error = (result - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1.5e-2), key
        for cache, expected_cache in zip(own_caches, caches, strict=True):
            assert torch.equal(cache, expected_cache), key

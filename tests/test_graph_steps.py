"""Steps from graphs, on the CPU: replaying one runs the step that was captured once more.

All but CUDA is real: buckets, packed integers, padding, and which graph serves which step. As on a
GPU a step finds what it reads where it was when the step was captured, or its tokens are wrong.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from support import (
    GREEDY,
    INTERPRETED,
    MILESTONES,
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

from common.sampling import PADDING_ROW
from common.sampling_params import SamplingParams

pytest.importorskip("triton", reason="Triton is not installed")

GRAPHS = tuple(name for name in MILESTONES if name >= "m4")
CHUNKED = GRAPHS[1:]  # their steps mix decodes and chunks of prompts
KERNELS = GRAPHS[:2]  # those after them carry m5's kernels as they are
PROMPTS = random_prompts(0, (3, 40, 17, 64, 1, 25, 16))
LONG_GREEDY = replace(GREEDY, max_tokens=20, ignore_eos=True)
FREE = SamplingParams(temperature=1.0, max_tokens=15, ignore_eos=True)
MIXED = (
    replace(FREE, seed=1),
    replace(FREE, seed=2, temperature=1.5, top_k=30, max_tokens=12),
    replace(FREE, seed=3, top_p=0.8, min_p=0.01, max_tokens=10),
    replace(FREE, seed=4, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(temperature=0.0, logit_bias={7: 5.0}, min_tokens=5, max_tokens=9),
    replace(FREE, seed=5, logprobs=3, prompt_logprobs=1, max_tokens=7),
    replace(FREE, seed=6, n=3),
)


class Kept:
    """Of a milestone's ``StepGraphs``: keeps a step where a GPU would record what it launches."""

    def capture(self, key, step):
        captured = SimpleNamespace(sampled=None)
        version = self._sampler.version

        def replay():
            assert self._sampler.version == version, "it reads tables that have moved"
            captured.sampled = step()

        captured.graph = SimpleNamespace(replay=replay)
        self._captured[key] = captured
        self._stats.num_graphs_captured += 1
        return captured


class Event:
    def record(self): ...

    def synchronize(self): ...


def part(milestone, name):
    return importlib.import_module(f"{milestone}.{name}")


def keep_steps(milestone, monkeypatch):
    """Engines of a milestone have graphs on the CPU too."""
    runner = part(milestone, "model_runner").ModelRunner
    kept_steps = type("KeptSteps", (Kept, part(milestone, "cuda_graphs").StepGraphs), {})

    def make_runner(model, attention, sampler, graphs, stats, *sizes):
        return runner(model, attention, sampler, kept_steps(sampler, stats), stats, *sizes)

    attention = part(milestone, "backends.torch_sdpa").TorchAttention
    plan_decode = attention.plan_decode

    def plan_decode_again(self, batch, variant=None):
        # How many tokens each sequence has is data to a graph, but here the host looks at it.
        if batch.query_lens:
            lens = self._batch.query_lens, self._batch.cached_lens
            batch = replace(batch, query_lens=lens[0], cached_lens=lens[1])
        plan_decode(self, batch, variant)

    zeros = torch.zeros
    monkeypatch.setattr(part(milestone, "engine"), "ModelRunner", make_runner)
    monkeypatch.setattr(attention, "supports_graphs", True)
    monkeypatch.setattr(attention, "supports_prefill_graphs", True)
    monkeypatch.setattr(attention, "plan_decode", plan_decode_again)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory=0, **kw: zeros(*args, **kw))


@pytest.fixture(params=GRAPHS)
def milestone(request, monkeypatch):
    keep_steps(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=CHUNKED)
def chunked(request, monkeypatch):
    keep_steps(request.param, monkeypatch)
    return request.param


def small_steps(milestone, max_num_seqs):
    """Engine options that cut prompts in chunks, where a milestone does that."""
    options = {"max_num_seqs": max_num_seqs}
    return {**options, "max_num_batched_tokens": max_num_seqs + 20} if milestone > "m5" else options


def of_m1(prompts, params, model="random:tiny-llama"):
    return [tokens(output) for output in new_llm("m1_basic", model).generate(prompts, params)]


@pytest.mark.parametrize("max_num_seqs", [1, 5, 32])
@pytest.mark.parametrize("model", TINY_MODELS)
def test_greedy_tokens_are_those_of_m1(milestone, model, max_num_seqs):
    llm = new_llm(milestone, model, **small_steps(milestone, max_num_seqs))
    expected = of_m1(PROMPTS, LONG_GREEDY, model)
    for _ in range(3):  # the third time all prefills are replayed, too
        before = llm.stats()
        outputs = llm.generate(PROMPTS, LONG_GREEDY)
        assert [tokens(output) for output in outputs] == expected
    steps, replayed = (llm.stats()[n] - before[n] for n in ("num_steps", "num_graph_steps"))
    assert steps == replayed
    assert_cache_is_empty(llm.engine)


@pytest.mark.parametrize("block_size", [8, 24])
def test_every_sampling_option(milestone, block_size):
    """In a batch that shrinks; who wants the prompt's logprobs is computed without a graph."""
    llm = new_llm(milestone, block_size=block_size, **small_steps(milestone, 32))
    outputs = llm.generate(PROMPTS, MIXED)
    assert [tokens(output) for output in outputs] == of_m1(PROMPTS, MIXED)
    plain = new_llm("m1_basic").generate([PROMPTS[5]], [MIXED[5]])[0]
    assert_same_logprobs(outputs[5].outputs[0].logprobs, plain.outputs[0].logprobs)
    assert_same_logprobs(outputs[5].prompt_logprobs[1:], plain.prompt_logprobs[1:])
    assert llm.stats()["num_graph_steps"] > 10


def assert_same_logprobs(ours, expected):
    assert len(ours) == len(expected)
    for entries, wanted in zip(ours, expected, strict=True):
        assert list(entries) == list(wanted)
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(wanted[token].logprob, abs=1e-4)


@pytest.mark.parametrize("max_num_seqs", [6, 32])
def test_preemption_forks_and_aborts(milestone, max_num_seqs):
    prompts = random_prompts(1, (10, 12, 14, 15, 9, 11))
    params = replace(FREE, seed=3, n=2, max_tokens=30, frequency_penalty=0.3)
    sizes = small_cache(milestone, 160) | small_steps(milestone, max_num_seqs)
    engine = new_engine(milestone, **sizes)
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), prompt, params)
    for _ in range(7):
        engine.step()
    engine.abort_request("3")
    outputs = run_to_end(engine)
    stats = engine.stats()
    assert stats["num_preemptions"] > 0 and stats["num_graph_steps"] > 10
    assert_cache_is_empty(engine)
    expected = of_m1(prompts, params)
    assert {int(place): tokens(output) for place, output in outputs.items()} == {
        place: expected[place] for place in (0, 1, 2, 4, 5)
    }


@pytest.mark.parametrize("behind", [False, True], ids=["waiting", "known"])
def test_a_decode_step_that_breaks_off(milestone, behind, monkeypatch):
    """Ctrl-C while the host waits for tokens, or in m4 when it has them: nobody loses any."""
    engine = new_engine(milestone)
    for place, prompt in enumerate(PROMPTS):
        engine.add_request(str(place), prompt, LONG_GREEDY)
    for _ in range(4):
        engine.step()
    overlaps = milestone in CHUNKED
    waiting = (part(milestone, "model_runner").LaunchedStep if overlaps
               else part(milestone, "decode_graphs").DecodeGraphs)
    with monkeypatch.context() as patch:
        if behind and not overlaps:
            patch.setattr(engine.scheduler, "update", interrupt)
        else:
            patch.setattr(waiting, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    outputs = run_to_end(engine)
    assert [tokens(outputs[str(i)]) for i in range(len(PROMPTS))] == of_m1(PROMPTS, LONG_GREEDY)
    assert engine.stats()["num_graph_steps"] > 10
    assert_cache_is_empty(engine)


def interrupt(*_):
    raise KeyboardInterrupt


def test_graphs_are_void_when_what_they_read_has_moved(milestone):
    """The sampler's tables grow with biases and penalties while graphs that read them exist."""
    llm = new_llm(milestone, max_num_seqs=4)
    sampler = llm.engine.model_runner.sampler
    expected = of_m1(PROMPTS, LONG_GREEDY)
    assert [tokens(output) for output in llm.generate(PROMPTS, LONG_GREEDY)] == expected
    version = sampler.version
    biased = replace(LONG_GREEDY, logit_bias=dict.fromkeys(range(40), 1.0), presence_penalty=0.5)
    outputs = llm.generate(PROMPTS, biased)
    assert sampler.version > version
    assert [tokens(output) for output in outputs] == of_m1(PROMPTS, biased)
    assert [tokens(output) for output in llm.generate(PROMPTS, LONG_GREEDY)] == expected


def test_graphs_are_void_when_the_buffer_has_grown(milestone, monkeypatch):
    graphs = "mixed_graphs" if milestone in CHUNKED else "prefill_graphs"
    monkeypatch.setattr(part(milestone, graphs), "_BUFFER_BYTES", 512)
    llm = new_llm(milestone)
    lengths = [len(prompt) for prompt in PROMPTS]
    for turn, num_prompts in enumerate((1, 1, 1, len(lengths), 1, 1, 1)):
        prompts = random_prompts(turn, lengths[:num_prompts])
        outputs = llm.generate(prompts, GREEDY)
        assert [tokens(output) for output in outputs] == of_m1(prompts, GREEDY)


# ---------------------------------------------------------------- decodes and chunks in one step


@pytest.fixture
def shapes(chunked, monkeypatch):
    """(decodes, chunks) of every step that did not come from a decode graph."""
    arrays = part(chunked, "step_inputs").StepArrays
    original, seen = arrays.of, []

    def of(step, *args):
        seen.append((step.num_decodes, len(step.parts) - step.num_decodes))
        return original(step, *args)

    monkeypatch.setattr(arrays, "of", of)
    return seen


def arrive(engine, prompts, params):
    """Two requests every three steps, to the end; the last output of each."""
    outputs = {}
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), prompt, params)
        for _ in range(3 * (place % 2)):
            outputs.update((output.request_id, output) for output in engine.step())
    outputs.update(run_to_end(engine))
    return [tokens(outputs[str(place)]) for place in range(len(prompts))]


@pytest.mark.parametrize("model", TINY_MODELS)
@pytest.mark.parametrize("overlap", [True, False])
def test_mixed_steps_are_replayed(chunked, shapes, model, overlap):
    """Decodes before chunks of several prompts; a step ahead their tokens are in the pool."""
    params = replace(FREE, seed=1, max_tokens=12)
    engine = new_engine(
        chunked, model, max_num_seqs=9, max_num_batched_tokens=48, overlap=overlap
    )
    prompts = random_prompts(2, (30, 20, 40, 9, 64, 5, 33, 12, 50, 17))
    expected = of_m1(prompts, params, model)
    for _ in range(3):
        shapes.clear()
        before = engine.stats()
        assert arrive(engine, prompts, params) == expected
        assert any(decodes > 1 and chunks > 1 for decodes, chunks in shapes)
    after = engine.stats()
    steps, replayed = (after[n] - before[n] for n in ("num_steps", "num_graph_steps"))
    assert steps == replayed > len(shapes) > 0
    assert_cache_is_empty(engine)


def test_many_numbers_of_decodes_are_padded_to_few(chunked, shapes):
    """Up to 8 each has its own graph; 9 beside a chunk are padded to 10, and so on."""
    params = replace(FREE, seed=2, max_tokens=16)
    prompts = random_prompts(3, [24] * 20)
    llm = new_llm(chunked, max_num_batched_tokens=33)
    for _ in range(3):
        assert [tokens(output) for output in llm.generate(prompts, params)] == of_m1(
            prompts, params
        )
    assert {9, 11, 13} & {decodes for decodes, chunks in shapes if chunks}
    assert llm.stats()["num_graphs_captured"] < llm.stats()["num_graph_steps"] / 2


def test_block_tables_in_graphs_are_of_any_width(chunked):
    """A graph is captured with short sequences and replayed with the longest, also behind hits."""
    (base,) = random_prompts(8, [220])
    prompts = [base[:9], base, base[:8], base[:200], base[:130], base[:30]]
    llm = new_llm(
        chunked, block_size=8, max_model_len=240, max_num_seqs=4, max_num_batched_tokens=64
    )
    params = replace(FREE, seed=4, max_tokens=20)
    expected = of_m1(prompts, params)
    for _ in range(2):
        for prompt, tokens_of in zip(prompts, expected, strict=True):
            assert tokens(llm.generate([prompt], params)[0]) == tokens_of
        assert [tokens(output) for output in llm.generate(prompts, params)] == expected
    stats = llm.stats()
    assert stats["num_graph_steps"] > 0.8 * stats["num_steps"]
    assert (stats["prefix_cache"].get("num_hit_tokens", 0) > 0) is (chunked >= "m6")
    assert_cache_is_empty(llm.engine)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prompt_logprobs", [None, 2])
def test_the_last_chunk_may_be_a_single_token(chunked, n, prompt_logprobs):
    """It looks like a decode, but samples fork after it, and it is one of the prompt's tokens."""
    prompts = random_prompts(4, (21, 41, 6))
    params = replace(FREE, seed=3, n=n, max_tokens=6, prompt_logprobs=prompt_logprobs)
    llm = new_llm(chunked, max_num_seqs=8, max_num_batched_tokens=20)
    plain = new_llm("m1_basic")
    for prompt in prompts:
        ours, expected = (each.generate(prompt, params)[0] for each in (llm, plain))
        assert tokens(ours) == tokens(expected)
        if prompt_logprobs:
            assert_same_logprobs(ours.prompt_logprobs[1:], expected.prompt_logprobs[1:])
    assert llm.stats()["num_prompt_tokens"] == sum(map(len, prompts))
    assert_cache_is_empty(llm.engine)


def test_a_batch_that_stays_is_not_made_anew(chunked, monkeypatch):
    """Only a step later; one that changes is, whoever comes, goes or is computed in between."""
    runner = part(chunked, "model_runner").ModelRunner
    original, made = runner._new_batch, []

    def new_batch(self, step):
        made.append(step.requests)
        return original(self, step)

    monkeypatch.setattr(runner, "_new_batch", new_batch)
    prompts = random_prompts(5, (8, 6, 11))
    params = replace(FREE, seed=1, max_tokens=20)
    expected = of_m1(prompts, params)
    engine = new_engine(chunked)
    outputs = {}
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), prompt, replace(params, max_tokens=20 - 3 * place))
        for _ in range(5):
            outputs.update((output.request_id, output) for output in engine.step())
    outputs.update(run_to_end(engine))
    for place in range(3):
        assert tokens(outputs[str(place)])[0] == expected[place][0][: 20 - 3 * place]
    # Of one, two and three sequences; then again after each end but the last.
    assert [len(batch) for batch in made] == [1, 2, 3, 2, 1]
    assert engine.stats()["num_graph_steps"] > 15


def test_host_buffers_take_turns(chunked, monkeypatch):
    """The one before may still be on its way to the device."""
    graphs = part(chunked, "decode_graphs").DecodeGraphs
    original, used = graphs._send, []

    def send(self, *args):
        original(self, *args)
        used.append(self._on_host[0].data_ptr())

    monkeypatch.setattr(graphs, "_send", send)
    assert [tokens(o) for o in new_llm(chunked).generate(PROMPTS, GREEDY)] == of_m1(PROMPTS, GREEDY)
    assert len(used) > 5
    assert all(now != before for before, now in pairwise(used))
    assert set(used) == set(used[:2])


def test_an_unusable_token_in_the_pool_disturbs_nobody(chunked, monkeypatch):
    """A step ahead it is looked up before the host knows that its request has failed."""
    sampler = importlib.import_module("common.sampling").Sampler
    original, calls = sampler.sample, []

    def sample(self, logits, rows):
        calls.append(rows)
        poisoned = self._row_of.get("1#0", -1) == rows
        ruined = torch.where((poisoned & (len(calls) > 4))[:, None], torch.nan, logits)
        return original(self, ruined, rows)

    prompts = random_prompts(6, (9, 12, 30, 5))
    params = replace(FREE, seed=5)
    expected = of_m1(prompts, params)
    monkeypatch.setattr(sampler, "sample", sample)
    engine = new_engine(chunked, max_num_seqs=4, max_num_batched_tokens=16)
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), prompt, params)
    outputs = run_to_end(engine)
    failed = outputs.pop("1").outputs[0]
    assert failed.finish_reason == "error" and "NaN" in failed.stop_reason
    assert failed.token_ids == expected[1][0][: len(failed.token_ids)]
    assert {int(place): tokens(output) for place, output in outputs.items()} == {
        place: expected[place] for place in (0, 2, 3)
    }
    assert_cache_is_empty(engine)


# ---------------------------------------------------------------- kernels, interpreted


@pytest.mark.skipif(not INTERPRETED, reason="run by test_in_interpreter")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("num_seqs", [0, 1, 5, 8])
def test_unpacking_interpreted(name, num_seqs):
    """The first kernel of a decode graph does what its twin does, which runs in the tests above."""
    module = part(name, "kernels.decode_inputs")
    batch, max_blocks, width, block_size = 8, 12, 9, 8
    generator = torch.Generator().manual_seed(num_seqs)
    size = module.HEADER + module.COLUMNS * batch + num_seqs * width
    packed = torch.randint(1, width * block_size, (size,), generator=generator).int()
    packed[0], packed[1] = num_seqs, width
    pools = ()
    if name in CHUNKED:
        columns = packed[module.HEADER :][: module.COLUMNS * batch].view(module.COLUMNS, batch)
        columns[0, ::2] = -1  # of these the pool has the token, or none that is usable
        columns[2] = torch.randperm(8, generator=generator)
        pools = (torch.tensor([3, -1, 5, 300, -1, 7, 0, 11]),)
    ours, wanted = (
        module.DecodeInputs.allocate(batch, max_blocks, torch.device("cpu")) for _ in range(2)
    )
    constants = (
        batch, max_blocks, block_size, module.HEADER, module.COLUMNS, PADDING_ROW, 4
    )  # fmt: skip
    module.unpack_kernel[(batch, 1, 1)](packed, *pools, *vars(ours).values(), *constants)
    module.unpack_reference(packed, *pools, wanted, block_size)
    for field, tensor in vars(ours).items():
        assert torch.equal(tensor, getattr(wanted, field)), field
    assert (ours.input_ids >= 0).all()


@pytest.mark.skipif(not INTERPRETED, reason="run by test_in_interpreter")
@pytest.mark.parametrize("ops", ["torch", "fused"])
@pytest.mark.parametrize("from_graphs", [False, True])
@pytest.mark.parametrize("name", KERNELS[1:])
def test_flash_attention_of_mixed_steps_interpreted(name, from_graphs, ops, monkeypatch):
    """Decodes beside chunks, each by its kernel; a chunk goes on after what is cached of it."""
    if from_graphs:
        keep_steps(name, monkeypatch)
    arrays = part(name, "step_inputs").StepArrays
    original, seen = arrays.of, []

    def of(step, *args):
        made = original(step, *args)
        seen.append((step.num_decodes, made.cached_lens[step.num_decodes :]))
        return made

    monkeypatch.setattr(arrays, "of", of)
    prompts = random_prompts(7, (3, 13, 6, 5))
    params = replace(FREE, seed=1, max_tokens=5)
    engine = new_engine(
        name, "random:tiny-qwen3", attention_backend="flash", ops=ops, block_size=8,
        max_num_seqs=4, max_num_batched_tokens=11,
    )  # fmt: skip
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), prompt, params)
    outputs = run_to_end(engine)
    expected = of_m1(prompts, params, "random:tiny-qwen3")
    assert [tokens(outputs[str(place)]) for place in range(len(prompts))] == expected
    assert any(decodes and any(cached) for decodes, cached in seen)
    assert any(decodes and len(cached) > 1 for decodes, cached in seen)


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_in_interpreter():
    run_interpreted(__file__)

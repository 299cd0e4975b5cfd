"""m4's steps from graphs, on the CPU: replaying one runs the step that was captured once more.

All but CUDA is real: buckets, packed integers, padding, and which graph serves which step. As on a
GPU a step finds what it reads where it was when the step was captured, or its tokens are wrong.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
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

from common.sampling import PADDING_ROW
from common.sampling_params import SamplingParams

pytest.importorskip("triton", reason="Triton is not installed")
from m4_flash import prefill_graphs
from m4_flash.backends.torch_sdpa import TorchAttention
from m4_flash.cuda_graphs import StepGraphs
from m4_flash.kernels.decode_inputs import (
    COLUMNS,
    HEADER,
    DecodeInputs,
    unpack_kernel,
    unpack_reference,
)
from m4_flash.model_runner import ModelRunner

MILESTONE = "m4_flash"
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


class KeptSteps(StepGraphs):
    """Keeps a step where a GPU would record what it launches."""

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


@pytest.fixture(autouse=True)
def steps_from_graphs(monkeypatch):
    """Engines of m4 have graphs on the CPU too."""

    def make_runner(model, attention, sampler, graphs, stats, *sizes):
        return ModelRunner(model, attention, sampler, KeptSteps(sampler, stats), stats, *sizes)

    class Event:
        def record(self): ...

        def synchronize(self): ...

    zeros = torch.zeros
    engine = importlib.import_module(f"{MILESTONE}.engine")
    monkeypatch.setattr(engine, "ModelRunner", make_runner)
    monkeypatch.setattr(TorchAttention, "supports_graphs", True)
    monkeypatch.setattr(TorchAttention, "supports_prefill_graphs", True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory=0, **kw: zeros(*args, **kw))


def of_m1(prompts, params, model="random:tiny-llama"):
    return [tokens(output) for output in new_llm("m1_basic", model).generate(prompts, params)]


@pytest.mark.parametrize("max_num_seqs", [1, 5, 32])
@pytest.mark.parametrize("model", TINY_MODELS)
def test_greedy_tokens_are_those_of_m1(model, max_num_seqs):
    llm = new_llm(MILESTONE, model, max_num_seqs=max_num_seqs)
    expected = of_m1(PROMPTS, LONG_GREEDY, model)
    for _ in range(3):  # the third time all prefills are replayed, too
        before = llm.stats()
        outputs = llm.generate(PROMPTS, LONG_GREEDY)
        assert [tokens(output) for output in outputs] == expected
    steps, replayed = (llm.stats()[n] - before[n] for n in ("num_steps", "num_graph_steps"))
    assert steps == replayed
    assert_cache_is_empty(llm.engine)


@pytest.mark.parametrize("block_size", [8, 24])
def test_every_sampling_option(block_size):
    """In a batch that shrinks; who wants the prompt's logprobs is computed without a graph."""
    llm = new_llm(MILESTONE, block_size=block_size)
    outputs = llm.generate(PROMPTS, MIXED)
    assert [tokens(output) for output in outputs] == of_m1(PROMPTS, MIXED)
    plain = new_llm("m1_basic").generate([PROMPTS[5]], [MIXED[5]])[0]
    assert len(outputs[5].outputs[0].logprobs) == len(plain.outputs[0].logprobs)
    for entries, wanted in zip(
        outputs[5].outputs[0].logprobs, plain.outputs[0].logprobs, strict=True
    ):
        assert list(entries) == list(wanted)
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(wanted[token].logprob, abs=1e-4)
    assert llm.stats()["num_graph_steps"] > 10


def test_preemption_forks_and_aborts():
    prompts = random_prompts(1, (10, 12, 14, 15, 9, 11))
    params = replace(FREE, seed=3, n=2, max_tokens=30, frequency_penalty=0.3)
    engine = new_engine(MILESTONE, **small_cache(MILESTONE, 160))
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


def test_graphs_are_void_when_what_they_read_has_moved():
    """The sampler's tables grow with biases and penalties while graphs that read them exist."""
    llm = new_llm(MILESTONE, max_num_seqs=4)
    sampler = llm.engine.model_runner.sampler
    expected = of_m1(PROMPTS, LONG_GREEDY)
    assert [tokens(output) for output in llm.generate(PROMPTS, LONG_GREEDY)] == expected
    version = sampler.version
    biased = replace(LONG_GREEDY, logit_bias=dict.fromkeys(range(40), 1.0), presence_penalty=0.5)
    outputs = llm.generate(PROMPTS, biased)
    assert sampler.version > version
    assert [tokens(output) for output in outputs] == of_m1(PROMPTS, biased)
    assert [tokens(output) for output in llm.generate(PROMPTS, LONG_GREEDY)] == expected


def test_graphs_are_void_when_the_buffer_has_grown(monkeypatch):
    monkeypatch.setattr(prefill_graphs, "_BUFFER_BYTES", 512)
    llm = new_llm(MILESTONE)
    lengths = [len(prompt) for prompt in PROMPTS]
    for turn, num_prompts in enumerate((1, 1, 1, len(lengths), 1, 1, 1)):
        prompts = random_prompts(turn, lengths[:num_prompts])
        outputs = llm.generate(prompts, GREEDY)
        assert [tokens(output) for output in outputs] == of_m1(prompts, GREEDY)


@pytest.mark.skipif(not INTERPRETED, reason="run by test_in_interpreter")
@pytest.mark.parametrize("num_seqs", [0, 1, 5, 8])
def test_unpacking_interpreted(num_seqs):
    """The first kernel of a decode graph does what its twin does, which runs in the tests above."""
    batch, max_blocks, width, block_size = 8, 12, 9, 8
    generator = torch.Generator().manual_seed(num_seqs)
    size = HEADER + COLUMNS * batch + num_seqs * width
    packed = torch.randint(1, width * block_size, (size,), generator=generator).int()
    packed[0], packed[1] = num_seqs, width
    ours, wanted = (
        DecodeInputs.allocate(batch, max_blocks, torch.device("cpu")) for _ in range(2)
    )
    constants = (batch, max_blocks, block_size, HEADER, COLUMNS, PADDING_ROW, 4)
    unpack_kernel[(batch, 1, 1)](packed, *vars(ours).values(), *constants)
    unpack_reference(packed, wanted, block_size)
    for name, tensor in vars(ours).items():
        assert torch.equal(tensor, getattr(wanted, name)), name


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_in_interpreter():
    run_interpreted(__file__)

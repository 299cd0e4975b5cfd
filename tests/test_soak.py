"""Ten thousand requests of every kind, in a cache that is much too small for them.

They arrive at random, some urgent, some aborted; chunks, hits, copies, preemptions, samples, stop
strings and penalties meet in every combination, and steps overlap. Whoever is served says what m1
says of the request alone. In the end nobody is missing, every block is free, and the counters agree
with what was seen from outside.

``SOAK_REQUESTS`` in the environment says how many requests come.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from support import GREEDY, assert_cache_is_empty, new_engine, new_llm, random_prompts

from common.outputs import RequestOutput
from common.sampling_params import SamplingParams

NUM_REQUESTS = int(os.environ.get("SOAK_REQUESTS", "10000"))
LONGEST = 64  # tokens of prompt and output together
NUM_BLOCKS, SIZE = 40, 8
LETTERS = dict.fromkeys(range(ord("a"), ord("h")), 6.0)  # a bias towards readable text


@dataclass(frozen=True)
class Ask:
    """What a user may want, and what the answer is."""

    prompt: list[int]
    params: SamplingParams
    expected: RequestOutput


@cache
def questions(count: int = 150) -> list[Ask]:
    rng = random.Random(0)
    bases = random_prompts(1, [44] * 4)
    llm = new_llm("m1_basic", max_model_len=LONGEST)
    asks = []
    for place in range(count):
        own = random_prompts(100 + place % 7, [rng.randint(1, 10)])[0]
        prompt = rng.choice(bases)[: rng.randint(0, 44)] + own
        params = random_params(rng, LONGEST - len(prompt))
        asks.append(Ask(prompt, params, llm.generate(prompt, params)[0]))
    return asks


def random_params(rng: random.Random, room: int) -> SamplingParams:
    params = replace(
        GREEDY,
        max_tokens=rng.randint(1, min(10, room)),
        ignore_eos=rng.random() < 0.5,
        n=rng.choice((1, 1, 1, 1, 2, 3)),
        prompt_logprobs=rng.choice((None,) * 9 + (1,)),
    )
    if rng.random() < 0.6:
        params = replace(params, temperature=1.0, seed=rng.randrange(2**40), top_k=50)
    if rng.random() < 0.4:
        stops = ["".join(rng.choices("abcdefg", k=rng.randint(1, 2))) for _ in range(3)]
        params = replace(params, stop=stops, logit_bias=LETTERS)
    if rng.random() < 0.2:
        params = replace(params, stop_token_ids=rng.sample(range(256), 20))
    if rng.random() < 0.2:
        params = replace(params, repetition_penalty=1.2, frequency_penalty=0.3)
    return params


class Soak:
    """An engine under random traffic, and all that its users see."""

    def __init__(self, seed: int, **options: Any) -> None:
        self.rng = random.Random(seed)
        self.engine = new_engine(
            "m6_prefix", block_size=SIZE, num_kv_blocks=NUM_BLOCKS, max_model_len=LONGEST,
            max_num_seqs=24, max_num_batched_tokens=100, **options,
        )  # fmt: skip
        self.waiting_for: dict[str, Ask] = {}
        self.ends: Counter[str] = Counter()  # samples by what ended them
        self.num_tokens = 0  # that users got

    def run(self, num_requests: int) -> None:
        rng, num_come = self.rng, 0
        while num_come < num_requests or self.waiting_for:
            while num_come < num_requests and len(self.waiting_for) < 60 and rng.random() < 0.9:
                ask, priority = rng.choice(questions()), rng.choice((0, 0, 0, 0, -1, 1))
                self.engine.add_request(str(num_come), ask.prompt, ask.params, priority)
                self.waiting_for[str(num_come)] = ask
                num_come += 1
            outputs = self.engine.step()
            if self.waiting_for and rng.random() < 0.1:
                # Some have ended in this very step: their outputs are here, and None comes back.
                aborted = self.engine.abort_request(rng.choice(list(self.waiting_for)))
                outputs += [] if aborted is None else [aborted]
            for output in outputs:
                self.take(output)

    def take(self, output: RequestOutput) -> None:
        """A part of what is expected, and all of it unless it was aborted."""
        ask = self.waiting_for[output.request_id]
        for sample, wanted in zip(output.outputs, ask.expected.outputs, strict=True):
            assert sample.token_ids == wanted.token_ids[: len(sample.token_ids)]
            if sample.finish_reason not in (None, "abort"):
                for name in ("token_ids", "text", "finish_reason", "stop_reason"):
                    assert getattr(sample, name) == getattr(wanted, name), name
        if output.finished:
            del self.waiting_for[output.request_id]
            self.ends.update(sample.finish_reason for sample in output.outputs)
            self.num_tokens += sum(len(sample.token_ids) for sample in output.outputs)

    def assert_all_is_well(self) -> None:
        engine, stats = self.engine, self.engine.stats()
        assert_cache_is_empty(engine)
        assert len(engine.output_processor) == 0 and not engine._launched
        sampler = engine.model_runner.sampler
        assert len(sampler._free_rows) == sampler.num_rows - 1
        assert not engine.model_runner._scored
        # Everything happened, and often.
        assert set(self.ends) == {"length", "stop", "abort"}
        assert min(self.ends.values()) > len(self.ends) and stats["num_preemptions"] > 0
        assert stats["chunk_reasons"]["budget"] > 0 < stats["chunk_reasons"]["prompt"]
        # What the engine counted is what was seen.
        assert stats["num_requests_finished"] == sum(self.ends.values())
        assert stats["num_generated_tokens"] >= self.num_tokens
        assert stats["num_forward_tokens"] > stats["num_prompt_tokens"] > 0
        kv_cache, prefixes = engine.scheduler.kv_cache, stats["prefix_cache"]
        assert kv_cache.num_free == NUM_BLOCKS
        if prefixes:
            assert 0 < prefixes["num_hits"] < prefixes["num_queries"]
            assert prefixes["num_hit_tokens"] < prefixes["num_query_tokens"]
            assert prefixes["num_evicted"] > NUM_BLOCKS
            held = prefixes["num_inserted"] - prefixes["num_evicted"]
            assert held == prefixes["num_blocks"] == prefixes["num_evictable"]
            assert kv_cache.pool.num_free == NUM_BLOCKS - held
            assert prefixes["num_collisions"] == 0
            kv_cache.forget_all()
        assert kv_cache.pool.num_free == NUM_BLOCKS


@pytest.mark.timeout(1200)
def test_soak():
    """With everything as it is by default: the tree, and steps that overlap."""
    soak = Soak(0)
    soak.run(NUM_REQUESTS)
    soak.assert_all_is_well()


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("prefix_index", ["tree", "hash", "off"])
def test_a_shorter_soak(prefix_index, overlap):
    soak = Soak(1, prefix_index=prefix_index, overlap=overlap)
    soak.run(max(300, NUM_REQUESTS // 30))
    soak.assert_all_is_well()

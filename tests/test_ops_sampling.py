"""The fused sampling kernels in Triton's interpreter, and how the sampler chooses them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import torch

from common.sampling import PADDING_ROW, Launches, Sampler, SamplingParams

# Triton decides at its first import whether it compiles or interprets, so these run in a child.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import sampling_cases as cases
    import triton.language as tl
    from test_sampling_random import assert_distributed

    from common.ops import boundary, edits, sampling, truncation

    def hostile_logits() -> torch.Tensor:
        logits = cases.random_logits(4, 300, seed=1)
        logits[2] = logits[2].round()  # many ties
        logits[3, ::2] = 0.0
        logits[3, 1::3] = -torch.inf
        return logits

    class TestInterpreted:
        @pytest.fixture(autouse=True)
        def small_chunks(self, monkeypatch):
            """Two chunks of little: the interpreter runs programs one after the other."""
            for module in (sampling, edits):
                monkeypatch.setattr(module, "CHUNK", 256)
            monkeypatch.setattr(truncation, "TILE", 512)

        @pytest.fixture
        def most_candidates(self, monkeypatch):
            """Sets how many tokens may be collected; if more lie at a boundary, all are read."""

            def change(most: int) -> None:
                for module in (boundary, truncation):
                    monkeypatch.setattr(module, "_CANDIDATES", tl.constexpr(most))
                    monkeypatch.setattr(module, "CANDIDATES", most)

            return change

        def test_noise(self):
            cases.check_noise("cpu")

        def test_tokens_are_the_twins(self):
            cases.check_tokens(cases.random_logits(2, len(cases.MIXED), 300, seed=0))

        @pytest.mark.parametrize("vocab_size", [1, 5, 128])
        def test_tokens_of_small_vocabularies(self, vocab_size):
            params = (cases.GREEDY, *cases.TRUNCATED[:4], *cases.TRUNCATED[-4:])
            logits = cases.random_logits(1, len(params), vocab_size, seed=vocab_size)
            cases.check_tokens(logits, params)

        @cases.by_params
        def test_kept_tokens_are_the_twins(self, params, monkeypatch):
            cases.check_kept_tokens(hostile_logits(), params, monkeypatch)

        @pytest.mark.parametrize("params", cases.TRUNCATED[::3], ids=cases.params_id)
        @pytest.mark.parametrize("most", [1, 64])
        def test_kept_tokens_with_few_candidates(self, most, params, most_candidates, monkeypatch):
            most_candidates(most)
            cases.check_kept_tokens(hostile_logits(), params, monkeypatch)

        def test_kept_tokens_of_equal_logits(self, most_candidates, monkeypatch):
            for most in (1, 4096):
                most_candidates(most)
                for params in (SamplingParams(top_p=0.31), SamplingParams(top_k=7, top_p=0.5)):
                    cases.check_kept_tokens(torch.zeros(2, 200), params, monkeypatch)

        def test_a_row_alone_is_the_row_in_the_batch(self):
            cases.check_row_alone(cases.random_logits(1, len(cases.MIXED), 300, seed=2))

        def test_unusable_logits_spoil_only_their_row(self):
            both = SamplingParams(seed=0, top_k=9, top_p=0.6)
            for params in (cases.GREEDY, SamplingParams(seed=0), both):
                cases.check_unusable_logits("cpu", torch.float32, 260, (params,))

        def test_the_race_draws_by_probability(self):
            logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5, -0.5])
            sampler = Sampler(8, "cpu", num_rows=301, kernels="fused")
            for i in range(300):
                sampler.add_request(str(i), SamplingParams(seed=0, n=2), [0], [], (), index=i)
            keys = [str(i) for i in range(300)]
            tokens = sampler(logits.expand(300, -1), keys).token_ids
            assert_distributed(torch.bincount(tokens, minlength=8), logits.softmax(-1))

        def test_padding_rows_change_nothing(self):
            params = SamplingParams(seed=1, top_p=0.9, presence_penalty=1.0)
            sampler, keys = cases.make_sampler((params,), 140, "cpu", "fused")
            padded, _ = cases.make_sampler((params,), 140, "cpu", "fused")
            logits = cases.random_logits(4, 140, seed=3)
            padded.upload()
            rows = torch.tensor([padded.row_of("0"), *[PADDING_ROW] * 3])
            for _ in range(3):
                tokens = padded.sample(logits, rows).token_ids.tolist()
                assert tokens[:1] == sampler(logits[:1], keys).token_ids.tolist()
                assert tokens[1:] == logits[1:].argmax(-1).tolist()

        def test_rows_of_another_alignment(self):
            logits = cases.random_logits(8, 33, seed=4, dtype=torch.float16)
            expected = logits[1:].argmax(-1).tolist()
            sampler, keys = cases.make_sampler((cases.GREEDY,) * 7, 33, "cpu", "fused")
            assert sampler(logits[1:], keys).token_ids.tolist() == expected
            padded = torch.nn.functional.pad(logits[1:], (0, 3))[:, :33]
            assert sampler(padded, keys).token_ids.tolist() == expected


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_the_kernels_in_the_interpreter():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("this Triton's interpreter cannot loop with this NumPy")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        [*command, "-k", "TestInterpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " skipped" not in child.stdout, child.stdout


class TestChoice:
    def test_auto_is_torch_on_the_cpu(self):
        sampler = Sampler(10, "cpu")
        sampler.add_request("a", SamplingParams(top_k=3), [0], [], ())
        assert sampler.graph_key == sampler.passes

    @pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
    def test_the_kernels_without_a_gpu_are_refused(self):
        with pytest.raises(ValueError, match=r"need a CUDA device.*'torch'"):
            Sampler(10, "cpu", kernels="fused")

    def test_an_unknown_choice_is_refused(self):
        with pytest.raises(ValueError, match=r"unknown sampling kernels 'cuda'.*fused"):
            Sampler(10, "cpu", kernels="cuda")

    def test_the_plain_sampler_does_not_import_triton(self):
        code = (
            "import sys; from common.sampling import Sampler; Sampler(10, 'cpu'); "
            "sys.exit('common.ops.sampling' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class TestForGraphs:
    def test_few_kinds_of_batches(self):
        def launches(**options) -> Launches:
            sampler = Sampler(100, "cpu")
            sampler.add_request("a", SamplingParams(**options), [0], [], ())
            return Launches.of(sampler.passes)

        assert launches(temperature=0.0, top_k=5, top_p=0.5) == launches() == Launches()
        assert launches(top_k=5) == launches(top_k=90, min_p=0.1) == launches(top_p=0.5)
        assert launches(min_p=0.1) == Launches(truncate=True)
        assert launches(presence_penalty=1.0) == launches(min_tokens=3) == Launches(edit=True)

    def test_the_version_tells_when_tensors_move(self):
        sampler = Sampler(50, "cpu", num_rows=4)
        versions = []

        def add(key: str, **options) -> None:
            sampler.add_request(key, SamplingParams(**options), [0], [], ())
            sampler.upload()
            versions.append(sampler.version)

        add("a")
        add("b", logit_bias={1: 1.0})
        assert versions == [0, 0]
        add("c", presence_penalty=1.0)
        assert versions[-1] > versions[-2]  # the counts have come to be
        add("d")
        assert versions[-1] > versions[-2]  # more rows
        sampler.remove_request("a")
        add("e", logit_bias=dict.fromkeys(range(30), 1.0))
        assert versions[-1] > versions[-2]  # wider biases
        sampler.remove_request("e")
        add("f", logit_bias=dict.fromkeys(range(30), 1.0), presence_penalty=2.0)
        assert versions[-1] == versions[-2]

    def test_a_request_keeps_its_row(self):
        sampler = Sampler(50, "cpu", num_rows=2)
        for key in "abcde":
            sampler.add_request(key, SamplingParams(), [0], [], ())
        rows = [sampler.row_of(key) for key in "abcde"]
        assert len({PADDING_ROW, *rows}) == 6
        assert sampler.rows(list("abcde")).tolist() == rows
        sampler.remove_request("c")
        sampler.add_request("f", SamplingParams(), [0], [], ())
        assert sampler.row_of("f") == rows[2]

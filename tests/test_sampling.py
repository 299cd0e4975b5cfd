"""Every sampling option against its definition, against transformers, and in mixed batches."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.sampling import (
    INVALID_TOKEN,
    PADDING_ROW,
    Passes,
    Sampler,
    SamplingParams,
    gather_logprobs,
)
from common.sampling_rows import RowTable, SparseBias, TokenCounts
from common.truncation import lowest_score, top_p_mask

CPU = torch.device("cpu")


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample_alone(logits, params, *, prompt=(0,), output=(), eos=(), key="r", engine_seed=0) -> int:
    sampler = Sampler(logits.shape[-1], CPU, engine_seed)
    sampler.add_request(key, params, list(prompt), list(output), eos)
    return sampler(logits.reshape(1, -1), [key]).token_ids.item()


def no_memory_left(*_) -> None:
    raise MemoryError


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0.0, **options)


class TestGreedy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_is_the_argmax(self, dtype):
        logits = random_logits(5, 1000).to(dtype)
        sampler = Sampler(1000, CPU)
        for row in range(5):
            sampler.add_request(str(row), greedy(), [0], [], ())
        output = sampler(logits, list("01234"))
        assert output.token_ids.dtype == torch.int64
        assert output.token_ids.tolist() == logits.argmax(-1).tolist()
        assert output.logprobs is None

    def test_the_first_of_equals(self):
        logits = torch.tensor([0.0, 2.0, 1.0, 2.0])
        assert sample_alone(logits, greedy()) == 1
        # The same when the batch needs the general path.
        assert sample_alone(logits, greedy(logit_bias={0: 0.5})) == 1

    def test_truncation_changes_nothing(self):
        params = greedy(top_k=1, top_p=0.1, min_p=0.5)
        assert sample_alone(torch.tensor([0.0, 2.0, 2.0]), params) == 1
        assert Passes.of(params, 3) == Passes(greedy=True)


class TestPenalties:
    @given(
        st.lists(st.integers(0, 19), min_size=1, max_size=12),
        st.lists(st.integers(0, 19), max_size=12),
        st.sampled_from([0.5, 1.0, 1.3, 5.0]),
        st.integers(0, 100),
    )
    @settings(max_examples=50, deadline=None)
    def test_repetition_as_transformers(self, prompt, output, penalty, seed):
        logits = random_logits(1, 20, seed=seed)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([prompt + output]), logits.clone()
        )
        counts = TokenCounts(2, 20, CPU)
        counts.write(1, prompt, output)
        penalty = torch.tensor([[penalty]])
        zero = torch.zeros(1, 1)
        scores = counts.penalize(logits, torch.tensor([1]), penalty, zero, zero)
        assert torch.equal(scores, expected)

    def test_presence_and_frequency_count_the_output_only(self):
        counts = TokenCounts(2, 5, CPU)
        counts.write(1, [0, 1], [1, 2, 2])
        counts.record(torch.tensor([1]), torch.tensor([3]))
        one, presence, frequency = torch.ones(1, 1), torch.tensor([[0.5]]), torch.tensor([[2.0]])
        scores = counts.penalize(torch.zeros(1, 5), torch.tensor([1]), one, presence, frequency)
        assert scores.tolist() == [[0.0, -2.5, -4.5, -2.5, 0.0]]

    @pytest.mark.parametrize(
        "options",
        [{"repetition_penalty": 1.7}, {"presence_penalty": 1.0}, {"frequency_penalty": 0.4}],
    )
    def test_a_row_remembers_what_it_has_sampled(self, options):
        logits = 1.0 + random_logits(30, scale=0.1)
        sampler = Sampler(30, CPU)
        sampler.add_request("r", greedy(**options), [3, 4], [], ())
        output = []
        for _ in range(20):
            token = sampler(logits[None], ["r"]).token_ids.item()
            assert token == sample_alone(logits, greedy(**options), prompt=[3, 4], output=output)
            output.append(token)
        assert len(set(output)) > 3


class TestBias:
    @given(
        st.dictionaries(st.integers(0, 19), st.floats(-100, 100), min_size=1, max_size=8),
        st.integers(0, 100),
    )
    @settings(max_examples=50, deadline=None)
    def test_logit_bias_as_transformers(self, biases, seed):
        logits = random_logits(1, 20, seed=seed)
        processor = SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases.items()})
        expected = processor(torch.tensor([[0]]), logits)
        sparse = SparseBias(2, CPU)
        sparse.write(1, [(token, bias, 2**62) for token, bias in biases.items()])
        sparse.send()
        scores = logits.clone()
        sparse.add_to_(scores, torch.tensor([1]), torch.tensor([0]))
        torch.testing.assert_close(scores, expected, rtol=0, atol=0)

    def test_minus_infinity_bans(self):
        logits = torch.tensor([0.0, 3.0, 2.0])
        assert sample_alone(logits, greedy(logit_bias={1: -math.inf})) == 2
        params = SamplingParams(logit_bias={1: -math.inf, 2: -math.inf})
        assert sample_alone(logits, params) == 0

    def test_min_tokens_as_transformers(self):
        eos, logits = [7, 2], random_logits(10)
        logits[eos] = 20.0
        processor = MinNewTokensLengthLogitsProcessor(1, 3, eos, device="cpu")
        sampler = Sampler(10, CPU)
        params = greedy(min_tokens=3, stop_token_ids=[7])
        sampler.add_request("r", params, [0], [], (2,))
        output = []
        for _ in range(5):
            expected = processor(torch.tensor([[0, *output]]), logits[None]).argmax().item()
            output.append(sampler(logits[None], ["r"]).token_ids.item())
            assert output[-1] == expected
            assert sample_alone(logits, params, output=output[:-1], eos=(2,)) == expected
        assert [token in eos for token in output] == [False] * 3 + [True] * 2

    def test_a_bias_does_not_unban(self):
        params = greedy(min_tokens=1, stop_token_ids=[1], logit_bias={1: 100.0})
        assert sample_alone(torch.tensor([0.0, 5.0]), params) == 0


def scores_of(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.amax(-1, keepdim=True)


def column(*values: float, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


class TestTruncation:
    """Which tokens stay; that the rest is drawn at its rate is in test_sampling_random."""

    @given(st.integers(1, 300), st.integers(1, 320), st.integers(0, 1000))
    @settings(max_examples=60, deadline=None)
    def test_top_k_as_transformers(self, vocab_size, k, seed):
        scores = scores_of(random_logits(2, vocab_size, seed=seed))
        k = min(k, vocab_size)
        lowest = lowest_score(scores, column(k, 0, dtype=torch.int64), k, column(*[-math.inf] * 2))
        expected = TopKLogitsWarper(k)(None, scores[:1]).isfinite()
        assert torch.equal(scores[:1] >= lowest[:1], expected)
        assert (scores[1:] >= lowest[1:]).all()  # a row without top-k

    @given(st.integers(1, 300), st.floats(0.0, 1.0), st.integers(0, 1000))
    @settings(max_examples=60, deadline=None)
    def test_min_p_as_transformers(self, vocab_size, min_p, seed):
        logits = random_logits(1, vocab_size, seed=seed)
        params = SamplingParams(min_p=min_p, logprobs=0)
        expected = MinPLogitsWarper(min_p)(None, logits).isfinite()
        log_min_p = column(math.log(params.min_p) if params.min_p else -math.inf)
        no_top_k = column(0, dtype=torch.int64)
        kept = scores_of(logits) >= lowest_score(scores_of(logits), no_top_k, 0, log_min_p)
        assert torch.equal(kept, expected)

    @given(st.integers(1, 300), st.floats(1e-6, 1.0), st.integers(0, 1000))
    @settings(max_examples=100, deadline=None)
    def test_top_p_as_transformers(self, vocab_size, top_p, seed):
        logits = random_logits(1, vocab_size, seed=seed).double()
        expected = TopPLogitsWarper(top_p)(None, logits).isfinite()
        weights = scores_of(logits).exp().float()
        mask = top_p_mask(weights, column(top_p, dtype=torch.float64))
        if top_p == 1.0:
            assert mask.all()
        elif not torch.equal(mask.bool(), expected):
            # They may differ where the sum of probabilities meets top_p to float precision.
            sums = logits.softmax(-1).sort(descending=True).values.cumsum(-1)
            assert (sums - top_p).abs().min() < 1e-6

    @pytest.mark.parametrize(
        ("top_p", "kept"),
        [(0.1, 1), (0.3, 3), (0.5, 5), (0.51, 6), (0.9, 9), (0.95, 10), (1.0, 10)],
    )
    def test_top_p_among_equals_keeps_the_first(self, top_p, kept):
        mask = top_p_mask(torch.ones(1, 10), column(top_p, dtype=torch.float64))
        assert mask.tolist() == [[1.0] * kept + [0.0] * (10 - kept)]

    def test_top_p_keeps_the_token_at_the_boundary(self):
        weights = torch.tensor([[0.5, 0.25, 1.0, 0.25]])  # of 2: a quarter, an eighth, a half, ...
        top_p = [0.5, 0.6, 0.75, 0.76, 0.88]
        masks = top_p_mask(weights.expand(5, -1), column(*top_p, dtype=torch.float64))
        assert masks.tolist() == [
            [0, 0, 1, 0],
            [1, 0, 1, 0],
            [1, 0, 1, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1],
        ]

    def test_top_k_keeps_ties_and_top_p_counts_what_top_k_left(self):
        logits = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
        drawn = {
            sample_alone(logits, SamplingParams(temperature=3.0, top_k=2, seed=seed))
            for seed in range(100)
        }
        assert drawn == {0, 2, 3}
        # exp(0), exp(-1) twice: 0.58, 0.21, 0.21 of what is left, so 0.7 is reached by two.
        params = {"top_k": 2, "top_p": 0.7}
        drawn = {sample_alone(logits, SamplingParams(seed=seed, **params)) for seed in range(100)}
        assert drawn == {0, 2}

    def test_extreme_temperatures(self):
        logits = random_logits(50)
        cold = {sample_alone(logits, SamplingParams(temperature=1e-5, seed=s)) for s in range(20)}
        assert cold == {logits.argmax().item()}
        hot = {sample_alone(logits, SamplingParams(temperature=1e30, seed=s)) for s in range(400)}
        assert len(hot) > 45
        banned = SamplingParams(temperature=1e30, logit_bias=dict.fromkeys(range(49), -math.inf))
        assert sample_alone(logits, banned) == 49


probability = st.floats(0.01, 1.0)
any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.one_of(st.just(1.0), probability),
    top_k=st.sampled_from([0, 0, -1, 1, 3, 20, 1000]),
    min_p=st.one_of(st.just(0.0), probability),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -1.0, 0.5]),
    logit_bias=st.sampled_from([None, {0: 3.0}, {1: -math.inf, 5: 1.5, 7: -2.0}]),
    seed=st.one_of(st.none(), st.integers(0, 5)),
    min_tokens=st.sampled_from([0, 0, 2]),
    stop_token_ids=st.sampled_from([None, [2, 3]]),
    logprobs=st.sampled_from([None, None, 0, 3]),
)


class TestBatches:
    @given(
        st.lists(any_params, min_size=2, max_size=6),
        st.integers(8, 70),
        st.sampled_from([torch.float32, torch.bfloat16]),
        st.randoms(use_true_random=False),
    )
    @settings(max_examples=60, deadline=None)
    def test_a_row_alone_is_the_row_in_any_batch(self, all_params, vocab_size, dtype, random):
        steps = 4
        keys = [f"request {i}" for i in range(len(all_params))]
        # Coarse logits, so that ties happen.
        logits = {
            key: (random_logits(steps, vocab_size, seed=random.randrange(99)) * 4).round().div(4)
            for key in keys
        }

        def run(together: list[str], shuffle: bool) -> dict[str, list]:
            sampler = Sampler(vocab_size, CPU, seed=1, num_rows=2)
            for key in together:
                sampler.add_request(key, all_params[keys.index(key)], [1, 1, 4], [], (6,))
            seen: dict[str, list] = {key: [] for key in together}
            for step in range(steps):
                batch = list(together)
                if shuffle:
                    random.shuffle(batch)
                rows = torch.stack([logits[key][step] for key in batch]).to(dtype)
                output = sampler(rows, batch)
                for i, key in enumerate(batch):
                    k = all_params[keys.index(key)].logprobs
                    seen[key].append(output.token_ids[i].item())
                    if k is not None:
                        seen[key] += [
                            output.logprobs.token_ids[i, : k + 1].tolist(),
                            output.logprobs.logprobs[i, : k + 1].tolist(),
                            output.logprobs.ranks[i].item(),
                        ]
            return seen

        together = run(keys, shuffle=True)
        for key in keys:
            assert run([key], shuffle=False)[key] == together[key]

    @given(any_params, st.integers(1, 5))
    @settings(max_examples=40, deadline=None)
    def test_a_preempted_request_goes_on_as_if_nothing_had_happened(self, params, stop_after):
        logits = random_logits(6, 1, 40)
        output = []
        sampler = Sampler(40, CPU)
        sampler.add_request("r", params, [1, 2], [], (3,))
        output = [sampler(logits[step], ["r"]).token_ids.item() for step in range(6)]

        sampler.remove_request("r")
        sampler.add_request("another", SamplingParams(), [0], [], ())
        sampler.add_request("r", params, [1, 2], output[:stop_after], (3,))
        rest = [sampler(logits[step], ["r"]).token_ids.item() for step in range(stop_after, 6)]
        assert rest == output[stop_after:]

    def test_sample_i_of_n_uses_the_seed_plus_i(self):
        logits = torch.zeros(3, 1000)
        sampler = Sampler(1000, CPU)
        sampler.add_request("a", SamplingParams(seed=7, n=2), [0], [], (), index=1)
        sampler.add_request("b", SamplingParams(seed=8), [0], [], ())
        sampler.add_request("c", SamplingParams(seed=7), [0], [], ())
        first, second, third = sampler(logits, ["a", "b", "c"]).token_ids.tolist()
        assert first == second != third

    def test_without_a_seed_the_engine_and_the_name_decide(self):
        logits = torch.zeros(100_000)
        tokens = [
            sample_alone(logits, SamplingParams(), key=key, engine_seed=seed)
            for key, seed in [("a", 0), ("a", 0), ("b", 0), ("a", 1)]
        ]
        assert tokens[0] == tokens[1]
        assert len(set(tokens)) == 3

    def test_rows_are_added_and_reused(self):
        sampler = Sampler(50, CPU, num_rows=2)
        heavy = greedy(logit_bias={9: 50.0}, repetition_penalty=3.0, min_tokens=5)
        for i in range(40):
            sampler.add_request(f"heavy {i}", heavy, list(range(40)), [9, 9], (1,))
        sampler(random_logits(40, 50), [f"heavy {i}" for i in range(40)])
        for i in range(40):
            sampler.remove_request(f"heavy {i}")
        assert sampler.passes == Passes()

        logits = random_logits(40, 50, seed=1)
        params = greedy(presence_penalty=1.0)
        for i in range(40):
            sampler.add_request(f"light {i}", params, [0], [], ())
        tokens = sampler(logits, [f"light {i}" for i in range(40)]).token_ids
        assert tokens.tolist() == logits.argmax(-1).tolist()

    def test_only_what_is_asked_for_is_done(self):
        sampler = Sampler(50, CPU)
        sampler.add_request("a", greedy(), [0], [], ())
        assert sampler.passes == Passes(greedy=True)
        sampler.add_request("b", SamplingParams(top_k=5, logprobs=2), [0], [], ())
        sampler.add_request("c", SamplingParams(top_k=7, min_p=0.1), [0], [], ())
        assert sampler.passes == Passes(
            greedy=True, random=True, min_p=True, top_k=7, num_logprobs=2
        )
        sampler.remove_request("b")
        sampler.remove_request("c")
        sampler.remove_request("never added")
        assert sampler.passes == Passes(greedy=True)

    def test_the_padding_row_is_harmless(self):
        sampler = Sampler(20, CPU)
        params = SamplingParams(seed=1, top_p=0.9, presence_penalty=1.0)
        sampler.add_request("a", params, [0], [], ())
        logits = random_logits(4, 20)
        alone = sample_alone(logits[0], params)
        sampler.upload()
        rows = torch.tensor([sampler.rows(["a"]).item(), PADDING_ROW, PADDING_ROW, PADDING_ROW])
        tokens = sampler.sample(logits, rows).token_ids.tolist()
        assert tokens[0] == alone
        assert all(0 <= token < 20 for token in tokens)

    def test_inference_mode_may_come_and_go(self):
        logits = random_logits(1, 20)
        params = SamplingParams(seed=1, top_p=0.9, presence_penalty=1.0, logit_bias={0: 1.0})
        sampler = Sampler(20, CPU, num_rows=2)
        for step in range(6):
            with torch.inference_mode(step % 3 > 0):
                sampler.add_request(str(step), params, [0], [], ())
                assert sampler(logits, [str(step)]).token_ids == sample_alone(logits, params)

    def test_the_callers_logits_are_left_alone(self):
        logits = random_logits(1, 20)
        before = logits.clone()
        sample_alone(logits, SamplingParams(top_p=0.5, repetition_penalty=2.0, logit_bias={0: 1.0}))
        assert torch.equal(logits, before)


class TestUnusableLogits:
    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 0.0},
            {},
            {"top_k": 3},
            {"top_p": 0.5, "min_p": 0.1},
            {"repetition_penalty": 1.2, "logprobs": 2},
        ],
    )
    @pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
    def test_only_the_row_itself_fails(self, options, bad):
        logits = random_logits(3, 40)
        logits[1, 5] = bad
        logits[2, :] = -math.inf
        params = SamplingParams(seed=0, **options)
        sampler = Sampler(40, CPU)
        for key in "abc":
            sampler.add_request(key, params, [0], [], ())
        for step in range(2):
            tokens = sampler(logits, list("abc")).token_ids.tolist()
            assert tokens[1:] == [INVALID_TOKEN, INVALID_TOKEN]
            if step == 0:
                assert tokens[0] == sample_alone(logits[0], params)

    def test_everything_banned(self):
        params = SamplingParams(logit_bias={0: -math.inf, 1: -math.inf})
        assert sample_alone(torch.zeros(2), params) == INVALID_TOKEN


class TestLogprobs:
    def test_are_the_models_own(self):
        logits = random_logits(2, 30).bfloat16()
        params = SamplingParams(
            temperature=0.3, top_k=2, repetition_penalty=2.0, logit_bias={3: 9.0}, logprobs=4
        )
        sampler = Sampler(30, CPU)
        sampler.add_request("a", params, [1, 2], [], ())
        sampler.add_request("b", greedy(logprobs=1), [1, 2], [], ())
        output = sampler(logits, ["a", "b"])
        expected = logits.float().log_softmax(-1)
        token_ids, logprobs, ranks = output.logprobs.tolist()
        assert [len(row) for row in token_ids] == [5, 5]  # the most any request asks for
        for row in range(2):
            sampled = output.token_ids[row].item()
            assert token_ids[row][0] == sampled
            assert logprobs[row] == expected[row, token_ids[row]].tolist()
            assert logprobs[row][1:] == expected[row].topk(4).values.tolist()
            assert ranks[row] == 1 + (expected[row] > expected[row, sampled]).sum()
        assert ranks[1] == 1

    def test_none_but_the_sampled_one(self):
        logprobs = gather_logprobs(random_logits(2, 30), torch.tensor([4, 5]), 0)
        assert logprobs.token_ids.tolist() == [[4], [5]]

    def test_the_whole_vocabulary(self):
        logits = random_logits(2, 30)
        logprobs = gather_logprobs(logits, torch.tensor([4, 5]), 30)
        assert logprobs.token_ids[:, 1:].tolist() == logits.argsort(-1, descending=True).tolist()

    @given(st.integers(1, 40), st.integers(0, 1000))
    @settings(max_examples=50, deadline=None)
    def test_ties_go_to_the_lower_id(self, vocab_size, seed):
        logits = random_logits(3, vocab_size, seed=seed, scale=1.0).round()
        logits[0, 0] = -0.0
        logprobs = gather_logprobs(logits, logits.argmax(-1), vocab_size)
        expected = logits.sort(dim=-1, descending=True, stable=True).indices
        assert torch.equal(logprobs.token_ids[:, 1:], expected)
        assert logprobs.ranks.tolist() == [1, 1, 1]


class TestTables:
    def test_are_sent_when_a_row_has_changed_and_only_then(self, monkeypatch):
        """As on a GPU, where the tensor is not the host's memory."""
        sent = []
        monkeypatch.setattr("common.sampling_rows._staged", lambda x, _: sent.append(x) or x)
        table = RowTable(3, 2, torch.float64, CPU, empty=-math.inf)
        table.tensor, table._device = table.tensor.clone(), SimpleNamespace(type="cuda")
        sent.clear()
        for row, values, num_sent in (
            (1, (0.5, 2.0), 1),
            (1, (0.5, 2.0), 1),
            (1, (0.5,), 2),
            (2, (), 2),
            (0, (1.0, 2.0), 3),
        ):
            table.write(row, values)
            assert not table.send()
            assert len(sent) == num_sent
            assert table.tensor.tolist() == table._host.tolist()
        assert table.tensor[1].tolist() == [0.5, -math.inf]

    def test_are_sent_later_if_that_failed(self, monkeypatch):
        table = RowTable(3, 2, torch.float64, CPU)
        table.tensor, table._device = table.tensor.clone(), SimpleNamespace(type="cuda")
        table.write(1, (1.0, 2.0))
        monkeypatch.setattr("common.sampling_rows._staged", no_memory_left)
        with pytest.raises(MemoryError):
            table.send()
        table.write(1, (1.0, 2.0))
        monkeypatch.setattr("common.sampling_rows._staged", lambda x, _: x)
        table.send()
        assert table.tensor[1].tolist() == [1.0, 2.0]


class TestMisuse:
    def test_a_key_in_use(self):
        sampler = Sampler(10, CPU)
        sampler.add_request("a", greedy(), [0], [], ())
        with pytest.raises(ValueError, match="'a' already has a row"):
            sampler.add_request("a", greedy(), [0], [], ())

    def test_logits_of_another_shape(self):
        sampler = Sampler(10, CPU)
        sampler.add_request("a", greedy(), [0], [], ())
        with pytest.raises(ValueError, match=r"\[1, 10\].*got \[2, 10\]"):
            sampler(torch.zeros(2, 10), ["a"])


@pytest.mark.gpu
class TestOnTheGpu:
    vocab_size = 5000
    all_params = (
        greedy(),
        SamplingParams(seed=1),
        SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, logprobs=3),
        SamplingParams(top_p=0.8, repetition_penalty=1.3, logit_bias={5: 2.0}),
        greedy(presence_penalty=1.0, frequency_penalty=0.5, min_tokens=2, stop_token_ids=[3]),
    )

    def make(self, device: str) -> tuple[Sampler, list[str]]:
        sampler = Sampler(self.vocab_size, device)
        keys = [str(i) for i in range(len(self.all_params))]
        for key, params in zip(keys, self.all_params, strict=True):
            sampler.add_request(key, params, [1, 2, 3], [4], (7,))
        return sampler, keys

    def test_the_same_tokens_as_on_the_cpu_without_a_synchronization(self):
        on_cpu, keys = self.make("cpu")
        on_gpu, _ = self.make("cuda")
        for step in range(20):
            logits = random_logits(len(keys), self.vocab_size, seed=step)
            expected = on_cpu(logits, keys)
            logits = logits.cuda()
            torch.cuda.set_sync_debug_mode("error")
            try:
                output = on_gpu(logits, keys)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert output.token_ids.tolist() == expected.token_ids.tolist()
            assert output.logprobs.token_ids.tolist() == expected.logprobs.token_ids.tolist()
            torch.testing.assert_close(output.logprobs.logprobs.cpu(), expected.logprobs.logprobs)

    def test_in_a_cuda_graph(self):
        eager, keys = self.make("cuda")
        captured, _ = self.make("cuda")
        warmed, _ = self.make("cuda")
        logits = torch.zeros(len(keys), self.vocab_size, device="cuda")
        warmed(logits, keys)
        captured.upload()
        rows = captured.rows(keys)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = captured.sample(logits, rows)
        for step in range(10):
            logits.copy_(random_logits(len(keys), self.vocab_size, seed=step))
            graph.replay()
            assert output.token_ids.tolist() == eager(logits, keys).token_ids.tolist()

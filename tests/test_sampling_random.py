"""The random side of sampling: the hash, the exponential noise, and what the race draws."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.random import exponential_noise, hash_tokens, seed_for, to_int64
from common.sampling import Sampler, SamplingParams


def chi_square_score(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations a chi-square statistic is off (Wilson and Hilferty, 1931)."""
    freedom = len(expected) - 1
    ratio = ((observed - expected) ** 2 / expected).sum().item() / freedom
    variance = 2 / (9 * freedom)
    return (ratio ** (1 / 3) - (1 - variance)) / math.sqrt(variance)


def assert_distributed(observed: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Counts agree with probabilities; too good a fit is as suspicious as a bad one."""
    observed = observed.double()
    expected = probabilities.double() * observed.sum()
    assert observed[expected == 0].sum() == 0, "a token of probability 0 was drawn"
    rare = expected < 10  # the test is for larger counts: these are taken together
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum(0, keepdim=True)])
        expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    enough = expected > 0.5
    score = chi_square_score(observed[enough], expected[enough])
    assert abs(score) < 4.5


def pair_counts(first: torch.Tensor, second: torch.Tensor, bins: int) -> torch.Tensor:
    return torch.bincount((first * bins + second).flatten(), minlength=bins * bins)


def unsigned(hashes: torch.Tensor) -> torch.Tensor:
    return hashes.long() & 0xFFFFFFFF


def draw(logits: torch.Tensor, params: SamplingParams, num_rows: int, steps: int = 1):
    """Counts [V] of the tokens that so many requests sample in so many steps, all of one logits."""
    sampler = Sampler(len(logits), "cpu", num_rows=num_rows + 1)
    for row in range(num_rows):
        sampler.add_request(str(row), params, [0], [], (), index=row)
    sampler.upload()
    rows = sampler.rows([str(row) for row in range(num_rows)])
    batch = logits.expand(num_rows, -1)
    tokens = torch.cat([sampler.sample(batch, rows).token_ids for _ in range(steps)])
    return torch.bincount(tokens, minlength=len(logits))


class TestHash:
    def test_equals_its_definition_in_plain_integers(self):
        def mix64(x):
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            return x ^ (x >> 31)

        def reference(seed, step, token):
            key = mix64((mix64(seed % 2**64) + (step + 1) * 0x9E3779B97F4A7C15) % 2**64)
            x = (token + key % 2**32) % 2**32
            x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32 ^ (key >> 32)
            x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
            return x ^ (x >> 16)

        seeds = [0, 1, -1, 12345678901234567, -(2**63), 2**63 - 1]
        steps = [0, 1, 2, 1000, 2**31, 2**40]
        hashes = unsigned(hash_tokens(torch.tensor(seeds), torch.tensor(steps), 300))
        expected = [
            [reference(seed, step, token) for token in range(300)]
            for seed, step in zip(seeds, steps, strict=True)
        ]
        assert hashes.tolist() == expected

    def test_splitmix64_known_answer(self):
        # The first output of SplitMix64 from state 0 is mix64(golden), the key of (seed 0, step 0).
        key = 0xE220A8397B1DCDAF
        x = key % 2**32
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32 ^ (key >> 32)
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        hashes = hash_tokens(torch.tensor([0]), torch.tensor([0]), 1)
        assert unsigned(hashes).item() == x ^ (x >> 16)

    @pytest.mark.parametrize("shift", range(0, 32, 4))
    def test_every_group_of_bits_is_uniform(self, shift):
        seeds = torch.arange(64)
        nibbles = unsigned(hash_tokens(seeds, seeds % 7, 4096)) >> shift & 15
        counts = torch.bincount(nibbles.flatten(), minlength=16)
        assert_distributed(counts, torch.full((16,), 1 / 16))

    def test_neighbours_are_independent(self):
        count = torch.arange(256)
        zero = torch.zeros_like(count)
        for first, second in [
            (hash_tokens(count, zero, 2048)[:, :-1], hash_tokens(count, zero, 2048)[:, 1:]),
            (hash_tokens(count, zero, 2048), hash_tokens(count + 1, zero, 2048)),
            (hash_tokens(zero, count, 2048), hash_tokens(zero, count + 1, 2048)),
            (hash_tokens(count, zero, 2048), hash_tokens(count + 2**32, zero, 2048)),
            (hash_tokens(count, zero, 2048), hash_tokens(zero, count, 2048).roll(1, 0)),
        ]:
            high = pair_counts(unsigned(first) >> 28, unsigned(second) >> 28, 16)
            low = pair_counts(unsigned(first) & 15, unsigned(second) & 15, 16)
            assert_distributed(high, torch.full((256,), 1 / 256))
            assert_distributed(low, torch.full((256,), 1 / 256))

    def test_a_seed_counts_with_all_its_bits(self):
        seeds = torch.tensor([0] + [to_int64(1 << bit) for bit in range(64)])
        hashes = hash_tokens(seeds, torch.zeros_like(seeds), 4)
        assert len({tuple(row) for row in hashes.tolist()}) == 65

    def test_seeds_from_names(self):
        seeds = [seed_for(0, "a", 0), seed_for(0, "a", 1), seed_for(0, "b", 0), seed_for(1, "a", 0)]
        assert len(set(seeds)) == 4
        assert seed_for(0, "a", 0) == seeds[0]
        assert all(0 <= seed < 2**64 for seed in seeds)


class TestExponentialNoise:
    def test_moments_and_quantiles(self):
        seeds = torch.arange(500)
        noise = exponential_noise(seeds, torch.zeros_like(seeds), 4000)
        assert noise.dtype == torch.float32
        assert noise.mean().item() == pytest.approx(1, abs=5e-3)
        assert noise.var().item() == pytest.approx(1, abs=2e-2)
        edges = -torch.log1p(-torch.arange(1, 100) / 100)
        counts = torch.bincount(torch.bucketize(noise.flatten(), edges), minlength=100)
        assert_distributed(counts, torch.full((100,), 0.01))

    def test_small_values_come_at_their_rate(self):
        seeds = torch.arange(200)
        below = torch.zeros(4)
        limits = torch.tensor([1e-4, 1e-5, 3e-6, 1e-6])
        for step in range(4):
            noise = exponential_noise(seeds, torch.full_like(seeds, step), 50_000)
            below += torch.tensor([(noise < limit).sum() for limit in limits])
        expected = 4e7 * limits
        assert ((below - expected).abs() < 4.5 * expected.sqrt()).all()

    def test_the_extreme_hashes_give_finite_positive_noise(self, monkeypatch):
        extremes = torch.tensor([[0, 1, 2**31 - 1, -(2**31), -2, -1]], dtype=torch.int32)
        monkeypatch.setattr("common.random.hash_tokens", lambda *_: extremes)
        noise = exponential_noise(torch.tensor([0]), torch.tensor([0]), 6)[0]
        assert noise[0].item() == pytest.approx(0.5 * 2**-32, rel=1e-6)
        assert noise[1].item() == pytest.approx(1.5 * 2**-32, rel=1e-6)
        assert (noise.diff() >= 0).all()
        assert noise[-1].isfinite()
        assert noise[-1] > 16


class TestDistribution:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5, -0.5])

    @pytest.mark.parametrize("seed", [0, 1, 987654321])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
    def test_requests_of_one_step(self, seed, temperature):
        params = SamplingParams(temperature=temperature, seed=seed, n=2)
        counts = draw(self.logits, params, num_rows=4000)
        assert_distributed(counts, (self.logits / temperature).softmax(-1))

    @pytest.mark.parametrize("seed", [0, 5])
    def test_steps_of_one_request(self, seed):
        counts = draw(self.logits, SamplingParams(seed=seed), num_rows=1, steps=3000)
        assert_distributed(counts, self.logits.softmax(-1))

    def test_requests_without_a_seed(self):
        counts = draw(self.logits, SamplingParams(), num_rows=4000)
        assert_distributed(counts, self.logits.softmax(-1))

    def test_steps_are_independent(self):
        sampler = Sampler(4, "cpu", num_rows=3001)
        keys = [str(seed) for seed in range(3000)]
        for seed, key in enumerate(keys):
            sampler.add_request(key, SamplingParams(seed=seed), [0], [], ())
        logits = torch.tensor([1.0, 0.0, 0.5, -0.5]).expand(3000, 4)
        first, second = (sampler(logits, keys).token_ids for _ in range(2))
        probabilities = logits[0].softmax(-1)
        pairs = torch.outer(probabilities, probabilities).flatten()
        assert_distributed(pair_counts(first, second, 4), pairs)

    @pytest.mark.parametrize(
        ("options", "warpers"),
        [
            ({"top_k": 3}, [TopKLogitsWarper(3)]),
            ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
            ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
            (
                {"temperature": 1.5, "min_p": 0.05, "top_k": 6, "top_p": 0.9},
                [
                    TemperatureLogitsWarper(1.5),
                    MinPLogitsWarper(0.05),
                    TopKLogitsWarper(6),
                    TopPLogitsWarper(0.9),
                ],
            ),
        ],
    )
    def test_truncated_as_by_transformers(self, options, warpers):
        scores = self.logits[None]
        for warper in warpers:
            scores = warper(None, scores)
        counts = draw(self.logits, SamplingParams(**options), num_rows=20, steps=100)
        assert_distributed(counts, scores[0].softmax(-1))

    def test_tiny_probabilities(self):
        probabilities = torch.tensor([1.0, 1e-3, 3e-4, 2e-4, 1e-4])
        probabilities[0] -= probabilities[1:].sum()
        counts = draw(probabilities.log(), SamplingParams(seed=3), num_rows=1000, steps=250)
        assert_distributed(counts, probabilities)

    def test_a_large_vocabulary(self):
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(151_936, generator=generator)
        counts = draw(logits, SamplingParams(seed=11), num_rows=8, steps=90)
        probabilities = logits.double().softmax(-1)
        # Tokens of like probability are counted together, from the likeliest to the rarest.
        groups = (probabilities.sort(descending=True).values.cumsum(0) * 20).long().clamp(max=19)
        order = probabilities.argsort(descending=True)
        observed = torch.zeros(20).index_add_(0, groups, counts[order].float())
        expected = torch.zeros(20, dtype=torch.float64).index_add_(0, groups, probabilities[order])
        assert_distributed(observed, expected)

"""The fused sampling kernels on a GPU, against the twin on the same device."""

from __future__ import annotations

import pytest
import sampling_cases as cases
import torch
from test_sampling_random import assert_distributed

from common.sampling import PADDING_ROW, Sampler, SamplingParams

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VOCAB_SIZES = (320, 5000, 49_152, 151_936)


def gpu_logits(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, device="cuda")).to(dtype)


def test_noise():
    cases.check_noise("cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_tokens_are_the_twins(vocab_size, dtype):
    logits = gpu_logits(40, len(cases.MIXED), vocab_size, seed=0, dtype=dtype)
    cases.check_tokens(logits)


@pytest.mark.parametrize("params", cases.MIXED, ids=cases.params_id)
def test_tokens_of_one_kind_of_request(params):
    logits = gpu_logits(20, 8, 20_000, seed=1, dtype=torch.bfloat16)
    cases.check_tokens(logits, (params,) * 8)


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 256])
def test_tokens_by_batch_size(batch):
    params = tuple(cases.MIXED[i % len(cases.MIXED)] for i in range(batch))
    cases.check_tokens(gpu_logits(2, batch, 30_000, seed=2, dtype=torch.bfloat16), params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_kept_tokens_are_the_twins(vocab_size, dtype, monkeypatch):
    large = (
        *[SamplingParams(top_k=k) for k in (5000, 100_000)],
        SamplingParams(top_k=30_000, top_p=0.9),
        SamplingParams(top_p=0.9999, temperature=3.0),
    )
    for params in (*cases.TRUNCATED, *large):
        if params.top_k >= vocab_size:
            continue
        logits = gpu_logits(5, vocab_size, seed=3, dtype=dtype)
        logits[2] = logits[2].round()
        logits[3, ::2] = 0.0
        logits[3, 1::3] = -torch.inf
        logits[4] *= 2.5  # peaked, as a model's
        cases.check_kept_tokens(logits, params, monkeypatch)


def test_kept_tokens_of_nearly_equal_logits(monkeypatch):
    """More of them at the boundary than can be collected: the whole row is read."""
    for params in (SamplingParams(top_p=0.31), SamplingParams(top_k=7000, top_p=0.5)):
        equal = torch.zeros(2, 20_000, device="cuda")
        cases.check_kept_tokens(equal, params, monkeypatch)
        cases.check_kept_tokens(gpu_logits(2, 150_000, seed=4) * 1e-3, params, monkeypatch)


def test_a_row_alone_is_the_row_in_the_batch():
    logits = gpu_logits(4, len(cases.MIXED), 40_000, seed=5, dtype=torch.bfloat16)
    cases.check_row_alone(logits)


def test_a_row_alone_is_the_row_among_255_others():
    params = tuple(cases.MIXED[i % len(cases.MIXED)] for i in range(256))
    logits = gpu_logits(1, 256, 151_936, seed=6, dtype=torch.bfloat16)
    cases.check_row_alone(logits, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unusable_logits_spoil_only_their_row(dtype):
    for vocab_size in (320, 49_152):
        cases.check_unusable_logits("cuda", dtype, vocab_size)


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_in_a_cuda_graph(batch):
    """Replays follow the logits and the rows' states; nothing in it waits for the device."""
    params = tuple(cases.MIXED[i % len(cases.MIXED)] for i in range(batch))
    eager, keys = cases.make_sampler(params, 20_000, "cuda", "fused")
    captured, _ = cases.make_sampler(params, 20_000, "cuda", "fused")
    logits = gpu_logits(batch, 20_000, seed=7, dtype=torch.bfloat16)
    eager(logits, keys)
    eager, _ = cases.make_sampler(params, 20_000, "cuda", "fused")
    captured.upload()
    rows = captured.rows(keys)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = captured.sample(logits, rows)
    for step in range(6):
        logits.copy_(gpu_logits(batch, 20_000, seed=8 + step, dtype=torch.bfloat16))
        graph.replay()
        assert output.token_ids.tolist() == eager(logits, keys).token_ids.tolist()


def test_one_graph_serves_other_requests_of_its_kind():
    sampler, _ = cases.make_sampler((SamplingParams(top_k=3, seed=0),), 5000, "cuda", "fused")
    logits = gpu_logits(4, 5000, seed=9)
    sampler.upload()
    rows = torch.full((4,), PADDING_ROW, device="cuda")
    sampler.sample(logits, rows)
    key, version = sampler.graph_key, sampler.version
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sampler.sample(logits, rows)
    others = [SamplingParams(top_k=4000, top_p=0.5, seed=1), SamplingParams(min_p=0.1, seed=2)]
    for i, params in enumerate(others):
        sampler.add_request(f"other {i}", params, [0], [], ())
    sampler.upload()
    assert (sampler.graph_key, sampler.version) == (key, version)
    rows[1:3] = sampler.rows(["other 0", "other 1"])
    graph.replay()
    tokens = output.token_ids.tolist()
    assert [tokens[0], tokens[3]] == logits[[0, 3]].argmax(-1).tolist()
    for i, params in enumerate(others):
        alone = Sampler(5000, "cuda", kernels="fused")
        alone.add_request(f"other {i}", params, [0], [], ())
        assert alone(logits[i + 1 : i + 2], [f"other {i}"]).token_ids.item() == tokens[i + 1]


def draw(logits: torch.Tensor, params: SamplingParams, steps: int) -> torch.Tensor:
    """How often each token is drawn by 1000 requests in so many steps, on the CPU."""
    sampler = Sampler(len(logits), "cuda", num_rows=1001, kernels="fused")
    for i in range(1000):
        sampler.add_request(str(i), params, [0], [], (), index=i)
    sampler.upload()
    rows = sampler.rows([str(i) for i in range(1000)])
    batch = logits.expand(1000, -1).contiguous()
    counts = torch.zeros(len(logits), dtype=torch.int64, device="cuda")
    for _ in range(steps):
        tokens = sampler.sample(batch, rows).token_ids
        counts += torch.bincount(tokens, minlength=len(logits))
    return counts.cpu()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"min_p": 0.01}, {"top_p": 0.97}])
def test_the_race_draws_by_probability(options):
    """A million draws, so that an error of a few thousandths would be seen."""
    logits = torch.linspace(0.0, 5.0, 200, device="cuda")[torch.randperm(200)]
    params = SamplingParams(seed=0, n=2, **options)
    probabilities = (logits.double() / params.temperature).softmax(-1)
    kept = probabilities >= params.min_p * probabilities.max()
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    kept[order] &= before < params.top_p
    probabilities = (probabilities * kept / (probabilities * kept).sum()).cpu()
    assert_distributed(draw(logits, params, steps=1000), probabilities)


def test_unlikely_tokens_are_drawn_at_their_rate():
    """Of small noise the relative precision counts: ten million draws, down to one in 100,000."""
    probabilities = torch.tensor([1.0, 1e-3, 1e-4, 3e-5, 1e-5], dtype=torch.float64)
    probabilities[0] -= probabilities[1:].sum()
    counts = draw(probabilities.log().float().cuda(), SamplingParams(seed=3, n=2), steps=10_000)
    assert_distributed(counts, probabilities)

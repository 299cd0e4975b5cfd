"""What the fused sampling kernels must agree with, on any device: the twin in torch."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import common.ops.sampling as fused
from common.ops.noise import log2_exponential, random_bits, stream_key
from common.sampling import INVALID_TOKEN, Sampler, SamplingParams
from common.truncation import lowest_score, top_p_mask

# Below this score (an exponent of 2) no token can win the race: kernels may drop it, the twin not.
LOWEST_SCORE = -40.0

GREEDY = SamplingParams(temperature=0.0)
MIXED = (
    GREEDY,
    SamplingParams(seed=1),
    SamplingParams(temperature=0.7, min_p=0.01, seed=2),
    SamplingParams(top_k=5, seed=3),
    SamplingParams(top_p=0.8, seed=4),
    SamplingParams(temperature=1.5, top_k=50, top_p=0.9, seed=5),
    SamplingParams(top_k=290, seed=6),
    SamplingParams(top_p=0.95, repetition_penalty=1.3, logit_bias={5: 2.0}, seed=7),
    SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5, min_tokens=2,
                   stop_token_ids=[3]),
    SamplingParams(temperature=0.3, min_p=0.1, top_k=3, top_p=0.9, frequency_penalty=-0.3,
                   logit_bias={i: (-1) ** i * 3.0 for i in range(0, 300, 7)}, seed=8),
    SamplingParams(temperature=30.0, min_p=0.5, top_p=0.7, seed=9),
)  # fmt: skip
# What decides the kept set: several boundaries at once, none, and extreme temperatures.
TRUNCATED = (
    *[SamplingParams(top_k=k) for k in (1, 20, 150, 299)],
    *[SamplingParams(top_p=p) for p in (1e-6, 0.5, 0.9, 0.999)],
    SamplingParams(min_p=0.02),
    SamplingParams(min_p=1.0, top_k=10, top_p=0.5),
    SamplingParams(top_k=20, top_p=0.95, temperature=0.6),
    SamplingParams(top_k=200, top_p=0.7, min_p=1e-4),
    *[SamplingParams(top_k=40, top_p=0.6, temperature=t) for t in (1e-5, 100.0, 1e30)],
    *[SamplingParams(top_p=0.6, temperature=t) for t in (0.01, 1e30)],
)


def random_logits(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def make_sampler(
    all_params: tuple[SamplingParams, ...], vocab_size: int, device: str, kernels: str
) -> tuple[Sampler, list[str]]:
    sampler = Sampler(vocab_size, device, kernels=kernels)
    keys = [str(i) for i in range(len(all_params))]
    for key, params in zip(keys, all_params, strict=True):
        sampler.add_request(key, params, [1, 2, 3], [4], (7,))
    return sampler, keys


def check_tokens(logits: Tensor, all_params: tuple[SamplingParams, ...] = MIXED) -> None:
    """The tokens of both, for ``logits`` [steps, B, V]; both are fed the twin's tokens' state.

    Keys of the race are rounded differently, so that two tokens may change places that are as good
    as equal: at most one row in a thousand, and never a greedy one.
    """
    device, vocab_size = logits.device.type, logits.shape[-1]
    differing = []
    for kernels in ("torch", "fused"):
        sampler, keys = make_sampler(all_params, vocab_size, device, kernels)
        differing.append(torch.stack([sampler(step, keys).token_ids for step in logits]))
    expected, tokens = differing
    unequal = (expected != tokens).cpu()
    greedy = torch.tensor([params.is_greedy for params in all_params])
    assert not (unequal & greedy).any()
    assert unequal.sum() <= 1 + unequal.numel() // 1000, unequal.nonzero()


def check_kept_tokens(logits: Tensor, params: SamplingParams, monkeypatch) -> None:
    """The kept set of each row of ``logits`` [B, V] is the twin's on the very same weights."""
    batch, vocab_size = logits.shape
    limits = []
    find_limits = fused.find_limits

    def spy(*args):
        limits.extend(find_limits(*args))
        return limits

    with monkeypatch.context() as patch:
        patch.setattr(fused, "find_limits", spy)
        # The first request makes the second kernel's limits be found even for min-p alone.
        all_params = (SamplingParams(top_k=1), *[params] * (batch - 1))
        sampler, keys = make_sampler(all_params, vocab_size, logits.device.type, "fused")
        sampler(logits, keys)
    least_scores, least_weights, last_tokens = (limit[1:, None] for limit in limits)

    logits = logits[1:].float()
    scale = torch.tensor(math.log2(math.e) / params.temperature, dtype=torch.float64).float()
    scores = (logits - logits.amax(1, keepdim=True)) * scale.to(logits.device)
    weights = kernel_exp2(scores)
    token = torch.arange(vocab_size, device=logits.device)
    kept = (weights > least_weights) | ((weights == least_weights) & (token <= last_tokens))
    kept &= scores >= least_scores

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((batch - 1, 1), value, dtype=dtype, device=logits.device)

    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    log2_min_p = math.log2(params.min_p) if params.min_p else -math.inf
    lowest = lowest_score(
        scores, column(top_k, torch.int64), top_k, column(log2_min_p, torch.float32)
    )
    expected = scores >= lowest
    if params.top_p < 1.0:
        expected &= top_p_mask(weights * expected, column(params.top_p, torch.float64)).bool()
    matters = scores >= LOWEST_SCORE
    assert torch.equal(kept & matters, expected & matters)


def check_unusable_logits(
    device: str,
    dtype: torch.dtype,
    vocab_size: int,
    choices: tuple[SamplingParams, ...] = (GREEDY, SamplingParams(seed=0), *TRUNCATED),
) -> None:
    for params in choices:
        logits = random_logits(6, vocab_size, seed=0, dtype=dtype).to(device)
        logits[1, vocab_size // 2] = math.nan
        logits[2, -1] = -math.nan
        logits[3, 0] = math.inf
        logits[4, :] = -math.inf
        logits[5, :-1] = -math.inf  # one token is left: nothing wrong with that
        sampler, keys = make_sampler((params,) * 6, vocab_size, device, "fused")
        for _ in range(2):
            tokens = sampler(logits, keys).token_ids.tolist()
            assert tokens[1:5] == [INVALID_TOKEN] * 4
            assert 0 <= tokens[0] < vocab_size
            assert tokens[5] == vocab_size - 1


def check_row_alone(logits: Tensor, all_params: tuple[SamplingParams, ...] = MIXED) -> None:
    """Each row of ``logits`` [steps, B, V] gets the tokens alone that it gets in the batch."""
    device, vocab_size = logits.device.type, logits.shape[-1]
    sampler, keys = make_sampler(all_params, vocab_size, device, "fused")
    together = torch.stack([sampler(step, keys).token_ids for step in logits])
    for i, (key, params) in enumerate(zip(keys, all_params, strict=True)):
        alone = Sampler(vocab_size, device, kernels="fused")
        alone.add_request(key, params, [1, 2, 3], [4], (7,))
        tokens = [alone(step[i : i + 1], [key]).token_ids.item() for step in logits]
        assert tokens == together[:, i].tolist(), params


@triton.jit
def _noise_kernel(seeds, steps, bits, noise, COUNT: tl.constexpr):
    row = tl.program_id(0)
    token = tl.arange(0, COUNT)
    key = stream_key(tl.load(seeds + row), tl.load(steps + row))
    random = random_bits(token, key)
    tl.store(bits + row * COUNT + token, random.to(tl.int32, bitcast=True))
    tl.store(noise + row * COUNT + token, log2_exponential(random))


@triton.jit
def _log2_exponential_kernel(bits, out, COUNT: tl.constexpr):
    entry = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(out + entry, log2_exponential(tl.load(bits + entry).to(tl.uint32, bitcast=True)))


@triton.jit
def _exp2_kernel(x, out, length, COUNT: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    tl.store(out + entry, tl.exp2(tl.load(x + entry, mask=entry < length)), mask=entry < length)


def kernel_noise(seeds: Tensor, steps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The kernels' random bits (int32) and log2 of noise, [rows, count] for a power of two."""
    bits = torch.empty(len(seeds), count, dtype=torch.int32, device=seeds.device)
    noise = torch.empty(len(seeds), count, device=seeds.device)
    _noise_kernel[(len(seeds),)](seeds, steps, bits, noise, count)
    return bits, noise


def kernel_log2_exponential(bits: Tensor) -> Tensor:
    """Of int32 ``bits``, a multiple of 1024 of them."""
    out = torch.empty(bits.shape, device=bits.device)
    _log2_exponential_kernel[(bits.numel() // 1024,)](bits, out, 1024)
    return out


def kernel_exp2(x: Tensor) -> Tensor:
    x, out = x.contiguous(), torch.empty(x.shape, device=x.device)
    _exp2_kernel[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), 4096)
    return out


def check_noise(device: str) -> None:
    """The bits are those of `common.random`; their logarithm is right to 2e-5, even of small E."""
    from common.random import hash_tokens

    seeds = torch.tensor([0, 1, -1, 12345678901234567, -(2**63), 2**63 - 1], device=device)
    steps = torch.tensor([0, 1, 2, 1000, 2**31, 2**40], device=device)
    bits, noise = kernel_noise(seeds, steps, 512)
    assert torch.equal(bits, hash_tokens(seeds, steps, 512))
    assert torch.equal(noise.flatten(), kernel_log2_exponential(bits.flatten()))

    powers = torch.arange(1 << 12).remainder(32)
    random = torch.randint(2**32, (1 << 12,), generator=torch.Generator().manual_seed(0))
    some = torch.cat([torch.arange(1 << 11), 2**32 - 1 - torch.arange(1 << 11), random >> powers])
    v = (some.double() + 0.5) / 2**32
    exact = (-torch.log1p(-v)).log2()
    got = kernel_log2_exponential(some.int().to(device)).cpu().double()
    # The twin's last few hashes are rounded to 1 - 2**-24 all alike: E from 16.6 to 22.9.
    rounded = v > 1 - 2.0**-20
    assert (got - exact)[~rounded].abs().max() < 2e-5
    assert (got[rounded] > math.log2(13)).all()
    assert (got[rounded] < math.log2(17)).all()
    assert got.isfinite().all()


def params_id(params: SamplingParams) -> str:
    fields = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    changed = [f"{k}={getattr(params, k)}" for k, v in fields.items() if getattr(params, k) != v]
    return ",".join(changed)


by_params = pytest.mark.parametrize("params", TRUNCATED, ids=params_id)

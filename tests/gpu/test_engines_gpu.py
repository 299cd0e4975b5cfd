"""Engines on a CUDA GPU: the same tokens as on the CPU, whatever the kernels and the cache."""

from __future__ import annotations

import pytest
import torch
from support import (
    BATCHING,
    MILESTONES,
    TINY_MODELS,
    assert_cache_is_empty,
    new_llm,
    random_prompts,
    small_cache,
    tokens,
)

from common.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = random_prompts(0, (3, 40, 17, 64, 1, 25))
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
BACKENDS = ("torch", "triton", "cuda")


def generate(milestone, model, prompts=PROMPTS, params=GREEDY, **options):
    llm = new_llm(milestone, model, **options)
    outputs = [tokens(output) for output in llm.generate(prompts, params)]
    assert_cache_is_empty(llm.engine)
    return outputs


@pytest.mark.parametrize("model", TINY_MODELS)
@pytest.mark.parametrize("milestone", MILESTONES)
def test_float32_tokens_are_those_of_the_cpu(milestone, model):
    assert generate(milestone, model, device="cuda") == generate("m1_basic", model)


@pytest.mark.parametrize("block_size", [8, 16, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(backend, block_size):
    model = "random:tiny-qwen3"
    options = {"device": "cuda", "attention_backend": backend, "block_size": block_size}
    assert generate("m3_paged", model, **options) == generate("m1_basic", model)


@pytest.mark.parametrize("milestone", BATCHING)
def test_preemption_does_not_change_tokens(milestone):
    model = "random:tiny-qwen2"
    prompts = random_prompts(1, (10, 12, 14, 15, 9))  # they fit together, and outgrow the cache
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    llm = new_llm(milestone, model, device="cuda", **small_cache(milestone, 96))
    outputs = [tokens(output) for output in llm.generate(prompts, params)]
    assert llm.stats()["num_preemptions"] > 0
    assert_cache_is_empty(llm.engine)
    assert outputs == generate("m1_basic", model, prompts, params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_share_blocks_and_part(backend):
    params = SamplingParams(n=4, seed=7, temperature=1.0, max_tokens=20, ignore_eos=True)
    options = {"device": "cuda", "attention_backend": backend}
    shared = generate("m3_paged", "random:tiny-llama", params=params, **options)
    alone = generate("m1_basic", "random:tiny-llama", params=params)
    assert shared == alone
    assert len({tuple(sample) for sample in shared[1]}) > 1


@pytest.mark.parametrize("milestone", MILESTONES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(milestone, dtype):
    """Log-probabilities of the same tokens, against float32."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, logprobs=0)

    def scores(**options):
        llm = new_llm(milestone, "random:tiny-llama", **options)
        output = llm.generate([PROMPTS[1]], params)[0]
        return torch.tensor(
            [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        )

    exact = scores()
    assert torch.allclose(scores(device="cuda", dtype=dtype), exact, atol=0.15)
    assert torch.allclose(scores(device="cuda"), exact, atol=1e-3)


@pytest.mark.parametrize("milestone", MILESTONES)
def test_a_prompt_too_large_for_memory_fails_alone(milestone):
    """A step of 39,000 tokens takes more than this process may have; the short ones go on.

    Up to m3 that is the scores, 97 GB in float32; in m4 activations of 1 GB. From m5 on no step is
    that long, and nobody fails.
    """
    llm = new_llm(
        milestone, "random:qwen3-0.6b", device="cuda", dtype="bfloat16", max_model_len=40_000,
        **({} if milestone < "m2" else {"max_num_batched_tokens": 2048}),
        **small_cache(milestone, 48_000),
    )
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + ((6 << 30) if milestone < "m4" else (400 << 20))
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    try:
        outputs = llm.generate([[1] * 10, [2] * 39_000, [3] * 10], GREEDY)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["length", "error" if milestone < "m5" else "length", "length"]
    if milestone < "m5":
        assert "memory" in outputs[1].outputs[0].stop_reason
    assert_cache_is_empty(llm.engine)

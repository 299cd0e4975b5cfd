"""Rotary embedding: every scaling against transformers, which is the definition here."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from common.config import ModelConfig
from common.rope import RotaryEmbedding, inverse_frequencies, rotate

ORIGINAL_LEN = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL_LEN}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_LEN,
}

FIXED = {
    "default": {"rope_type": "default"},
    "default of long wavelengths": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3 of Llama 3.1": {
        **LLAMA3,
        "rope_theta": 500_000.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3 of one step": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 1.001},
    "yarn": YARN,
    "yarn of Qwen": {
        **YARN,
        "rope_theta": 1e6,
        "original_max_position_embeddings": 32768,
    },
    "yarn with attention_factor": {**YARN, "attention_factor": 1.5},
    "yarn with mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn with mscale alone": {**YARN, "mscale": 0.707},
    "yarn with betas": {**YARN, "beta_fast": 8, "beta_slow": 2},
    "yarn not truncated": {**YARN, "truncate": False},
    "yarn of no passage": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "yarn with derived factor": {**YARN, "factor": None},
    "yarn that shrinks": {**YARN, "factor": 0.5},
}


def both(
    rope: dict, head_dim: int = 32, dtype: torch.dtype = torch.float32, max_positions: int = 300
) -> tuple[RotaryEmbedding, LlamaRotaryEmbedding]:
    # Derived factors divide by this; the dynamic type takes it for the original length.
    longest = ORIGINAL_LEN if rope["rope_type"] == "dynamic" else 4 * ORIGINAL_LEN
    theirs = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=longest,
        rope_parameters={"rope_theta": 10_000.0, **rope},
    )
    ours = ModelConfig.from_dict({**theirs.to_dict(), "architectures": ["LlamaForCausalLM"]})
    embedding = RotaryEmbedding(ours, max_positions=max_positions, dtype=dtype, device="cpu")
    return embedding, LlamaRotaryEmbedding(theirs)


def assert_same_rotation(
    ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Ours negates the first half of sin, where theirs negates half of what it multiplies."""
    (cos, sin), (their_cos, their_sin) = ours, theirs
    half = cos.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    tolerance = {"rtol": 0, "atol": 1e-5 if cos.dtype == torch.float32 else 1e-2}
    torch.testing.assert_close(cos.squeeze(-2), their_cos, **tolerance)
    torch.testing.assert_close(sin.squeeze(-2), their_sin, **tolerance)


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("rope", FIXED.values(), ids=FIXED)
def test_fixed_frequencies(rope, head_dim):
    ours, theirs = both(rope, head_dim)
    positions = torch.randint(0, 300, (2, 50))
    x = torch.empty(0)
    assert_same_rotation(ours(positions), theirs(x, positions))


@pytest.mark.parametrize("rope", FIXED.values(), ids=FIXED)
def test_frequencies_to_the_last_bits(rope):
    _, theirs = both(rope)
    config = {**theirs.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    frequencies, scale = inverse_frequencies(ModelConfig.from_dict(config))
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=2e-7, atol=0)
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_far_positions():
    ours, theirs = both(FIXED["llama3 of Llama 3.1"], head_dim=64, max_positions=131_072)
    positions = torch.tensor([[0, 8191, 8192, 100_000, 131_071]])
    assert_same_rotation(ours(positions), theirs(torch.empty(0), positions))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_the_dtype_of_the_model(dtype):
    ours, theirs = both(YARN, dtype=dtype)
    positions = torch.arange(200)[None]
    cos_sin = ours(positions)
    assert cos_sin[0].dtype == dtype
    assert_same_rotation(cos_sin, theirs(torch.empty(0, dtype=dtype), positions))


def test_leading_dimensions_are_free():
    ours, _ = both(YARN)
    positions = torch.arange(12)
    flat = ours(positions)
    for shape in ((3, 4), (2, 2, 3)):
        for one, other in zip(ours(positions.view(shape)), flat, strict=True):
            assert one.shape == (*shape, 1, 32)
            assert torch.equal(one.reshape(12, 1, 32), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate(dtype):
    ours, theirs = both(FIXED["default"], dtype=dtype)
    positions = torch.randint(0, 300, (2, 7))
    q, k = torch.randn(2, 7, 4, 32).to(dtype), torch.randn(2, 7, 2, 32).to(dtype)
    expected = apply_rotary_pos_emb(q, k, *theirs(q, positions), unsqueeze_dim=2)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-2
    for x, turned in zip((q, k), expected, strict=True):
        result = rotate(x, *ours(positions))
        assert result.dtype == dtype
        torch.testing.assert_close(result, turned, rtol=0, atol=tolerance)


# Dynamic: frequencies depend on the length a token is rotated for.

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize("factor", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("length", [10, ORIGINAL_LEN, ORIGINAL_LEN + 1, 100, 250])
def test_dynamic_prompt(length, factor):
    ours, theirs = both({"rope_type": "dynamic", "factor": factor})
    positions = torch.arange(length)[None]
    lens = torch.full_like(positions, length)
    assert_same_rotation(ours(positions, lens), theirs(torch.empty(0), positions))


def test_dynamic_decode():
    ours, theirs = both(DYNAMIC)
    for position in range(ORIGINAL_LEN - 3, ORIGINAL_LEN + 20):
        positions = torch.tensor([[position]])
        expected = theirs(torch.empty(0), positions)
        assert_same_rotation(ours(positions), expected)  # by default as long as it is deep
        assert_same_rotation(ours(positions, positions + 1), expected)


def test_dynamic_tokens_of_unlike_lengths_share_a_batch():
    ours, _ = both(DYNAMIC)
    positions, lens = torch.tensor([5, 80, 5, 120]), torch.tensor([200, 81, 6, 130])
    together = ours(positions, lens)
    for index in range(len(positions)):
        alone = ours(positions[index : index + 1], lens[index : index + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[index], rtol=0, atol=1e-6)


def test_only_dynamic_looks_at_the_lengths():
    positions = torch.arange(5)
    for rope in (FIXED["default"], YARN):
        ours, _ = both(rope)
        for one, other in zip(ours(positions), ours(positions, positions + 100), strict=True):
            assert torch.equal(one, other)

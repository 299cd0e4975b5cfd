"""The fused operations on a GPU: against float64 and plain torch, alone and in whole models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import TINY_MODELS
from torch import Tensor

from common.layers import Ops
from common.model import Transformer
from common.ops import get_ops
from common.presets import PREFIX, preset_config, random_weights

pytest.importorskip("triton", reason="Triton is not installed")

from ops_cases import EPS, RopeCase, check_norms, check_qk_norm_rope, check_silu_mul

from common.ops.activation import silu_mul
from common.ops.launch import supports_pdl
from common.ops.norm import add_rms_norm, rms_norm

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEADING = ((1,), (3,), (2, 4), (129,), (1000,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 6, 80, 576, 1024, 5120, 16384])
def test_norms(n, dtype):
    for leading in LEADING:
        check_norms(leading, n, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [1, 3, 160, 1536, 12288])
def test_silu_mul(inner, dtype):
    for leading in LEADING:
        check_silu_mul(leading, inner, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [12, 16, 64, 80, 96, 128, 256])
def test_qk_norm_rope(head_dim, dtype):
    for heads, kv_heads, norm, packed in (
        (16, 8, True, True),
        (9, 3, False, True),
        (40, 2, True, False),
        (3, 3, False, False),
    ):
        for tokens in (1, 130):
            case = RopeCase(tokens, heads, kv_heads, head_dim, dtype, norm, packed)
            check_qk_norm_rope(case, "cuda")


def test_kernels_that_begin_early():
    if not supports_pdl(torch.device("cuda", 0)):
        pytest.skip("needs a Hopper GPU or later")
    for num_rows in (1, 100):
        check_norms((num_rows,), 1024, torch.bfloat16, "cuda", pdl=True)
        check_silu_mul((num_rows,), 3072, torch.bfloat16, "cuda", pdl=True)
        check_qk_norm_rope(RopeCase(num_rows, dtype=torch.bfloat16), "cuda", pdl=True)


def test_many_rows():
    for dtype in DTYPES:
        check_norms((8192,), 1024, dtype, "cuda")
        check_silu_mul((8192,), 3072, dtype, "cuda")
        check_qk_norm_rope(RopeCase(8192, 16, 8, 128, dtype), "cuda")


def test_offsets_beyond_32_bits():
    """Rows that start after more than 2**31 elements."""
    n, num_rows = 4096, 2**31 // 4096 + 3
    x = torch.zeros(num_rows, n, dtype=torch.bfloat16, device="cuda")
    x[-1].normal_()
    weight = torch.randn(n, dtype=torch.bfloat16, device="cuda")
    last = x[-1:].clone()
    assert torch.equal(rms_norm(x, weight, EPS)[-1:], rms_norm(last, weight, EPS))
    out, total = add_rms_norm(x, x, weight, EPS)
    assert torch.equal(total[-1:], 2 * last)
    assert torch.equal(out[-1:], rms_norm(2 * last, weight, EPS))
    del out, total
    assert torch.equal(silu_mul(x)[-1:], silu_mul(last))


# ---- whole models --------------------------------------------------------------------------------


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(0, 1)


def tiny_model(name: str, ops: Ops, dtype: torch.dtype) -> Transformer:
    config = preset_config(name.removeprefix(PREFIX))
    model = Transformer(config, dtype=dtype, device="cuda", ops=ops)
    model.load_weights(random_weights(config, 0, "cuda"))
    return model


def logits_of(model: Transformer, num_tokens: int) -> Tensor:
    ids = torch.arange(num_tokens, device="cuda") % 320
    return model.compute_logits(model(ids, torch.arange(num_tokens, device="cuda"), attend))


@pytest.mark.parametrize("num_tokens", [1, 8, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_models_give_the_same_logits(name, num_tokens):
    plain, ours = (
        logits_of(tiny_model(name, ops, torch.float32), num_tokens)
        for ops in (Ops(), get_ops("cuda"))
    )
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.argmax(-1), plain.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 8, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_half_precision_is_as_near_to_float32_as_plain_torch(name, num_tokens, dtype):
    exact = logits_of(tiny_model(name, Ops(), torch.float32), num_tokens)
    plain, ours = (
        (logits_of(tiny_model(name, ops, dtype), num_tokens).float() - exact).norm()
        for ops in (Ops(), get_ops("cuda"))
    )
    assert ours < 1.3 * plain + 1e-3 * exact.norm()


@pytest.mark.parametrize("num_tokens", [1, 8, 33])
def test_early_launches_never_read_too_soon(num_tokens):
    """A graph of a whole model, where each kernel begins before the last has ended."""
    model = tiny_model("tiny-qwen3", get_ops("cuda"), torch.bfloat16)
    positions = torch.arange(num_tokens, device="cuda")
    ids = torch.zeros(num_tokens, dtype=torch.int64, device="cuda")

    def step() -> Tensor:
        return model.compute_logits(model(ids, positions, attend))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    for seed in range(50):
        torch.manual_seed(seed)
        ids.copy_(torch.randint(0, 320, (num_tokens,)))
        wanted = step().clone()
        logits.fill_(float("nan"))
        graph.replay()
        assert torch.equal(logits, wanted)

"""The fused operations: interpreted on the CPU, what they are put together to, and who chooses."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import torch
import torch.nn.functional as F
from support import TINY_MODELS

from common.layers import Linear, Ops
from common.model import Transformer
from common.ops import get_ops
from common.presets import PREFIX, preset_config, random_weights

# Triton decides at its first import whether it compiles or interprets, so these run in a child.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_in_interpreter")
if INTERPRETED:
    import ops_cases
    from ops_cases import RopeCase

    from common.ops import fused

    FLOATS = (torch.float32, torch.float16)  # NumPy, which interprets, has no bfloat16
    ROPE_CASES = [
        RopeCase(),
        RopeCase(tokens=1, num_heads=3, num_kv_heads=1, head_dim=80, norm=False),
        RopeCase(tokens=9, num_heads=9, num_kv_heads=3, head_dim=12, dtype=torch.float16),
        RopeCase(num_heads=16, num_kv_heads=16, head_dim=128, packed=False),
    ]
else:
    FLOATS, ROPE_CASES = (), []


@in_interpreter
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("leading", "n"), [((3,), 64), ((2, 5), 576), ((1,), 1), ((4,), 6)])
def test_norms_interpreted(leading, n, dtype):
    ops_cases.check_norms(leading, n, dtype)


@in_interpreter
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("leading", "inner"), [((3,), 160), ((2, 2), 1500), ((1,), 3)])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_mul_interpreted(leading, inner, dtype):
    ops_cases.check_silu_mul(leading, inner, dtype)


@in_interpreter
@pytest.mark.parametrize("case", ROPE_CASES, ids=str)
def test_qk_norm_rope_interpreted(case):
    ops_cases.check_qk_norm_rope(case)


@in_interpreter
def test_no_rows_interpreted():
    empty, weight = torch.empty(0, 8), torch.ones(8)
    assert fused.rms_norm(empty, weight, 1e-6).shape == (0, 8)
    assert fused.silu_mul(empty).shape == (0, 4)
    q, k, cos = torch.empty(0, 4, 8), torch.empty(0, 2, 8), torch.empty(0, 1, 8)
    q, k = fused.qk_norm_rope(q, k, k, None, None, 1e-6, cos, cos)
    assert (q.shape, k.shape) == ((0, 4, 8), (0, 2, 8))


@in_interpreter
def test_what_a_kernel_would_misread_is_refused_interpreted():
    x, cache, slots = torch.zeros(3, 2, 8), torch.zeros(4, 8, 2, 8), torch.zeros(3).long()
    cos = torch.zeros(3, 1, 8)

    def rotate(cos=cos, k_cache=cache, v_cache=cache, slot_mapping=slots):
        caches = {"k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping}
        fused.qk_norm_rope(x, x, x, None, None, 1e-6, cos, cos, **caches)

    rotate()
    with pytest.raises(ValueError, match="cos and sin must be"):
        rotate(cos=cos[:2])
    with pytest.raises(ValueError, match="v_cache must be contiguous"):
        rotate(v_cache=cache.half())
    with pytest.raises(ValueError, match="k_cache must be contiguous"):
        rotate(k_cache=cache[:, :, :1])
    with pytest.raises(ValueError, match="int64"):
        rotate(slot_mapping=slots.int())
    with pytest.raises(ValueError, match="go together"):
        rotate(slot_mapping=None)
    with pytest.raises(ValueError, match="one shape"):
        fused.add_rms_norm(x, x[:2], torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match=r"weight must be \[8\]"):
        fused.rms_norm(x, torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match="one size"):
        fused.silu_mul(torch.zeros(2, 5))


# ---- the whole model -----------------------------------------------------------------------------


class CausalAttention:
    """Attention of [..., T, heads, D] to all tokens before; ``unrotated``: it rotates by itself."""

    def __init__(self, unrotated: bool = False) -> None:
        self.takes_unrotated = unrotated
        self.calls = 0

    def __call__(self, layer, q, k, v):
        q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(-2, -3)

    def rotate_and_attend(self, layer, q, k, v, q_weight, k_weight, eps, cos, sin):
        self.calls += 1
        return self(layer, *Ops().qk_norm_rope(q, k, q_weight, k_weight, eps, cos, sin), v)


def tiny_model(name: str, ops: Ops, dtype: torch.dtype = torch.float32) -> Transformer:
    config = preset_config(name.removeprefix(PREFIX))
    model = Transformer(config, dtype=dtype, device="cpu", ops=ops)
    model.load_weights(random_weights(config, 0, "cpu"))
    return model


@in_interpreter
@pytest.mark.parametrize("leading", [(7,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_models_are_the_same_interpreted(name, leading):
    ids = torch.randint(0, 320, leading)
    positions = torch.arange(leading[-1]).expand(leading)
    plain, ours = (
        tiny_model(name, ops)(ids, positions, CausalAttention())
        for ops in (Ops(), get_ops("cpu", "fused"))
    )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@in_interpreter
def test_attention_that_rotates_is_given_everything_interpreted():
    attend, ids = CausalAttention(unrotated=True), torch.arange(5)
    model = tiny_model("tiny-qwen3", get_ops("cpu", "fused"))
    hidden = model(ids, ids, attend)
    assert attend.calls == len(model.layers)
    attend.takes_unrotated = False  # it may change from step to step
    torch.testing.assert_close(model(ids, ids, attend), hidden, rtol=1e-5, atol=1e-5)
    assert attend.calls == len(model.layers)


@pytest.fixture
def products(monkeypatch):
    """Our matrix products in plain torch, and which of them were called on how many rows."""
    calls = []

    def skinny_linear(x, weight, bias=None, *, silu_mul=False, pdl=False):
        calls.append(("linear", len(x)))
        y = F.linear(x, weight, bias)
        return Ops().silu_mul(y) if silu_mul else y

    def skinny_norm_linear(
        x, residual, norm_weight, eps, weight, bias=None, *, silu_mul=False, pdl=False
    ):
        calls.append(("norm_linear", len(x)))
        total = x if residual is None else x + residual
        y = F.linear(Ops().rms_norm(total, norm_weight, eps), weight, bias)
        return (Ops().silu_mul(y) if silu_mul else y), total

    def up_to(most):
        return lambda rows, out_features, in_features, dtype: rows <= most

    monkeypatch.setattr(fused.matmul, "skinny_linear", skinny_linear)
    monkeypatch.setattr(fused.matmul, "skinny_norm_linear", skinny_norm_linear)
    monkeypatch.setattr(fused.matmul, "pays", up_to(4))
    monkeypatch.setattr(fused.matmul, "norm_pays", up_to(2))
    return calls


@in_interpreter
@pytest.mark.parametrize(
    ("rows", "of_a_layer"),
    [
        (2, ["norm_linear", "linear", "norm_linear", "linear"]),
        (4, ["linear"] * 4),
        (5, []),
    ],
)
def test_products_are_ours_while_they_pay_interpreted(products, monkeypatch, rows, of_a_layer):
    monkeypatch.setattr(Linear, "finish_loading", lambda self: None)  # plain, as on a GPU
    ids = torch.arange(rows)
    name, dtype = "tiny-qwen2", torch.float16
    plain, ours = (tiny_model(name, ops, dtype) for ops in (Ops(), fused.FusedOps()))
    hidden = ours(ids, ids, CausalAttention())
    torch.testing.assert_close(hidden, plain(ids, ids, CausalAttention()), rtol=0.02, atol=0.02)
    assert products == [(name, rows) for name in of_a_layer] * len(ours.layers)
    ours.compute_logits(hidden)
    assert len(products) == len(of_a_layer) * len(ours.layers) + (1 if of_a_layer else 0)


@in_interpreter
def test_other_linear_layers_compute_by_themselves_interpreted(products):
    class Other(Linear):
        pass

    for cls, dtype, taken in (
        (Linear, torch.float16, True),
        (Other, torch.float16, False),
        (Linear, torch.float32, False),
    ):
        linear = cls(8, [4, 4], False, name="any", dtype=dtype, device="cpu")
        linear.weight.normal_()
        x, weight = torch.randn(1, 8, dtype=dtype), torch.ones(8, dtype=dtype)
        for run in (
            lambda ops, x=x, linear=linear: ops.linear(x, linear),
            lambda ops, x=x, linear=linear, w=weight: ops.norm_linear(x, None, w, 1e-6, linear)[0],
            lambda ops, x=x, linear=linear, w=weight: ops.norm_gate_up(x, x, w, 1e-6, linear)[0],
        ):
            products.clear()
            torch.testing.assert_close(run(fused.FusedOps()), run(Ops()), rtol=1e-2, atol=1e-2)
            assert bool(products) == taken


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_triton_in_interpreter():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("this Triton's interpreter cannot loop with this NumPy")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        [*command, "-k", "interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " skipped" not in child.stdout, child.stdout


# ---- choosing ------------------------------------------------------------------------------------


def test_auto_is_torch_on_the_cpu():
    assert get_ops("cpu").name == "torch"
    assert type(get_ops("cpu", "torch")) is Ops


def test_auto_is_torch_without_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert get_ops("cuda").name == "torch"
    with pytest.raises(RuntimeError, match=r"pip install triton.*'torch'"):
        get_ops("cuda", "fused")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_fused_operations_without_gpu_are_refused():
    with pytest.raises(ValueError, match=r"need a CUDA device, not cpu.*'torch'"):
        get_ops("cpu", "fused")


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match=r"unknown operations 'triton'.*fused"):
        get_ops("cpu", "triton")


def test_choosing_torch_imports_no_triton():
    code = "import sys, common.ops; common.ops.get_ops('cpu'); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

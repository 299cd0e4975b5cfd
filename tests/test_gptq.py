"""GPTQ against a slow, plain telling of it, and against rounding to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch

from m7_gptq.gptq import (
    Hessian,
    QuantizeConfig,
    fit,
    gptq,
    inverse_factor,
    objective,
    quantize,
    round_to_nearest,
)
from m7_gptq.packing import SUPPORTED_BITS, pack_linear

OUTPUTS, INPUTS, TOKENS = 16, 96, 400
CONFIG = QuantizeConfig(bits=4, group_size=32, block_size=16)


def problem(seed: int = 0, outputs: int = OUTPUTS, inputs: int = INPUTS, tokens: int = TOKENS):
    """A weight and the Hessian of inputs that are correlated and of unequal size, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixing = normal(inputs, inputs) * inputs**-0.5 + torch.eye(inputs, dtype=torch.float64)
    x = normal(tokens, inputs) @ mixing * torch.exp(normal(inputs))
    hessian = Hessian(inputs, dtype=torch.float64)
    hessian.add(x)
    return normal(outputs, inputs), hessian.matrix


def slow_gptq(weight, hessian, config):
    """Column by column, all later ones updated at once, H inverted anew for what is left.

    No Cholesky factor, no blocks: the step of Optimal Brain Surgeon as the paper's equations 2
    and 3 have it, in float64.
    """
    w, h = weight.clone(), hessian.clone()
    inputs = w.shape[1]
    size = inputs if config.group_size == -1 else config.group_size
    for column in range(inputs):
        if h[column, column] == 0:
            h[column, column] = 1
            w[:, column] = 0
    order = list(range(inputs))
    if config.desc_act:
        order.sort(key=lambda column: -h[column, column].item())
    h += config.damp_percent * h.diagonal().mean() * torch.eye(inputs, dtype=h.dtype)
    grids, g_idx = {}, [None] * inputs
    if config.static_groups:
        for group in range(inputs // size):
            grids[group] = fit(w[:, group * size : (group + 1) * size], config)
    codes = torch.zeros_like(w)
    for place, column in enumerate(order):
        group = (column if config.static_groups else place) // size
        if group not in grids:
            grids[group] = fit(w[:, order[place : place + size]], config)
        g_idx[column] = group
        scale, zero = grids[group]
        codes[:, column] = (w[:, column] / scale + zero).round().clamp(0, 2**config.bits - 1)
        left = order[place:]
        inverse = torch.linalg.inv(h[left][:, left])
        error = w[:, column] - (codes[:, column] - zero) * scale
        w[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
    scales, zeros = (
        torch.stack([grids[group][part] for group in range(inputs // size)], dim=1)
        for part in (0, 1)
    )
    return codes, scales, zeros, g_idx


def assert_equals_slow(weight, hessian, config):
    fast = gptq(weight, hessian, config)
    codes, scales, zeros, g_idx = slow_gptq(weight, hessian, config)
    assert fast.g_idx.tolist() == g_idx
    assert torch.equal(fast.scales.double(), scales)
    assert torch.equal(fast.zeros.double(), zeros)
    assert torch.equal(fast.codes.double(), codes)


class TestAgainstTheSlowOne:
    @pytest.mark.parametrize("bits", SUPPORTED_BITS)
    @pytest.mark.parametrize(
        ("sym", "desc_act", "static_groups"), list(itertools.product([True, False], repeat=3))
    )
    def test_every_option(self, bits, sym, desc_act, static_groups):
        config = QuantizeConfig(
            bits, 32, sym=sym, desc_act=desc_act, static_groups=static_groups, block_size=16
        )
        assert_equals_slow(*problem(bits), config)

    @pytest.mark.parametrize("group_size", [8, 16, 24, 48, 96, -1])
    @pytest.mark.parametrize("block_size", [1, 7, 32, 128])
    def test_groups_begin_anywhere_in_a_block(self, group_size, block_size):
        """Scales come from weights that all earlier errors have reached, wherever they wait."""
        config = QuantizeConfig(4, group_size, sym=False, desc_act=True, block_size=block_size)
        assert_equals_slow(*problem(1), config)

    @pytest.mark.parametrize("desc_act", [False, True])
    def test_dead_columns(self, desc_act):
        weight, hessian = problem(2)
        dead = [0, 5, 95]
        hessian[dead] = 0
        hessian[:, dead] = 0
        config = QuantizeConfig(4, 32, desc_act=desc_act, block_size=16)
        assert_equals_slow(weight, hessian, config)
        assert (gptq(weight, hessian, config).dequantize()[:, dead] == 0).all()

    @pytest.mark.parametrize("damp_percent", [0.001, 0.5])
    def test_damping(self, damp_percent):
        assert_equals_slow(*problem(3), QuantizeConfig(4, 32, damp_percent=damp_percent))

    def test_the_factor(self):
        _, hessian = problem(4)
        factor, damping = inverse_factor(hessian, 0.01, "it")
        assert damping == 0.01
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(INPUTS)
        torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped))
        assert torch.equal(factor, factor.triu())


class TestObjective:
    def test_it_is_the_error_of_the_outputs(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(50, INPUTS, generator=generator, dtype=torch.float64)
        weight, _ = problem()
        hessian = Hessian(INPUTS, dtype=torch.float64)
        hessian.add(x[:20])
        hessian.add(x[20:].view(2, 15, INPUTS))
        quantized = round_to_nearest(weight, CONFIG)
        outputs = x @ (weight - quantized.dequantize()).T
        expected = outputs.square().mean(dim=0)
        torch.testing.assert_close(objective(weight, quantized, hessian.matrix), expected)

    @pytest.mark.parametrize("bits", SUPPORTED_BITS)
    @pytest.mark.parametrize(
        ("sym", "desc_act", "static_groups"), list(itertools.product([True, False], repeat=3))
    )
    def test_gptq_is_far_better_than_rounding(self, bits, sym, desc_act, static_groups):
        config = QuantizeConfig(bits, 32, sym=sym, desc_act=desc_act, static_groups=static_groups)
        weight, hessian = problem(5, outputs=64)
        ours = objective(weight, quantize(weight, hessian, config), hessian)
        nearest = objective(weight, round_to_nearest(weight, config), hessian)
        assert ours.sum() < 0.8 * nearest.sum()

    @pytest.mark.parametrize("tokens", [1, 3, 40, 4000])
    @pytest.mark.parametrize("desc_act", [False, True])
    @pytest.mark.parametrize("bits", [2, 8])
    def test_never_worse_than_rounding(self, tokens, desc_act, bits):
        config = QuantizeConfig(bits, 8, desc_act=desc_act, sym=False)
        for seed in range(5):
            weight, hessian = problem(seed, outputs=8, inputs=32, tokens=tokens)
            for dtype in (torch.float32, torch.float64):
                h = hessian.to(dtype)
                ours = objective(weight, quantize(weight, h, config), h)
                nearest = objective(weight, round_to_nearest(weight, config), h)
                assert ours.sum() <= nearest.sum()

    def test_never_worse_where_gptq_is(self):
        """Weights on a grid already cost rounding nothing; GPTQ's clamped ends are no reason."""
        grid = QuantizeConfig(4, 32, sym=False)
        weight, hessian = problem(6)
        weight = round_to_nearest(weight, grid).dequantize()
        again = round_to_nearest(weight, grid)
        nearest = objective(weight, again, hessian).sum()
        assert objective(weight, quantize(weight, hessian, grid), hessian).sum() <= nearest


class TestQuantized:
    def test_a_run_repeats_bit_for_bit(self):
        weight, hessian = problem(7)
        weight, hessian = weight.float(), hessian.float()
        config = QuantizeConfig(3, 32, desc_act=True)
        first, second = (quantize(weight, hessian, config) for _ in range(2))
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.scales, second.scales)

    def test_arguments_are_left_alone(self):
        weight, hessian = problem(8)
        hessian[3] = hessian[:, 3] = 0
        before = weight.clone(), hessian.clone()
        quantize(weight, hessian, CONFIG)
        assert torch.equal(weight, before[0])
        assert torch.equal(hessian, before[1])

    def test_stacked_matrices_are_quantized_as_each_by_itself(self):
        weight, hessian = problem(9)
        stacked = quantize(weight, hessian, CONFIG)
        for start, stop in ((0, 4), (4, 16)):
            part = quantize(weight[start:stop], hessian, CONFIG)
            assert torch.equal(stacked.rows(start, stop).codes, part.codes)
            assert torch.equal(stacked.rows(start, stop).scales, part.scales)

    @pytest.mark.parametrize("bits", SUPPORTED_BITS)
    @pytest.mark.parametrize("sym", [True, False])
    def test_storing_loses_nothing(self, bits, sym):
        weight, hessian = problem(10, outputs=32)
        config = QuantizeConfig(bits, 32, sym=sym, desc_act=True)
        quantized = quantize(weight, hessian, config)
        parts = {name: getattr(quantized, name) for name in ("codes", "zeros", "scales", "g_idx")}
        packed = pack_linear(**parts, bits=bits)
        assert torch.equal(packed.dequantize(), quantized.dequantize())

    def test_groups_of_one_sign_and_of_nothing(self):
        weight = torch.zeros(3, 32)
        weight[0] = torch.linspace(0.5, 1.0, 32)
        weight[1] = -weight[0]
        for sym in (True, False):
            config = QuantizeConfig(8, 32, sym=sym)
            close = round_to_nearest(weight, config).dequantize()
            torch.testing.assert_close(close, weight, atol=0.01, rtol=0)
            assert (close[2] == 0).all()

    def test_act_order_keeps_groups_with_static_ones_only(self):
        weight, hessian = problem(11)
        for static in (True, False):
            config = QuantizeConfig(4, 32, desc_act=True, static_groups=static)
            g_idx = gptq(weight, hessian, config).g_idx
            assert torch.equal(g_idx, torch.arange(INPUTS).int() // 32) == static
            assert g_idx.bincount().tolist() == [32, 32, 32]


class TestHessian:
    def test_it_does_not_depend_on_how_inputs_come(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        whole, parts = Hessian(8), Hessian(8)
        whole.add(x)
        for part in x.split([1, 40, 0, 23]):
            parts.add(part)
        assert parts.num_inputs == 64
        torch.testing.assert_close(parts.matrix, whole.matrix)
        torch.testing.assert_close(whole.matrix, x.T @ x / 64)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_nan_in_activations(self, value):
        x = torch.ones(3, 8)
        x[1, 2] = value
        with pytest.raises(ValueError, match=r"enter model\.o_proj contain NaN"):
            Hessian(8, name="model.o_proj").add(x)

    def test_other_inputs(self):
        with pytest.raises(ValueError, match="9 features, not 8"):
            Hessian(8).add(torch.ones(3, 9))

    def test_singular_ones_are_damped(self):
        """Fewer inputs than features, and one feature in all of them."""
        weight, hessian = problem(12, tokens=3)
        assert quantize(weight, hessian, CONFIG).damping == CONFIG.damp_percent
        quantize(weight, torch.ones(INPUTS, INPUTS), CONFIG)

    def test_damping_grows_until_it_is_enough(self):
        weight, hessian = problem(13)
        hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(INPUTS)
        damping = gptq(weight, hessian, CONFIG).damping
        assert damping == pytest.approx(0.1)

    def test_not_positive_definite(self):
        weight, hessian = problem(14)
        with pytest.raises(ValueError, match=r"Hessian of it is not positive definite.*calibrate"):
            quantize(weight, -hessian, CONFIG, "it")


class TestBadInput:
    def test_group_size_that_does_not_divide(self):
        weight, hessian = problem()
        with pytest.raises(
            ValueError, match=r"128 does not divide the 96 inputs of q; .*8, 12.* -1"
        ):
            quantize(weight, hessian, QuantizeConfig(group_size=128), "q")

    @pytest.mark.parametrize(
        "options",
        [
            {"group_size": 0},
            {"damp_percent": 0.0},
            {"damp_percent": 1.0},
            {"block_size": 0},
        ],
    )
    def test_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
            QuantizeConfig(**options)

    def test_bits(self):
        with pytest.raises(ValueError, match="5-bit weights are not supported"):
            QuantizeConfig(bits=5)

    def test_shapes(self):
        weight, hessian = problem()
        with pytest.raises(ValueError, match=r"\[16, 96\] and \[95, 95\]"):
            quantize(weight, hessian[1:, 1:], CONFIG)

    def test_nan(self):
        weight, hessian = problem()
        weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="weight of it contains NaN"):
            quantize(weight, hessian, CONFIG, "it")
        with pytest.raises(ValueError, match="weight of it contains NaN"):
            round_to_nearest(weight, CONFIG, "it")

    def test_scales_that_float16_cannot_hold(self):
        weight, hessian = problem()
        with pytest.raises(ValueError, match="do not fit into float16"):
            quantize(weight * 1e7, hessian, CONFIG)


class TestBestOfThree:
    """`quantize` takes each row from the walk, or the rounding, that serves it best."""

    @pytest.mark.parametrize("bits", [2, 4])
    @pytest.mark.parametrize("desc_act", [False, True])
    def test_no_row_is_worse_than_any_of_them(self, bits, desc_act):
        generator = torch.Generator().manual_seed(3)
        mix = torch.randn(64, 64, generator=generator)
        x = torch.randn(400, 64, generator=generator) @ mix
        weight = torch.randn(24, 64, generator=generator)
        hessian = Hessian(64)
        hessian.add(x)
        config = QuantizeConfig(bits, 32, desc_act=desc_act)
        best = objective(weight, quantize(weight, hessian.matrix, config), hessian.matrix)
        walks = [
            gptq(weight, hessian.matrix, config, fit_first=fit_first) for fit_first in (False, True)
        ]
        errors = [objective(weight, walk, hessian.matrix) for walk in walks]
        for error in errors:
            assert (best <= error * (1 + 1e-5)).all()
        assert (errors[0] < errors[1]).any() and (errors[1] < errors[0]).any()
        assert best.sum() < min(error.sum() for error in errors)

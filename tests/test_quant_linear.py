"""Linear layers with packed weights: one layer at a time, by the plain paths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_models import ORDERED, OTHER, SHUFFLED, loaded, product, random_linear
from torch.utils._python_dispatch import TorchDispatchMode

from m7_gptq.act_order import reorder_mlp
from m7_gptq.packing import FORMATS, SUPPORTED_BITS
from m7_gptq.quant_linear import QuantLinear

UNEQUAL = torch.cat([torch.arange(64) // 40, torch.full((32,), 2)])  # 40, 24 and 32 inputs


class TestQuantLinear:
    @pytest.mark.parametrize("bits", SUPPORTED_BITS)
    @pytest.mark.parametrize("checkpoint_format", FORMATS)
    @pytest.mark.parametrize(
        ("orders", "num_products"),
        [
            ([ORDERED] * 3, 1),
            ([SHUFFLED] * 3, 1),
            ([SHUFFLED, OTHER, OTHER], 2),
            ([ORDERED, SHUFFLED, ORDERED], 3),
            ([UNEQUAL], 1),
            ([torch.zeros(96, dtype=torch.int64)] * 2, 1),
            ([SHUFFLED, ORDERED // 2], 2),
            ([ORDERED, torch.arange(96) // 48], 2),  # groups of other sizes
        ],
    )
    def test_it_multiplies_by_the_dequantized_weight(
        self, bits, checkpoint_format, orders, num_products
    ):
        shards = [
            random_linear(bits, 32 * (1 + index), order, index, checkpoint_format=checkpoint_format)
            for index, order in enumerate(orders)
        ]
        linear = loaded(shards)
        assert linear.num_products == num_products
        for shape in ((1, 96), (5, 96), (2, 3, 96), (96,)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(9))
            torch.testing.assert_close(linear(x), product(x, shards))

    def test_bias(self):
        shards = [
            random_linear(4, 32, SHUFFLED, index, bias=torch.randn(32)) for index in range(2)
        ]
        linear = loaded(shards)
        assert linear.kinds[-1] == "bias"
        x = torch.randn(4, 96)
        torch.testing.assert_close(linear(x), product(x, shards))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bits(self, dtype):
        shards = [random_linear(4, 64, SHUFFLED, 0)]
        x = torch.randn(4, 96).to(dtype)
        y = loaded(shards, dtype)(x)
        assert y.dtype == dtype
        expected = product(x.float(), shards)
        torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)

    def test_a_call_never_waits_for_the_device(self):
        """What a CUDA graph holds may neither read a value nor look for one."""

        class NoReading(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                assert "_local_scalar_dense" not in str(function)
                assert "nonzero" not in str(function)
                return function(*args, **(kwargs or {}))

        linear = loaded([random_linear(4, 32, order, 0) for order in (SHUFFLED, OTHER)])
        x = torch.randn(4, 96)
        with NoReading():
            linear(x)
            with pytest.raises(AssertionError):
                x.sum().item()

    @pytest.mark.parametrize(("bits", "per_group"), [(2, 2 + 1), (4, 2 + 4), (8, 2 + 1)])
    def test_memory_is_that_of_the_integers(self, bits, per_group):
        """Codes, a scale and a zero point for each group, and the order of the inputs."""
        order = torch.arange(512)[torch.randperm(512)] // 128
        shards = [random_linear(bits, 32, order, index) for index in range(2)]
        assert loaded(shards).num_bytes == 64 * (512 * bits // 8 + 4 * per_group) + 512 * 4

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scales": torch.ones(4, 32)}, "it, projection 0: qzeros has shape"),
            ({"g_idx": torch.full((96,), 3)}, "it, projection 0: g_idx names groups 3 to 3"),
            (
                {part: getattr(random_linear(4, 64, ORDERED, 0), part)
                 for part in ("qweight", "qzeros", "scales")},
                r"it, projection 0 is \[64, 96\], but the configuration asks for \[32, 96\]",
            ),
        ],
    )  # fmt: skip
    def test_tensors_that_do_not_fit(self, change, message):
        linear = QuantLinear(96, [32], False, name="it", dtype=torch.float32, device="cpu", bits=4)
        good = random_linear(4, 32, ORDERED, 0)
        for kind in linear.kinds:
            linear.load_shard(kind, 0, change.get(kind, getattr(good, kind)))
        with pytest.raises(ValueError, match=message):
            linear.finish_loading()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("checkpoint_format", FORMATS)
def test_an_mlp_in_the_order_of_its_down_projection(bits, checkpoint_format):
    options = {"checkpoint_format": checkpoint_format, "bias": torch.randn(96)}
    gate, up, down = (random_linear(bits, 96, SHUFFLED, seed, **options) for seed in range(3))
    x = torch.randn(5, 96)

    def mlp(gate, up, down):
        inner = F.silu(product(x, [gate])) * product(x, [up])
        return product(inner, [down])

    reordered = reorder_mlp(gate, up, down)
    torch.testing.assert_close(mlp(*reordered), mlp(gate, up, down))
    assert reordered[2].is_ordered
    assert not torch.equal(reordered[0].qweight, gate.qweight)

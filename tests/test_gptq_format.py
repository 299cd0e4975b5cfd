"""Packed integers and checkpoints of quantized weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.attention import causal_self_attention
from common.checkpoint import RandomCheckpoint, load_model, open_checkpoint
from m7_gptq.checkpoint_format import PARTS, QuantizedCheckpoint, StoredConfig, is_quantized
from m7_gptq.checkpoint_save import projections, save_quantized
from m7_gptq.gptq import QuantizeConfig, round_to_nearest
from m7_gptq.packing import (
    FORMATS,
    SUPPORTED_BITS,
    V1,
    V2,
    PackedLinear,
    pack_linear,
    pack_rows,
    pack_zeros,
    unpack_rows,
    unpack_zeros,
)

OUTPUTS, INPUTS, GROUP = 32, 96, 32


def random_codes(bits: int, *shape: int, low: int = 0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 1 << bits, shape, generator=generator, dtype=torch.uint8)


def random_linear(bits: int, checkpoint_format: str = V1, **changes) -> PackedLinear:
    generator = torch.Generator().manual_seed(bits)
    parts = {
        "codes": random_codes(bits, OUTPUTS, INPUTS),
        "zeros": random_codes(bits, OUTPUTS, INPUTS // GROUP, low=1),
        "scales": torch.rand(OUTPUTS, INPUTS // GROUP, generator=generator).half(),
        "g_idx": torch.randperm(INPUTS, generator=generator) // GROUP,
        **changes,
    }
    return pack_linear(**parts, bits=bits, checkpoint_format=checkpoint_format)


def stream_of(words: list[int]) -> int:
    """32-bit words, least significant first, as one long number."""
    return sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))


class TestPacking:
    @pytest.mark.parametrize("bits", SUPPORTED_BITS)
    def test_fields_are_a_stream_of_bits(self, bits):
        values = random_codes(bits, 64, 3)
        packed = pack_rows(values, bits)
        assert packed.shape == (64 * bits // 32, 3)
        assert packed.dtype == torch.int32
        for column in range(3):
            stream = stream_of(packed[:, column].tolist())
            fields = [stream >> (bits * index) & ((1 << bits) - 1) for index in range(64)]
            assert fields == values[:, column].tolist()
        assert torch.equal(unpack_rows(packed, bits), values)

    def test_three_bits_cross_words_where_auto_gptq_lets_them(self):
        """Fields 10 and 21 lie across: two bits and one, then one bit and two."""
        values = torch.zeros(32, 1, dtype=torch.uint8)
        values[10], values[21] = 0b101, 0b110
        first, second, third = pack_rows(values, 3)[:, 0].tolist()
        assert first & 0xFFFFFFFF == 0b01 << 30
        assert second & 0xFFFFFFFF == 1 | 0b0 << 31
        assert third == 0b11

    @pytest.mark.parametrize("bits", SUPPORTED_BITS)
    @pytest.mark.parametrize("checkpoint_format", FORMATS)
    def test_zero_points(self, bits, checkpoint_format):
        zeros = random_codes(bits, 5, 64)
        assert 0 in zeros
        packed = pack_zeros(zeros, bits, checkpoint_format)
        assert packed.shape == (5, 64 * bits // 32)
        assert torch.equal(unpack_zeros(packed, bits, checkpoint_format), zeros)

    @pytest.mark.parametrize("bits", SUPPORTED_BITS)
    def test_version_one_stores_one_less(self, bits):
        zeros = random_codes(bits, 5, 64, low=1)
        assert torch.equal(pack_zeros(zeros, bits, V1), pack_zeros(zeros - 1, bits, V2))

    def test_symmetric_four_bits_look_as_everybody_knows_them(self):
        zeros = torch.full((1, 8), 8)
        assert pack_zeros(zeros, 4, V1).item() == 0x77777777
        assert pack_zeros(zeros, 4, V2).item() & 0xFFFFFFFF == 0x88888888

    def test_a_zero_point_of_zero_borrows_as_in_gptqmodel(self):
        zeros = torch.tensor([[0, 3, 3, 3, 3, 3, 3, 3]])
        assert pack_zeros(zeros, 4, V1).item() == 0x33333330 - 0x11111111

    @pytest.mark.parametrize("bits", SUPPORTED_BITS)
    @pytest.mark.parametrize("checkpoint_format", FORMATS)
    def test_a_layer_means_what_it_says(self, bits, checkpoint_format):
        linear = random_linear(bits, checkpoint_format)
        assert (linear.in_features, linear.out_features) == (INPUTS, OUTPUTS)
        codes, zeros = linear.codes(), linear.zeros()
        weight = linear.dequantize()
        for output, column in ((0, 0), (7, 50), (31, 95)):
            group = linear.g_idx[column]
            steps = int(codes[column, output]) - int(zeros[group, output])
            assert weight[output, column] == steps * linear.scales[group, output].float()

    def test_order_of_groups(self):
        assert not random_linear(4).is_ordered
        assert random_linear(4, g_idx=torch.arange(INPUTS) // GROUP).is_ordered

    @pytest.mark.parametrize("bits", SUPPORTED_BITS)
    def test_from_one_version_to_the_other(self, bits):
        linear = random_linear(bits, zeros=random_codes(bits, OUTPUTS, INPUTS // GROUP))
        other = linear.as_format(V2)
        assert torch.equal(other.dequantize(), linear.dequantize())
        assert torch.equal(other.as_format(V1).qzeros, linear.qzeros)


class TestBadTensors:
    def test_values_beyond_the_bits(self):
        with pytest.raises(ValueError, match="4 bits hold 0 to 15, got 0 to 16"):
            pack_rows(torch.tensor([[0], [16]] * 4), 4)
        with pytest.raises(ValueError, match="integers"):
            pack_rows(torch.zeros(8, 1), 4)

    @pytest.mark.parametrize("bits", [1, 5, 16, True, None])
    def test_unsupported_bits(self, bits):
        with pytest.raises(ValueError, match="supported: 2, 3, 4, 8"):
            pack_rows(torch.zeros(32, 1, dtype=torch.uint8), bits)

    @pytest.mark.parametrize(("bits", "multiple"), [(2, 16), (3, 32), (4, 8), (8, 4)])
    def test_sizes_that_fill_no_word(self, bits, multiple):
        with pytest.raises(ValueError, match=f"in_features is 98.*multiple of {multiple}"):
            random_linear(bits, codes=random_codes(bits, OUTPUTS, 98))

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("scales", torch.ones(3, 16), r"scales has shape \[3, 16\]; \[3, 32\] goes with"),
            ("scales", torch.full((3, 32), torch.nan), "NaN"),
            ("scales", torch.ones(32), "two dimensions"),
            ("qzeros", torch.zeros(3, 5, dtype=torch.int32), "qzeros has shape"),
            ("qweight", torch.zeros(12, 32, dtype=torch.int64), "qweight holds torch.int64"),
            ("g_idx", torch.zeros(95, dtype=torch.int32), "g_idx has shape"),
            ("g_idx", torch.full((96,), 3), "groups 3 to 3, but scales have 3"),
            ("g_idx", torch.full((96,), -1), "groups -1 to -1"),
            ("bias", torch.zeros(31), "bias has shape"),
            ("bias", torch.full((32,), torch.inf), "bias contains NaN"),
            ("bits", 8, "g_idx has shape|scales has shape|qzeros has shape"),
            ("checkpoint_format", "marlin", "'marlin' is not one of gptq, gptq_v2"),
        ],
    )
    def test_tensors_that_do_not_fit(self, name, tensor, message):
        good = random_linear(4)
        parts = {field: getattr(good, field) for field in good.__dataclass_fields__}
        with pytest.raises(ValueError, match=message):
            PackedLinear(**{**parts, name: tensor})


PRESETS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-qwen3")
NAME = "model.layers.0.self_attn.q_proj"


def rounded(source: RandomCheckpoint, config: QuantizeConfig, checkpoint_format: str):
    """Projection name -> its weight rounded to nearest and packed."""
    weights = dict(source.weights("cpu"))
    packed = {}
    for index, name in enumerate(projections(source.config)):
        weight = weights[f"{name}.weight"]
        g_idx = torch.arange(weight.shape[1]) // config.group_size
        if config.desc_act:
            generator = torch.Generator().manual_seed(index)
            g_idx = g_idx[torch.randperm(len(g_idx), generator=generator)]
        quantized = round_to_nearest(weight, config, name, g_idx)
        packed[name] = pack_linear(
            quantized.codes,
            quantized.zeros,
            quantized.scales,
            quantized.g_idx,
            bits=config.bits,
            checkpoint_format=checkpoint_format,
        )
    return packed


def save(folder, preset=PRESETS[0], config=None, checkpoint_format=None, **options):
    """A folder of a tiny model, rounded to nearest; returns what was packed."""
    config = config or QuantizeConfig(bits=4, group_size=32)
    source = open_checkpoint(preset)
    stored = StoredConfig.of(config, checkpoint_format)
    packed = rounded(source, config, stored.checkpoint_format)
    save_quantized(folder, source, stored, packed.__getitem__, **options)
    return packed


def logits_of(checkpoint) -> torch.Tensor:
    model = load_model(checkpoint, dtype=torch.float32, device="cpu", max_positions=64)
    input_ids = torch.arange(20)
    with torch.inference_mode():
        hidden = model(input_ids, input_ids, lambda _, q, k, v: causal_self_attention(q, k, v))
        return model.compute_logits(hidden)


def edit_json(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value != ...}))


def edit_tensors(folder, **changes):
    """Replace tensors of NAME, remove those given as None, multiply by what is a number."""
    tensors = load_file(folder / "model.safetensors")
    for kind, tensor in changes.items():
        name = f"{NAME}.{kind}"
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq") / "model"
    save(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A quantized model, to be damaged at will."""
    return shutil.copytree(pristine, tmp_path / "model")


class TestCheckpoint:
    @pytest.mark.parametrize("bits", SUPPORTED_BITS)
    @pytest.mark.parametrize("checkpoint_format", FORMATS)
    def test_round_trip(self, tmp_path, bits, checkpoint_format):
        config = QuantizeConfig(bits, 32, sym=False, desc_act=True)
        packed = save(tmp_path / "out", PRESETS[2], config, checkpoint_format)
        checkpoint = QuantizedCheckpoint("it", tmp_path / "out")
        assert checkpoint.linears == tuple(packed)
        assert checkpoint.quantization == StoredConfig.of(config, checkpoint_format)
        for name, linear in packed.items():
            read = checkpoint.linear(name)
            for part in PARTS:
                assert torch.equal(getattr(read, part), getattr(linear, part)), (name, part)

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("shard_bytes", [4 * 1024**3, 50_000])
    def test_every_architecture_in_one_file_and_in_many(self, tmp_path, preset, shard_bytes):
        """Read as a checkpoint like any other, it is the model with dequantized weights."""
        packed = save(tmp_path / "out", preset, shard_bytes=shard_bytes)
        files = list((tmp_path / "out").glob("*.safetensors"))
        assert (len(files) > 2) == (shard_bytes == 50_000)
        checkpoint = QuantizedCheckpoint("it", tmp_path / "out")
        source = open_checkpoint(preset)
        expected = dict(source.weights("cpu"))
        expected.update({f"{name}.weight": it.dequantize() for name, it in packed.items()})
        found = dict(checkpoint.weights("cpu"))
        assert found.keys() == expected.keys() == checkpoint.weight_specs().keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
            assert checkpoint.weight_specs()[name] == (tensor.dtype, tuple(tensor.shape))
        source.weights = lambda device: iter(expected.items())
        assert torch.equal(logits_of(checkpoint), logits_of(source))

    def test_as_auto_gptq_has_it(self, folder):
        """Its own file name, zero biases, quantize_config.json only, no word on the format."""
        before = logits_of(QuantizedCheckpoint("it", folder))
        tensors = load_file(folder / "model.safetensors")
        for name in projections(open_checkpoint(PRESETS[0]).config):
            tensors[f"{name}.bias"] = torch.zeros(tensors[f"{name}.scales"].shape[1]).half()
        save_file(tensors, folder / "gptq_model-4bit-32g.safetensors")
        (folder / "model.safetensors").unlink()
        edit_json(folder / "config.json", quantization_config=...)
        edit_json(folder / "quantize_config.json", checkpoint_format=..., pack_dtype=..., meta=...)
        checkpoint = QuantizedCheckpoint("it", folder)
        assert checkpoint.quantization.checkpoint_format == V1
        assert torch.equal(logits_of(checkpoint), before)

    def test_g_idx_may_be_missing_without_act_order(self, folder):
        before = QuantizedCheckpoint("it", folder).linear(NAME).dequantize()
        edit_tensors(folder, g_idx=None)
        assert torch.equal(QuantizedCheckpoint("it", folder).linear(NAME).dequantize(), before)

    def test_biases_of_the_model_are_kept(self, tmp_path):
        save(tmp_path / "out", "random:tiny-qwen2")
        bias = QuantizedCheckpoint("it", tmp_path / "out").linear(NAME).bias
        source = dict(open_checkpoint("random:tiny-qwen2").weights("cpu"))
        assert torch.equal(bias, source[f"{NAME}.bias"])

    def test_tokenizer_comes_along(self, folder):
        tokenizer = QuantizedCheckpoint("it", folder).tokenizer
        assert tokenizer.decode(tokenizer.encode("as it was")) == "as it was"

    def test_is_quantized(self, folder, tmp_path):
        assert is_quantized(folder)
        open_checkpoint(PRESETS[0]).save(tmp_path / "plain")
        assert not is_quantized(tmp_path / "plain")


class TestBadCheckpoints:
    def test_not_quantized(self, tmp_path):
        open_checkpoint(PRESETS[0]).save(tmp_path / "plain")
        with pytest.raises(ValueError, match="is not a GPTQ checkpoint"):
            QuantizedCheckpoint("it", tmp_path / "plain")

    def test_said_to_be_quantized_but_is_not(self, folder, tmp_path):
        open_checkpoint(PRESETS[0]).save(tmp_path / "plain")
        shutil.copy(folder / "quantize_config.json", tmp_path / "plain")
        with pytest.raises(ValueError, match="no quantized weights, though"):
            QuantizedCheckpoint("it", tmp_path / "plain")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"quant_method": "awq"}, "quantized by 'awq', not by GPTQ"),
            ({"bits": 5}, "5-bit weights are not supported; supported: 2, 3, 4, 8"),
            ({"bits": "4"}, "bits and group_size as integers"),
            ({"group_size": None}, "bits and group_size as integers"),
            ({"group_size": 0}, "group_size must be positive or -1, got 0"),
            (
                {"checkpoint_format": "gptq_p"},
                "'gptq_p' is not supported; supported: gptq, gptq_v2",
            ),
            ({"is_marlin_format": True}, "'marlin' is not supported"),
            ({"pack_dtype": "int64"}, "'int64' are not supported"),
            ({"dynamic": {"-:.*up": {}}}, "differ by layer"),
        ],
    )
    def test_configuration(self, folder, changes, message):
        stored = json.loads((folder / "quantize_config.json").read_text())
        edit_json(folder / "config.json", quantization_config={**stored, **changes})
        with pytest.raises(ValueError, match=message):
            QuantizedCheckpoint("it", folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"scales": None}, "q_proj: scales is missing"),
            ({"qzeros": None}, "q_proj: qzeros is missing"),
            ({"scales": torch.full((2, 64), torch.nan).half()}, "q_proj: scales contain NaN"),
            (
                {"scales": torch.ones(4, 64).half()},
                r"q_proj: scales has shape \[4, 64\]; \[2, 64\]",
            ),
            ({"qweight": torch.zeros(16, 64, dtype=torch.int32)}, "qweight has shape"),
            (
                {"g_idx": torch.full((64,), 2, dtype=torch.int32)},
                "groups 2 to 2, but scales have 2",
            ),
        ],
    )
    def test_tensors(self, folder, changes, message):
        edit_tensors(folder, **changes)
        checkpoint = QuantizedCheckpoint("it", folder)
        with pytest.raises(ValueError, match=message):
            logits_of(checkpoint)

    def test_g_idx_missing_with_act_order(self, folder):
        stored = json.loads((folder / "quantize_config.json").read_text())
        edit_json(folder / "config.json", quantization_config={**stored, "desc_act": True})
        edit_tensors(folder, g_idx=None)
        with pytest.raises(ValueError, match="q_proj: g_idx is missing; with desc_act"):
            logits_of(QuantizedCheckpoint("it", folder))

    def test_tensors_of_no_model(self, folder):
        edit_tensors(folder, bias=torch.ones(64))
        with pytest.raises(ValueError, match="bias is not zero, but"):
            QuantizedCheckpoint("it", folder)
        edit_tensors(folder, bias=None, extra=torch.ones(3))
        with pytest.raises(ValueError, match="extra does not belong"):
            QuantizedCheckpoint("it", folder)

    def test_nan_in_what_is_not_quantized(self, folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] = torch.nan
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r"model\.norm\.weight contains NaN"):
            logits_of(QuantizedCheckpoint("it", folder))

    def test_files(self, folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:5000])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            QuantizedCheckpoint("it", folder)
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="found 0"):
            QuantizedCheckpoint("it", folder)


class TestSaving:
    def test_an_interruption_leaves_nothing(self, tmp_path):
        source, config = open_checkpoint(PRESETS[0]), QuantizeConfig(4, 32)
        packed = rounded(source, config, V1)

        def linear(name):
            if name.startswith("model.layers.1"):
                raise KeyboardInterrupt
            return packed[name]

        with pytest.raises(KeyboardInterrupt):
            save_quantized(tmp_path / "out", source, StoredConfig.of(config), linear)
        assert list(tmp_path.iterdir()) == []

    def test_what_exists_is_not_overwritten(self, folder):
        with pytest.raises(ValueError, match="exists already"):
            save(folder)

    def test_an_empty_folder_may_exist(self, tmp_path):
        (tmp_path / "out").mkdir()
        save(tmp_path / "out")
        QuantizedCheckpoint("it", tmp_path / "out")

    def test_asymmetric_files_are_of_version_two(self):
        assert StoredConfig.of(QuantizeConfig(sym=False)).checkpoint_format == V2
        assert StoredConfig.of(QuantizeConfig(sym=True)).checkpoint_format == V1

    def test_what_is_packed_otherwise(self, tmp_path):
        source, config = open_checkpoint(PRESETS[0]), QuantizeConfig(4, 32)
        packed = rounded(source, config, V2)
        with pytest.raises(ValueError, match="is not packed as the configuration says"):
            save_quantized(tmp_path / "out", source, StoredConfig.of(config), packed.__getitem__)

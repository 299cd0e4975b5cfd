"""Quantizing a whole model, and the text it is calibrated on."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import m7_gptq.quantize_model as quantize_model_module
from common.attention import causal_self_attention
from common.checkpoint import load_model, open_checkpoint
from common.tokenizer import Tokenizer
from m7_gptq.calibration import CALIBRATION, EVALUATION, read_text, token_windows
from m7_gptq.checkpoint_format import QuantizedCheckpoint
from m7_gptq.gptq import QuantizeConfig, round_to_nearest
from m7_gptq.quantize_model import NEAREST, _Run, quantize_model

PRESETS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-qwen3")
CONFIG = QuantizeConfig(bits=4, group_size=32, sym=False)


def samples(count: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))


def run(output, preset=PRESETS[0], config=CONFIG, **options):
    source = open_checkpoint(preset)
    return quantize_model(source, samples(), config, output, batch_size=4, **options)


def digest(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def hidden_of(model, token_ids) -> torch.Tensor:
    with torch.inference_mode():
        positions = torch.arange(len(token_ids))
        return model(token_ids, positions, lambda _, q, k, v: causal_self_attention(q, k, v))


class TestRun:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_text_passes_through_the_layers_as_through_the_model(self, preset):
        source = open_checkpoint(preset)
        run = _Run(source, samples(), CONFIG, "gptq", torch.float32, torch.device("cpu"), 4)
        for index in range(source.config.num_layers):
            run.pass_through(run.load_layer(index))
        model = load_model(source, dtype=torch.float32, device="cpu", max_positions=64)
        eps = source.config.rms_norm_eps
        found = run.ops.rms_norm(torch.cat(run.hidden), model.norm, eps)
        expected = torch.stack([hidden_of(model, row) for row in samples()])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class TestModel:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_outputs_stay_close_and_errors_below_rounding(self, tmp_path, preset):
        config = QuantizeConfig(bits=8, group_size=32, desc_act=True)
        done = []
        errors = run(tmp_path / "out", preset, config, progress=lambda *state: done.append(state))
        source = open_checkpoint(preset)
        layers = source.config.num_layers
        assert done == [(index + 1, layers) for index in range(layers)]
        assert [error.name for error in errors][:2] == [
            "model.layers.0.self_attn.qkv_proj",
            "model.layers.0.self_attn.o_proj",
        ]
        assert len(errors) == 4 * layers
        assert all(error.ours < error.nearest for error in errors)
        models = [
            load_model(checkpoint, dtype=torch.float32, device="cpu", max_positions=64)
            for checkpoint in (source, QuantizedCheckpoint("it", tmp_path / "out"))
        ]
        plain, quantized = (hidden_of(model, samples()[0]) for model in models)
        assert (plain - quantized).norm() < 0.05 * plain.norm()
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    def test_later_projections_see_what_earlier_ones_became(self, tmp_path):
        for sequential in (True, False):
            config = QuantizeConfig(bits=3, group_size=32, true_sequential=sequential)
            run(tmp_path / str(sequential), config=config)
        first, second = (QuantizedCheckpoint("it", tmp_path / name) for name in ("True", "False"))
        same = {
            name: torch.equal(first.linear(name).qweight, second.linear(name).qweight)
            for name in first.linears[:7]
        }
        assert [name.rpartition(".")[2] for name, equal in same.items() if equal] == [
            "q_proj", "k_proj", "v_proj",
        ]  # fmt: skip

    def test_rounding_to_nearest(self, tmp_path):
        assert run(tmp_path / "out", method=NEAREST) == []
        checkpoint = QuantizedCheckpoint("it", tmp_path / "out")
        weights = dict(open_checkpoint(PRESETS[0]).weights("cpu"))
        for name in checkpoint.linears:
            expected = round_to_nearest(weights[f"{name}.weight"], CONFIG).dequantize()
            assert torch.equal(checkpoint.linear(name).dequantize(), expected)

    def test_a_folder_is_read_as_its_source_is(self, tmp_path):
        """A folder has its tensors in another order, so the files differ; the weights do not."""
        open_checkpoint(PRESETS[0]).save(tmp_path / "source")
        run(tmp_path / "first")
        source = open_checkpoint(str(tmp_path / "source"))
        quantize_model(source, samples(), CONFIG, tmp_path / "second", batch_size=4)
        first, second = (
            load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


class TestInterruption:
    @pytest.mark.parametrize("sequential", [True, False])
    def test_it_goes_on_and_ends_with_the_same_bits(self, tmp_path, monkeypatch, sequential):
        config = replace(CONFIG, true_sequential=sequential)
        run(tmp_path / "whole", config=config)

        def interrupt(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", config=config, progress=interrupt)
        assert not (tmp_path / "out").exists()
        quantized = []
        original = quantize_model_module.quantize
        monkeypatch.setattr(
            quantize_model_module,
            "quantize",
            lambda weight, hessian, config, name: (
                quantized.append(name),
                original(weight, hessian, config, name),
            )[1],
        )
        errors = run(tmp_path / "out", config=config)
        assert {name.split(".")[2] for name in quantized} == {"1"}
        assert len(errors) == 8
        assert digest(tmp_path / "out") == digest(tmp_path / "whole")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]

    @pytest.mark.parametrize(
        ("where", "call"),
        [("quantize", 1), ("quantize", 6), ("write_tensors", 1), ("write_tensors", 2),
         ("save_quantized", 1), ("pack_linear", 9)],
    )  # fmt: skip
    def test_wherever_it_happens(self, tmp_path, monkeypatch, where, call):
        """No output, and the next run ends with the bits of one that was left alone."""
        calls = []
        original = getattr(quantize_model_module, where)

        def interrupted(*arguments, **options):
            calls.append(where)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        monkeypatch.setattr(quantize_model_module, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        monkeypatch.undo()
        run(tmp_path / "out")
        run(tmp_path / "whole")
        assert digest(tmp_path / "out") == digest(tmp_path / "whole")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]

    def test_other_settings_do_not_go_on_with_it(self, tmp_path):
        def interrupt(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", progress=interrupt)
        source = open_checkpoint(PRESETS[0], seed=1)
        quantize_model(source, samples(), CONFIG, tmp_path / "out", batch_size=4)
        quantize_model(source, samples(), CONFIG, tmp_path / "whole", batch_size=4)
        assert digest(tmp_path / "out") == digest(tmp_path / "whole")


    def test_other_weights_in_the_same_place_do_not_either(self, tmp_path):
        folder, name = tmp_path / "source", "model.layers.1.self_attn.q_proj.weight"
        open_checkpoint(PRESETS[0]).save(folder)

        def interrupt(done, total):
            raise KeyboardInterrupt

        def again(output, **options):
            source = open_checkpoint(str(folder))
            quantize_model(source, samples(), CONFIG, output, batch_size=4, **options)

        with pytest.raises(KeyboardInterrupt):
            again(tmp_path / "out", progress=interrupt)
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, name: -weights[name]}, folder / "model.safetensors")
        again(tmp_path / "out")
        assert len(list(tmp_path.glob(".out-*"))) == 1  # what was begun with the other weights
        again(tmp_path / "whole")
        assert digest(tmp_path / "out") == digest(tmp_path / "whole")


class TestBadInput:
    def test_group_size_is_refused_before_anything_is_done(self, tmp_path):
        config = QuantizeConfig(group_size=64)
        with pytest.raises(ValueError, match=r"64 does not divide the 160 inputs of .*down_proj"):
            run(tmp_path / "out", config=config)
        assert list(tmp_path.iterdir()) == []

    def test_existing_output(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
        with pytest.raises(ValueError, match="exists already"):
            run(tmp_path / "out")

    def test_nan_on_the_way(self, tmp_path):
        source = open_checkpoint(PRESETS[0])
        weights = dict(source.weights("cpu"))
        weights["model.layers.1.input_layernorm.weight"][0] = torch.nan
        source.weights = lambda device: iter(weights.items())
        with pytest.raises(
            ValueError, match=r"enter model\.layers\.1\.self_attn\.qkv_proj contain"
        ):
            quantize_model(source, samples(), CONFIG, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_method_and_tokens(self, tmp_path):
        with pytest.raises(ValueError, match="method must be 'gptq' or 'nearest', got 'awq'"):
            run(tmp_path / "out", method="awq")
        with pytest.raises(ValueError, match="token ids that the model does not have"):
            quantize_model(open_checkpoint(PRESETS[0]), samples() + 300, CONFIG, tmp_path / "out")


class TestText:
    def test_halves_share_no_paragraph(self):
        halves = [
            {" ".join(part.split()) for part in read_text("builtin", half).split("\n\n")}
            for half in (CALIBRATION, EVALUATION)
        ]
        assert not halves[0] & halves[1]
        assert all(len(half) > 500 for half in halves)

    def test_files(self, tmp_path):
        file = tmp_path / "text"
        with pytest.raises(ValueError, match="can't read text from"):
            read_text(str(file))
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="not UTF-8"):
            read_text(str(file))
        file.write_text(" \n")
        with pytest.raises(ValueError, match="is empty"):
            read_text(str(file))
        file.write_text("Größe")
        assert read_text(str(file)) == "Größe"

    def test_windows(self):
        tokenizer = Tokenizer.of_bytes()
        text = "".join(map(chr, range(32, 127)))
        windows = token_windows(tokenizer, text, count=4, length=10, seed=1)
        assert windows.shape == (4, 10)
        assert (windows[:, 1:] - windows[:, :-1] == 1).all()
        assert len({row[0].item() // 10 for row in windows - 32}) == 4
        again = token_windows(tokenizer, text, count=4, length=10, seed=1)
        assert torch.equal(windows, again)
        assert len(token_windows(tokenizer, text, count=99, length=10)) == 9
        with pytest.raises(ValueError, match="95 tokens, too few for one window of 96"):
            token_windows(tokenizer, text, count=1, length=96)

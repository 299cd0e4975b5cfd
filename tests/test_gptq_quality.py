"""Perplexity, sweeps, and the command lines that quantize and evaluate."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

import m7_gptq.quantize as quantize_module
from common.attention import causal_self_attention
from common.checkpoint import load_model, open_checkpoint
from common.tokenizer import Tokenizer
from m7_gptq import evaluate, quantize
from m7_gptq.checkpoint_format import QuantizedCheckpoint
from m7_gptq.perplexity import EvaluationText, perplexity
from m7_gptq.quality_report import FIELDS
from m7_gptq.quantize_model import quantize_model

TINY = "random:tiny-llama"
TEXT = "".join(chr(32 + (7 * i * i + i // 3) % 95) for i in range(400))
SMALL = ("--group-size", "32", "--num-samples", "4", "--seq-len", "32", "--threads", "1")


def tiny_model():
    return load_model(open_checkpoint(TINY), dtype=torch.float32, device="cpu", max_positions=64)


def run_quantize(output, *options: str) -> int:
    return quantize.main(["--model", TINY, "--output", str(output), *SMALL, *options])


class TestPerplexity:
    @pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (32, 1), (7, 5), (64, 64)])
    @pytest.mark.parametrize("batch_size", [1, 3, 50])
    def test_it_is_what_one_window_after_the_other_gives(self, context, stride, batch_size):
        tokens = Tokenizer.of_bytes().encode(TEXT)[:100]
        text = EvaluationText.of(
            Tokenizer.of_bytes(), TEXT[:100], context=context, stride=stride
        )
        model = tiny_model()
        losses, scored = [], {0}  # the first token of all has nothing before it
        for start in range(0, len(tokens) - context + 1, stride):
            window = torch.tensor(tokens[start : start + context])
            with torch.inference_mode():
                hidden = model(
                    window, torch.arange(context), lambda _, q, k, v: causal_self_attention(q, k, v)
                )
                logits = model.compute_logits(hidden).double()
            for at in range(1, context):
                if start + at not in scored:
                    scored.add(start + at)
                    losses.append(F.cross_entropy(logits[at - 1], window[at]).item())
        found = perplexity(model, text, batch_size=batch_size)
        assert found.num_tokens == text.num_tokens == len(losses)
        assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert found.perplexity == pytest.approx(math.exp(found.loss))

    def test_a_model_that_knows_nothing_is_as_good_as_a_die(self):
        model = tiny_model()
        model.norm.zero_()
        text = EvaluationText.of(Tokenizer.of_bytes(), TEXT, context=16)
        assert perplexity(model, text).perplexity == pytest.approx(model.config.vocab_size)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"context": 1}, "at least 2 tokens"),
            ({"context": 8, "stride": 9}, "between 1 and the context, 8: got 9"),
            ({"context": 8, "stride": 0}, "between 1 and the context, 8: got 0"),
            ({"context": 401}, "400 tokens, too few for one window of 401"),
            ({"context": 8, "max_windows": 0}, "at least 1 window"),
        ],
    )
    def test_bad_windows(self, options, message):
        with pytest.raises(ValueError, match=message):
            EvaluationText.of(Tokenizer.of_bytes(), TEXT, **options)

    def test_bad_models(self):
        text = EvaluationText.of(Tokenizer.of_bytes(), TEXT, context=16)
        model = tiny_model()
        model.norm.fill_(torch.nan)
        with pytest.raises(ValueError, match="NaN or infinity on this text"):
            perplexity(model, text)
        long = EvaluationText.of(Tokenizer.of_bytes(), TEXT * 30, context=8193)
        with pytest.raises(ValueError, match="positions, the context has 8193"):
            perplexity(model, long)


class TestQuantizeCommand:
    def test_a_checkpoint_of_these_options(self, tmp_path, capsys):
        assert run_quantize(tmp_path / "out", "--desc-act", "--bits", "3", "--no-sym") == 0
        shown = capsys.readouterr().out
        assert "ours / rounded to nearest" in shown
        assert "3.59 bits a weight: 77.5% smaller than in 16 bits" in shown
        stored = QuantizedCheckpoint("it", tmp_path / "out").quantization
        assert (stored.bits, stored.group_size, stored.sym, stored.desc_act) == (3, 32, False, True)
        assert stored.checkpoint_format == "gptq_v2"
        again = tmp_path / "again"
        assert run_quantize(again, "--desc-act", "--bits", "3", "--no-sym") == 0
        for file in again.iterdir():
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()

    def test_another_seed_takes_other_text(self, tmp_path):
        for seed in "01":
            assert run_quantize(tmp_path / seed, "--seed", seed) == 0
        first, second = (QuantizedCheckpoint("it", tmp_path / seed) for seed in "01")
        assert not torch.equal(
            first.linear(first.linears[0]).qweight, second.linear(second.linears[0]).qweight
        )

    def test_rounding_looks_at_no_text(self, tmp_path, capsys):
        missing = ("--calibration", str(tmp_path / "missing"))
        assert run_quantize(tmp_path / "out", "--method", "nearest", *missing) == 0
        assert "ours" not in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--bits", "5"], "5-bit weights are not supported; supported: 2, 3, 4, 8"),
            (["--group-size", "128"], "128 does not divide the 64 inputs"),
            (["--group-size", "64"], "every layer of this model: 8, 16, 32 or -1"),
            (["--group-size", "0"], "group_size must be positive or -1"),
            (["--damp-percent", "2"], "damp_percent must lie between 0 and 1"),
            (["--block-size", "0"], "block_size must be positive"),
            (["--num-samples", "0"], "at least 1 window"),
            (["--seq-len", "1"], "at least 1 window of 2 tokens"),
            (["--seq-len", "100000"], "is more than the"),
            (["--batch-size", "0"], "batch size must be at least 1"),
            (["--threads", "0"], "threads must be at least 1"),
            (["--calibration", "missing.txt"], "can't read text from missing.txt"),
            (["--device", "tpu"], "unknown device 'tpu'"),
            (["--dtype", "int8"], "unknown dtype 'int8'"),
            (["--model", "random:tiny-lama"], "did you mean random:tiny-llama"),
            (["--model", "random:tiny-llama-gptq"], "is quantized already"),
        ],
    )
    def test_bad_options(self, tmp_path, capsys, options, message):
        assert run_quantize(tmp_path / "out", *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in " ".join(error.split())
        assert list(tmp_path.iterdir()) == []

    def test_an_output_that_exists(self, tmp_path, capsys):
        (tmp_path / "mine").touch()
        assert run_quantize(tmp_path) == 2
        assert "exists already" in " ".join(capsys.readouterr().err.split())
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_ctrl_c_and_then_again(self, tmp_path, capsys, monkeypatch):
        def interrupted(*arguments, progress, **options):
            def stop(done, total):
                raise KeyboardInterrupt

            return quantize_model(*arguments, progress=stop, **options)

        monkeypatch.setattr(quantize_module, "quantize_model", interrupted)
        assert run_quantize(tmp_path / "out") == 130
        assert "was not written. The same command goes on" in " ".join(
            capsys.readouterr().err.split()
        )
        assert not (tmp_path / "out").exists()
        monkeypatch.undo()
        assert run_quantize(tmp_path / "out") == 0
        assert run_quantize(tmp_path / "whole") == 0
        assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
        for file in (tmp_path / "out").iterdir():
            assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


EVALUATE = ("--context", "32", "--max-windows", "3", "--threads", "1")


class TestEvaluateCommand:
    def test_models_on_texts(self, tmp_path, capsys):
        assert run_quantize(tmp_path / "out", "--bits", "8") == 0
        (tmp_path / "mine.txt").write_text(TEXT)
        report = tmp_path / "deep" / "report.json"
        options = ["--model", TINY, "--model", str(tmp_path / "out")]
        options += ["--text", "builtin", "--text", str(tmp_path / "mine.txt")]
        assert evaluate.main([*options, *EVALUATE, "--json", str(report)]) == 0
        content = json.loads(report.read_text())
        assert content["command"].startswith("python -m m7_gptq.evaluate --model random:tiny-llama")
        assert {"commit", "cpu", "torch", "num_threads"} <= content["environment"].keys()
        assert content["texts"]["mine.txt"]["num_tokens"] == 93
        rows = content["rows"]
        assert [(row["text"], row["name"] == TINY) for row in rows] == [
            ("builtin", True), ("mine.txt", True), ("builtin", False), ("mine.txt", False),
        ]  # fmt: skip
        assert all(row.keys() <= FIELDS.keys() for row in rows)
        assert rows[2]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=0.01)
        assert rows[2]["perplexity"] != rows[0]["perplexity"]
        assert (rows[0]["bits_per_weight"], rows[2]["bits_per_weight"]) == (32, 8.75)
        text = EvaluationText.of(Tokenizer.of_bytes(), TEXT, context=32, max_windows=3)
        expected = perplexity(tiny_model(), text).perplexity
        assert rows[1]["perplexity"] == pytest.approx(expected)
        assert "mine.txt: 93 tokens scored in windows of 32" in capsys.readouterr().out

    def test_a_sweep(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        (tmp_path / "mine.txt").write_text(TEXT * 3)
        report, drawing = tmp_path / "report.json", tmp_path / "plot.svg"
        options = ["--sweep", "--model", TINY, "--bits", "2", "--group-size", "16,-1"]
        options += ["--calibration", "builtin", "--calibration", str(tmp_path / "mine.txt")]
        options += ["--num-samples", "4", "--seq-len", "32", "--json", str(report)]
        assert evaluate.main([*options, *EVALUATE, "--plot", str(drawing)]) == 0
        content = json.loads(report.read_text())
        rows = content["rows"]
        assert len(rows) == 1 + 2 * (1 + 2)
        assert all(row.keys() <= FIELDS.keys() for row in rows)
        assert rows[0]["name"] == "full precision"
        ours = [row for row in rows if row.get("method") == "gptq"]
        assert {row["calibration"] for row in ours} == {"builtin", "mine.txt"}
        assert all(row["error_ratio_worst"] <= 1 for row in ours)
        assert content["calibration"]["mine.txt"] == {"num_samples": 4, "seq_len": 32, "seed": 0}
        assert "<svg" in drawing.read_text()
        assert "gptq 2 bits, groups of 16" in capsys.readouterr().out
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"mine.txt", "report.json", "plot.svg"}  # nothing else is left

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--sweep", "--model", "random:tiny-qwen2"], "a sweep takes one --model"),
            (["--sweep", "--method", "awq"], "unknown method 'awq'"),
            (["--sweep", "--bits", "4,x"], "--bits takes whole numbers"),
            (["--sweep", "--bits", "6"], "6-bit weights are not supported"),
            (["--sweep", "--group-size", "64"], "64 does not divide the 160 inputs"),
            (["--text", "missing.txt"], "can't read text from missing.txt"),
            (["--context", "100000"], "2048 positions, the context has 100000"),
            (["--batch-size", "0"], "batch size must be at least 1"),
            (["--model", "smollm2-135m-instruct"], "has another tokenizer than random:tiny-llama"),
        ],
    )
    def test_bad_options(self, capsys, options, message):
        assert evaluate.main(["--model", TINY, *EVALUATE, *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in " ".join(error.split())

    def test_gptqmodel_where_it_is_not_installed(self, capsys, monkeypatch):
        monkeypatch.setattr("m7_gptq.sweep.is_installed", lambda: False)
        assert evaluate.main(["--sweep", "--model", TINY, "--method", "gptqmodel"]) == 2
        assert "gptqmodel is not installed: pip install gptqmodel" in capsys.readouterr().err

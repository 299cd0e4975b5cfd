"""``python -m dev.bench kernels``: what it counts, on any machine."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from dev.bench import cli, kernels

SMALL = ["--num-heads", "4", "--num-kv-heads", "2", "--head-dim", "64", "--device", "cpu"]


@pytest.fixture
def small_pool(monkeypatch):
    monkeypatch.setitem(kernels._POOL_BYTES, "cpu", 8 << 20)
    monkeypatch.setattr(kernels, "_REPEATS", 1)


def test_a_case_is_a_batch_and_its_lengths():
    case = kernels.Case.parse("4x10:100")
    assert sorted(case.lens(torch.device("cpu")).tolist()) == [10, 40, 70, 100]
    assert kernels.Case.parse("2x64").lens(torch.device("cpu")).tolist() == [64, 64]
    for text in ("64", "x", "4x", "4x9:3", "ax3"):
        with pytest.raises(argparse.ArgumentTypeError, match="BxS"):
            kernels.Case.parse(text)


def test_the_report_counts_every_byte_once(small_pool, tmp_path, capsys):
    file = tmp_path / "kernels.json"
    cases = ["--case", "2x64", "--case", "4x10:100"]
    assert cli.main(["kernels", *SMALL, *cases, "--json", str(file)]) == 0
    assert "2x64" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["kind"] == "kernels"
    assert [row["case"] for row in report["rows"]] == ["2x64", "4x10:100"]
    per_token = 2 * 2 * 64 * 4  # keys and values, two heads of 64 float32 numbers
    assert [row["bytes"] for row in report["rows"]] == [128 * per_token, 220 * per_token]
    for row in report["rows"]:
        assert row["us"] > 0 and row["read_share"] > 0
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["us"] * 1e6)


def test_calls_read_blocks_of_their_own(small_pool):
    shape = kernels.Shape(4, 2, 64, 16, torch.float32, torch.device("cpu"))
    pool = kernels.Pool(shape)
    seen: list[int] = []
    for call in pool.calls(lambda *arguments: arguments, kernels.Case.parse("2x64")):
        tables = call()[3]
        seen += tables.flatten().tolist()
    assert len(seen) == len(set(seen)) > 8
    assert max(seen) < pool.num_blocks


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--case", "64x100000"], "memory"),
        (["--num-heads", "5"], "multiple"),
        (["--backend", "triton"], "CUDA device"),
        (["--flash-attn-3", "no/such.so"], "no/such.so"),
    ],
)
def test_wrong_use_is_a_clear_error(argv, message, small_pool, capsys):
    assert cli.main(["kernels", *SMALL, "--case", "1x16", *argv]) == 2
    assert message in capsys.readouterr().err

"""The command line of every milestone: what goes in, what comes out, exit codes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from support import MILESTONES, PAGED

from common import cli
from common.demo import Arrival, watch
from common.prompts import read_prompts

TINY = ["--model", "random:tiny-qwen3", "--device", "cpu", "--max-tokens", "6", "--ignore-eos"]


def run(milestone, *argv):
    """The exit code of ``python -m milestone.run`` with the tiny model."""
    module = importlib.import_module(f"{milestone}.run")
    return cli.main(
        module.LLMEngine, module.EngineConfig, module.demonstrate, "test", [*TINY, *argv]
    )


def run_json(capsys, milestone, *argv):
    code = run(milestone, "--json", *argv)
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("milestone", MILESTONES)
def test_json_has_outputs_and_stats(milestone, capsys):
    code, result = run_json(capsys, milestone, "--prompt", "Hello", "--prompt", "World, again")
    assert code == cli.EXIT_OK
    assert [record["prompt"] for record in result["outputs"]] == ["Hello", "World, again"]
    for record in result["outputs"]:
        assert len(record["token_ids"]) == 6
        assert record["finish_reason"] == "length"
        assert isinstance(record["text"], str)
        assert record["ttft_s"] > 0 and record["tpot_s"] > 0
    assert result["stats"]["num_generated_tokens"] == 12


def test_all_milestones_print_the_same(capsys):
    argv = ("--prompt", "Hello", "--n", "2", "--temperature", "0.8", "--top-k", "20", "--seed", "3")
    results = [run_json(capsys, milestone, *argv)[1]["outputs"] for milestone in MILESTONES]
    tokens = [[record["token_ids"] for record in outputs] for outputs in results]
    assert tokens.count(tokens[0]) == len(MILESTONES)
    assert tokens[0][0] != tokens[0][1]


def test_text_goes_to_stdout_and_nothing_else(capsys):
    _, result = run_json(capsys, "m3_paged", "--prompt", "Hello", "--no-chat")
    assert run("m3_paged", "--prompt", "Hello", "--no-chat", "--stats") == cli.EXIT_OK
    captured = capsys.readouterr()
    assert captured.out == result["outputs"][0]["text"] + "\n"
    assert "num steps" in captured.err


@pytest.mark.parametrize("milestone", MILESTONES)
def test_streaming_prints_the_same_text(milestone, capsys):
    _, result = run_json(capsys, milestone, "--prompt", "Hello")
    assert run(milestone, "--prompt", "Hello", "--stream") == cli.EXIT_OK
    assert capsys.readouterr().out == result["outputs"][0]["text"] + "\n"


def test_streams_of_several_prompts_are_told_apart(capsys):
    assert run("m2_batching", "--prompt", "a", "--prompt", "b", "--stream") == cli.EXIT_OK
    labels = {line.split(" ")[0] for line in capsys.readouterr().out.splitlines()}
    assert labels == {"[0]", "[1]"}


def test_logprobs_are_in_the_json(capsys):
    _, result = run_json(capsys, "m3_paged", "--prompt", "Hello", "--logprobs", "2")
    record = result["outputs"][0]
    assert len(record["logprobs"]) == 6
    for chosen, entries in zip(record["token_ids"], record["logprobs"], strict=True):
        assert entries[0]["token_id"] == chosen
        assert entries[0]["rank"] == 1  # greedy
    total = sum(entries[0]["logprob"] for entries in record["logprobs"])
    assert record["cumulative_logprob"] == pytest.approx(total)


def test_bad_lines_are_reported_and_the_rest_runs(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "first", "max_tokens": 2}\n'
        "{broken\n"
        "\n"
        '{"prompt": [1, 2, 99999]}\n'
        '{"prompt": "x", "temperatur": 1}\n'
        '{"prompt": "x", "temperature": -1}\n'
        '{"max_tokens": 1}\n'
        '"last"\n',
        encoding="utf-8",
    )
    output = tmp_path / "out.jsonl"
    code = run("m3_paged", "--prompts-file", str(prompts), "--output", str(output))
    captured = capsys.readouterr()
    assert code == cli.EXIT_SOME_FAILED
    assert captured.out == ""
    for number, reason in ((2, "not JSON"), (4, "99999"), (5, "temperatur"), (6, "temperature"),
                           (7, "prompt")):
        line = next(x for x in captured.err.splitlines() if f"prompts.jsonl:{number}:" in x)
        assert reason in line
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    served = {r["prompt"]: r for r in records if "text" in r}
    assert set(served) == {"first", "last"}
    assert len(served["first"]["token_ids"]) == 2
    assert sum("error" in r for r in records) == 5


def test_a_line_may_bias_tokens(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "x", "logit_bias": {"65": 1000}}\n{"prompt": "x", "logit_bias": {"A": 1}}\n'
    )
    code, result = run_json(capsys, "m1_basic", "--prompts-file", str(prompts))
    assert code == cli.EXIT_SOME_FAILED
    assert result["outputs"][0]["text"] == "A" * 6
    assert "logit_bias" in result["outputs"][1]["error"]


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\r\n\r\n  zwei äöü \nthree".encode())
    lines = read_prompts(path)
    assert [line.prompt for line in lines] == ["one", "  zwei äöü ", "three"]
    assert [line.source.rsplit(":", 1)[1] for line in lines] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts-file", "no/such/file.txt"], "no/such/file.txt"),
        (["--prompt", "x", "--model", "random:tiny-lama"], "tiny-llama"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens"),
        (["--prompt", "x", "--dtype", "int8"], "float32"),
        (["--prompt", "x", "--block-size", "3"], "block_size"),
        (["--prompt", "x", "--output", "no/such/folder/out.jsonl"], "no/such/folder"),
        (["--max-model-len", "4"], "shorten it"),  # the demonstration's own prompts
        (["--prompt", "x", "--num-kv-blocks", "2", "--max-model-len", "512"], "max_model_len"),
    ],
)
@pytest.mark.parametrize("milestone", PAGED)
def test_wrong_usage_says_what_to_do(milestone, argv, message, capsys):
    assert run(milestone, *argv) == cli.EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error:" in captured.err and message in captured.err


def test_a_file_without_prompts_is_an_error(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert run("m1_basic", "--prompts-file", str(empty)) == cli.EXIT_USAGE
    assert "no prompts" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert run("m1_basic", "--prompts-file", str(tmp_path / "latin.txt")) == cli.EXIT_USAGE
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("milestone", MILESTONES)
def test_without_prompts_there_is_a_demonstration(milestone, capsys):
    assert run(milestone) == cli.EXIT_OK
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize("milestone", PAGED)
def test_watching_ends_with_every_request_answered(milestone):
    module = importlib.import_module(milestone)
    engine = module.LLMEngine(module.EngineConfig(model="random:tiny-llama", device="cpu"))
    with open(os.devnull, "w") as nowhere:
        terminal = Console(file=nowhere, force_terminal=True, width=100)
        panel = importlib.import_module(f"{milestone}.run").block_map
        watch(engine, terminal, [Arrival("a", 0, 4), Arrival("b", 2, 3)], lambda: panel(engine))
    assert engine.stats()["num_requests_finished"] == 2
    assert engine.stats()["num_generated_tokens"] <= 7


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_ctrl_c_keeps_what_is_done(tmp_path):
    output = tmp_path / "out.jsonl"
    argv = ["--model", "random:tiny-llama", "--device", "cpu", "--ignore-eos", "--output",
            str(output), "--prompts-file", str(tmp_path / "prompts.jsonl")]
    short, long = '{"prompt": "a", "max_tokens": 2}\n', '{"prompt": "b", "max_tokens": 1000}\n'
    (tmp_path / "prompts.jsonl").write_text(short + long * 20)
    process = subprocess.Popen(
        [sys.executable, "-m", "m1_basic.run", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (output.exists() and output.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_INTERRUPTED, errors
    assert "interrupted" in errors
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert records[0]["prompt"] == "a"
    assert len(records) < 21

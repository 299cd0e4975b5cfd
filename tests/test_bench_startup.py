"""``python -m dev.bench startup``: fresh processes, and what their times are made of."""

from __future__ import annotations

import json

import pytest

from dev.bench import cli, startup, startup_child
from dev.bench.report import STARTUP_FIELDS

TINY = ["--model", "random:tiny-llama", "--device", "cpu", "--input-len", "20",
        "--output-len", "4"]


def test_a_start_is_the_sum_of_its_phases(tmp_path, capsys):
    file = tmp_path / "startup.json"
    assert cli.main(["startup", "--milestone", "m3", *TINY, "--block-size", "8",
                     "--json", str(file)]) == cli.EXIT_OK
    report = json.loads(file.read_text())
    assert report["kind"] == "startup" and "m3_paged cold" in capsys.readouterr().out
    assert report["options"]["m3_paged"]["block_size"] == 8
    assert [(row["name"], row["case"]) for row in report["rows"]] == [
        ("m3_paged", "cold"), ("m3_paged", "warm")]
    for row in report["rows"]:
        assert set(row) == set(STARTUP_FIELDS)
        phases = ("interpreter_s", "imports_s", "engine_s", "prefill_s", "decode_s")
        assert all(row[phase] > 0 for phase in phases)
        assert row["last_token_s"] == pytest.approx(sum(row[phase] for phase in phases))
        assert row["first_token_s"] == pytest.approx(row["last_token_s"] - row["decode_s"])
        assert row["num_kernels_compiled"] == 0  # there are none on the CPU


def test_only_the_cold_start_finds_an_empty_triton_cache(monkeypatch):
    starts = []

    def spawn(job, triton_cache):
        folder = startup.Path(triton_cache)
        starts.append((job["imports_only"], sorted(path.name for path in folder.iterdir())))
        (folder / "kernel.cubin").touch()
        return {"times": {}}

    monkeypatch.setattr(startup, "_spawn", spawn)
    job = {"milestone": "m3_paged", "imports_only": False}
    results = startup.measure(job, lambda text: None)
    assert list(results) == ["cold", "warm"]
    assert [imports_only for imports_only, _ in starts] == [True, False, False]
    assert starts[2][1] == ["kernel.cubin"]


def test_a_job_of_imports_stops_there():
    job = {"milestone": "m3_paged", "imports_only": True}
    result = startup_child.serve(job)
    assert list(result) == ["times"] and list(result["times"]) == ["started", "imported"]


def test_a_process_that_fails_says_why(tmp_path):
    job = {"milestone": "m99_none", "imports_only": True}
    with pytest.raises(RuntimeError, match=r"m99_none did not start \(1\): ModuleNotFoundError"):
        startup._spawn(job, str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--milestone", "m99"], "there is no milestone"),
        (["--input-len", "2040", "--output-len", "100"], "serves at most 2048"),
        (["--block-size", "4"], "block_size must be 8 to 256"),
        (["--dtype", "float8"], "unknown dtype"),
        (["--output-len", "0"], "at least 1"),
        (["--batch-size", "4"], "unrecognized arguments"),
    ],
)
def test_misuse_is_found_before_any_process_runs(options, message, capsys, monkeypatch):
    monkeypatch.setattr(startup, "_spawn", lambda *arguments: pytest.fail("it ran"))
    try:
        code = cli.main(["startup", *TINY, *options])
    except SystemExit as error:  # argparse's own way
        code = error.code
    assert code == cli.EXIT_USAGE
    assert message in capsys.readouterr().err.replace("\n", " ")

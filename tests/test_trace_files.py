"""Trace files that are not as they should be, and what is made of those that are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from PIL import Image
from support import ROOT, new_engine, random_prompts, run_to_end

from common.sampling_params import SamplingParams
from common.trace import Trace
from dev.trace import cli
from dev.trace.perfetto import trace_events
from dev.trace.reader import read_trace
from dev.trace.screenshot import BROWSERS, find_browser
from dev.trace.story import State, tell
from dev.trace.summary import facts
from dev.trace.times import device_intervals, host_intervals


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A file with preemptions, hits, an error-free end, and steps that overlap."""
    path = tmp_path_factory.mktemp("traces") / "m6.jsonl"
    engine = new_engine(
        "m6_prefix", block_size=8, num_kv_blocks=16, max_model_len=96, max_num_batched_tokens=40
    )
    begin = random_prompts(4, [20])[0]
    with Trace(path) as trace:
        trace.attach(engine)
        for i in range(6):
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
            engine.add_request(f"r{i}", [*begin, i], params)
            engine.step()
        run_to_end(engine)
    return path


@pytest.fixture
def lines(traced):
    return traced.read_text().splitlines(keepends=True)


def write(path, lines):
    path.write_text("".join(lines), encoding="utf-8")
    return path


# --- bad files ----------------------------------------------------------------------------------


def refused(path, capsys) -> str:
    """What the command line says of a file that it does not take."""
    assert cli.main(["summary", str(path)]) == cli.EXIT_USAGE
    return " ".join(capsys.readouterr().err.split())


def test_a_missing_file(tmp_path, capsys):
    assert "none.jsonl" in refused(tmp_path / "none.jsonl", capsys)


def test_an_empty_file(tmp_path, capsys):
    said = refused(write(tmp_path / "t", []), capsys)
    assert "is empty" in said and "--trace" in said


@pytest.mark.parametrize("text", ["hello\n", "{}\n", "[1]\n", '{"step": 0}\n', "\x89PNG\n"])
def test_what_is_not_a_trace(text, tmp_path, capsys):
    assert "is not a trace" in refused(write(tmp_path / "t", [text]), capsys)


def test_another_version(tmp_path, capsys, lines):
    header = json.loads(lines[0]) | {"folovllm_trace": 99}
    path = write(tmp_path / "t", [json.dumps(header) + "\n", *lines[1:]])
    said = refused(path, capsys)
    assert "version 99" in said and "write it again" in said


@pytest.mark.parametrize(
    "line",
    ["not json", "[]", "{}", '{"step": 1}', '{"request": 77, "id": "a", "sample": 0, "at": 1, '
     '"prompt_tokens": 1, "max_tokens": 2}', '{"output": 99, "pieces": []}',
     '{"step": 1, "times": [1, 2, 3, 4], "decode": [99], "running": 1, "waiting": 0, '
     '"kv": [1, 1]}'],
)  # fmt: skip
def test_a_line_in_the_middle_that_makes_no_sense(line, tmp_path, capsys, lines):
    path = write(tmp_path / "t", [*lines[:5], line + "\n", *lines[5:]])
    assert "line 6" in refused(path, capsys)


def test_a_last_line_that_is_cut_is_left_out_and_said(tmp_path, capsys, lines):
    whole = read_trace(write(tmp_path / "w", lines[:20]))
    cut = write(tmp_path / "t", [*lines[:20], lines[20][:30]])
    trace = read_trace(cut)
    assert trace.is_cut and not whole.is_cut
    assert len(trace.frames) == len(whole.frames)
    assert cli.main(["summary", str(cut)]) == cli.EXIT_OK
    said = " ".join(capsys.readouterr().err.split())
    assert "cut off" in said and "did not end in order" in said


@pytest.mark.parametrize("place", [1, 2, 7, 30])
def test_a_file_that_ends_anywhere_can_be_shown(place, tmp_path, lines):
    trace = read_trace(write(tmp_path / "t", lines[:place]))
    assert tell(trace) is not None
    assert facts(trace, tell(trace))["steps"].startswith(str(len(trace.frames)))
    json.dumps(trace_events(trace))


def test_a_killed_run_leaves_what_it_did(tmp_path):
    """Not even the interpreter gets to close the file."""
    script = f"""
import os
from m3_paged import EngineConfig, LLMEngine, SamplingParams
from common.trace import Trace
engine = LLMEngine(EngineConfig(model="random:tiny-llama", device="cpu"))
Trace({str(tmp_path / "t.jsonl")!r}).attach(engine)
engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True))
for _ in range(4):
    engine.step()
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    trace = read_trace(tmp_path / "t.jsonl")
    assert [frame.step for frame in trace.frames] == [0, 1, 2, 3]
    assert not trace.is_complete


# --- what is made of it -------------------------------------------------------------------------


def test_the_summary_says_what_happened(traced, capsys):
    trace = read_trace(traced)
    lives = tell(trace)
    said = facts(trace, lives)
    preemptions = sum(len(frame.preempted) for frame in trace.frames)
    assert preemptions > 0
    assert said["requests"] == "6: 6 length"
    assert said["preemptions"] == str(preemptions)
    assert f"{sum(frame.num_tokens for frame in trace.frames):,}, " in said["tokens computed"]
    assert cli.main(["summary", str(traced), str(traced)]) == cli.EXIT_OK
    out = capsys.readouterr().out
    assert out.count("m6_prefix") == 2
    assert out.count("r5") == 2


def test_parts_of_the_hosts_time_fill_each_step(traced):
    for frame in read_trace(traced).frames:
        parts = list(host_intervals(frame).values())
        assert parts[0].start == frame.start and parts[-1].end == frame.end
        assert all(a.end == b.start for a, b in pairwise(parts))


def test_the_device_does_one_step_after_the_other(traced):
    trace = read_trace(traced)
    for device in ("cpu", "cuda:0"):
        trace.header["config"]["device"] = device
        intervals = [interval for interval in device_intervals(trace) if interval]
        assert len(intervals) == sum(frame.step is not None for frame in trace.frames)
        assert all(interval.length >= 0 for interval in intervals)
        assert all(a.end <= b.start for a, b in pairwise(intervals))


def test_perfetto_events_are_as_the_format_wants_them(traced, tmp_path):
    """Required fields by phase, named threads, slices of a thread one within the other."""
    file = tmp_path / "t.json"
    assert cli.main(["export", str(traced), "--perfetto", str(file)]) == cli.EXIT_OK
    content = json.loads(file.read_text())
    events = content["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C", "i"}
    threads, named = {}, set()
    for event in events:
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M":
            named.add((event["name"], event["pid"], event["tid"]))
            assert event["args"]
            continue
        assert isinstance(event["ts"], int) and event["ts"] >= 0
        if event["ph"] == "C":
            assert event["args"] and all(isinstance(n, int) for n in event["args"].values())
        if event["ph"] == "i":
            assert event["s"] == "t"
        if event["ph"] == "X":
            assert isinstance(event["dur"], int) and event["dur"] >= 0
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for (pid, tid), slices in threads.items():
        assert ("process_name", pid, 0) in named
        assert ("thread_name", pid, tid) in named
        open_until: list[int] = []
        for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
            end = event["ts"] + event["dur"]
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or end <= open_until[-1], event
            open_until.append(end)
    trace = read_trace(traced)
    names = [event["name"] for event in events if event["ph"] == "X"]
    assert names.count("step 3") == 2  # on the host, on the device
    decodes = sum(s.state is State.DECODE for life in tell(trace) for s in life.spans)
    assert names.count("decode") == decodes
    assert sum("from the cache" in event["name"] for event in events) == sum(
        len(life.hits) for life in tell(trace)
    )


def test_view_writes_one_page_beside_the_trace(traced, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    file = tmp_path / "copy.jsonl"
    file.write_bytes(traced.read_bytes())
    assert cli.main(["view", str(file)]) == cli.EXIT_OK  # no terminal: it is not opened
    page = tmp_path / "copy.html"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text.partition("<script")[0]
    assert not any(link in text for link in ("http://", "https://", "@import", "url("))
    other = tmp_path / "pair.html"
    argv = ["view", str(file), str(traced), "--output", str(other), "--open"]
    assert cli.main(argv) == cli.EXIT_OK
    assert opened == [other.as_uri()]
    assert other.read_text().count('type="application/json">') == 2


def test_a_picture_without_a_browser_is_refused_with_advice(traced, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    argv = ["screenshot", str(traced), "--output", str(tmp_path / "p.png")]
    assert cli.main(argv) == cli.EXIT_USAGE
    assert BROWSERS[0] in capsys.readouterr().err


def test_the_cost_is_measured(capsys):
    work = ["--num-requests", "2", "--input-len", "4:9", "--output-len", "3", "--rounds", "1"]
    argv = ["cost", "--milestone", "m3", "--model", "random:tiny-llama", "--device", "cpu", *work]
    assert cli.main(argv) == cli.EXIT_OK
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"m3_paged, 2 requests.*ratio [\d.]+.*in the trace itself: \d+ us", said)
    assert cli.main(["cost", "--milestone", "m99"]) == cli.EXIT_USAGE
    assert "no milestone 'm99'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium or Chrome")
def test_a_picture_has_the_size_that_was_asked_for(traced, tmp_path):
    file = tmp_path / "p.png"
    argv = ["screenshot", str(traced), "--frame", "9", "--size", "640x400", "--output", str(file)]
    assert cli.main(argv) == cli.EXIT_OK
    with Image.open(file) as image:
        assert image.size == (1280, 800)  # two pixels for one
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50

"""Serving and mixed work in the bench: arrivals, what users see, what is counted."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics

import pytest
from rich.console import Console

from common.metrics import RequestMetrics
from common.outputs import CompletionOutput, RequestOutput
from dev.bench import cli
from dev.bench.load import FRONTS, Hold, Users, serve_async, serve_sync
from dev.bench.mixed import MixedPass, find_window
from dev.bench.report import FIELDS, show
from dev.bench.runner import milestone_names
from dev.bench.serve import ServePass, depth, within
from dev.bench.serving_fields import (
    CHUNK_FIELDS,
    MIXED_FIELDS,
    MIXED_LINES,
    SERVE_FIELDS,
    SERVE_LINES,
)
from dev.bench.workloads import BenchRequest, Lengths, arrival_times

TINY = ["--model", "random:tiny-llama", "--device", "cpu"]
SERVE = ["serve", *TINY, "--num-requests", "6", "--input-len", "4:20", "--output-len", "2:9"]
# The decodes have more to write than the window needs: the machine may be busy with other things.
MIXED = ["mixed", *TINY, "--decodes", "3", "--decode-input-len", "5", "--decode-output-len", "90",
         "--prompts", "2", "--prompt-len", "50", "--prompt-output-len", "3",
         "--warmup-tokens", "8", "--tail-tokens", "4", "--warmup", "0"]
BATCHING = [name for name in milestone_names() if name >= "m2"]


def bench(tmp_path, *options: str) -> dict:
    """Run the command line and read its JSON."""
    file = tmp_path / "bench.json"
    assert cli.main([*options, "--json", str(file)]) == cli.EXIT_OK
    return json.loads(file.read_text())


class FakeEngine:
    """A second for each step, and its own clock; everyone gets a token in every step.

    With a room of N, at most so many run at the same time.
    """

    def __init__(self, room: int = 1000) -> None:
        self.now = 100.0
        self.room = room
        self.requests: dict[str, tuple[int, list[float], RequestMetrics]] = {}
        self.sleeps: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    def add_request(self, request_id, prompt, params, priority=0):
        self.requests[request_id] = params.max_tokens, [], RequestMetrics(self.now)

    def abort_request(self, request_id):
        self.requests.pop(request_id, None)

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        begin, self.now = self.now, self.now + 1.0
        outputs = []
        for request_id, (wanted, times, metrics) in list(self.requests.items())[: self.room]:
            metrics.first_scheduled_time = metrics.first_scheduled_time or begin
            times.append(self.now)
            ended = len(times) == wanted
            sample = CompletionOutput(0, "", [7], finish_reason="length" if ended else None)
            outputs.append(RequestOutput(request_id, None, [1], [sample], ended, metrics))
            if ended:
                del self.requests[request_id]
        return outputs


def coming_at(*times: float, output_len: int = 2) -> list[BenchRequest]:
    return [BenchRequest([1], output_len, time) for time in times]


def answered(arrival: float, *token_times: float, scheduled: float | None = None) -> RequestMetrics:
    return RequestMetrics(arrival, scheduled, list(token_times), token_times[-1])


# --- arrivals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness):
    times = arrival_times(4000, rate=5.0, burstiness=burstiness)
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times])]
    assert min(gaps) >= 0 and times[-1] == pytest.approx(4000 / 5.0)
    # The deviation of a gamma distribution of shape B is its mean by sqrt(B).
    spread = statistics.pstdev(gaps) / statistics.mean(gaps)
    assert spread == pytest.approx(burstiness**-0.5, rel=0.1)


def test_arrivals_depend_on_the_seed_alone():
    assert arrival_times(5, 2.0, seed=1) == arrival_times(5, 2.0, seed=1)
    assert arrival_times(5, 2.0, seed=1) != arrival_times(5, 2.0, seed=2)
    slow, fast = arrival_times(5, 2.0), arrival_times(5, 4.0)
    assert slow == pytest.approx([2 * time for time in fast])


def test_an_infinite_rate_is_all_at_once():
    assert arrival_times(3, float("inf")) == [0.0, 0.0, 0.0]


def test_runs_have_the_same_times_and_fresh_prompts():
    serving = ServePass("", 4, Lengths(3, 9), Lengths(1, 9), rate=3.0)
    mixed = MixedPass("", 3, Lengths(3, 3), Lengths(9, 9), num_prompts=2, prompt_len=7)
    for one in (serving, mixed):
        first, second = one.requests(320, run=1), one.requests(320, run=2)
        for a, b in zip(first, second, strict=True):
            assert (a.arrival_s, a.input_len, a.output_len) == (
                b.arrival_s, b.input_len, b.output_len)
            assert a.prompt_token_ids != b.prompt_token_ids
    assert [request.arrival_s for request in serving.requests(320, 0)] == arrival_times(4, 3.0)
    assert [request.input_len for request in mixed.requests(320, 0)] == [3, 3, 3, 7, 7]


# --- what the users see ---------------------------------------------------------------------------


def test_a_wait_counts_from_the_arrival_that_was_drawn():
    engine = FakeEngine()
    users = Users(coming_at(0.5, 3.25, 0.75), temperature=0.0)
    serve_sync(engine, users, engine.clock, engine.sleep)
    first, third, second = users.metrics
    # Started at 100: idle until 100.5; the second comes during the first step and joins after it.
    assert first.token_times == [101.5, 102.5] and first.ttft == 1.0
    assert second.token_times == [102.5, 103.5] and second.ttft == 1.75
    assert third.arrival_time == 103.25 and third.token_times == [104.5, 105.5]
    assert users.late_s == [0.0, 0.25, 0.75]
    assert engine.sleeps == [0.5]
    assert [m.queue_time for m in (first, second, third)] == [0.0, 0.75, 0.25]
    assert first.finished_time == 102.5 and first.itl == [1.0]


def test_the_held_come_when_the_others_have_their_tokens():
    engine = FakeEngine(room=2)
    # Two at a time: the third of those waited for gets its third token in the eighth step.
    users = Users(coming_at(0, 0, 0, 0, 0, output_len=5), 0.0, Hold(num_first=3, num_tokens=3))
    serve_sync(engine, users, engine.clock, engine.sleep)
    users.check("fake")
    assert users.metrics[2].token_times == [106.0, 107.0, 108.0, 109.0, 110.0]
    assert [m.arrival_time for m in users.metrics[3:]] == [108.0, 108.0]
    assert users.metrics[3].token_times[0] == 109.0
    assert users.metrics[4].token_times[0] == 111.0


def test_both_fronts_serve_the_same():
    """The times are those of the machine, the tokens are not."""
    seen = []
    for front in FRONTS:
        engine = FakeEngine()
        users = Users(coming_at(0.0, 0.01, 0.0, 0.0), 0.0, Hold(num_first=2, num_tokens=2))
        if front == "sync":
            serve_sync(engine, users, engine.clock, engine.sleep)
        else:
            asyncio.run(serve_async(engine, users))
        users.check("fake")
        assert all(m.arrival_time <= m.token_times[0] <= m.finished_time for m in users.metrics)
        seen.append([len(metrics.token_times) for metrics in users.metrics])
    assert seen[0] == seen[1] == [2, 2, 2, 2]


def test_an_error_of_one_user_ends_the_run():
    class Failing(FakeEngine):
        def step(self):
            raise ZeroDivisionError("no more")

    users = Users(coming_at(0.0, 0.0), 0.0)
    with pytest.raises(RuntimeError, match="no more"):
        asyncio.run(serve_async(Failing(), users))


def test_missing_tokens_do_not_go_unnoticed():
    users = Users(coming_at(0.0, output_len=3), 0.0)
    users.begin(0.0)
    sample = CompletionOutput(0, "", [7], finish_reason="error", stop_reason="no memory")
    users.sees(RequestOutput("0", None, [1], [sample], True, RequestMetrics()), 1.0)
    with pytest.raises(RuntimeError, match=r"m gave request 0 1 of 3 tokens .*no memory"):
        users.check("m")


# --- what is made of it ---------------------------------------------------------------------------


def test_a_good_request_keeps_all_limits():
    metrics = answered(10.0, 10.5, 10.6, 10.9)  # TTFT 0.5, gaps 0.1 and 0.3, TPOT 0.2, E2E 0.9
    for name, value in (("ttft", 0.5), ("itl", 0.3), ("tpot", 0.2), ("e2e", 0.9)):
        assert within(metrics, {name: value + 1e-6})
        assert not within(metrics, {name: value - 1e-6})
    assert within(metrics, {}) and within(metrics, {"ttft": 1, "tpot": 1})
    assert not within(metrics, {"ttft": 1, "tpot": 0.1})
    assert within(answered(0.0, 0.5), {"tpot": 1e-9, "itl": 1e-9})  # a single token has no gaps


def test_the_queue_has_a_mean_and_a_peak():
    assert depth([(0, 4), (1, 2), (2, 3), (9, 9)], seconds=12) == (0.5, 2)
    assert depth([], seconds=1) == (0.0, 0)


def test_the_window_goes_from_the_arrival_to_the_tail():
    # Two decodes with a token each second; three prompts come at 4.5, the last is answered at 7.5.
    decodes = [answered(0, *(t + offset for t in range(1, 13))) for offset in (0.0, 0.5)]
    prompts = [answered(4.5, 6.0), answered(4.5, 7.5), answered(4.5, 7.0)]
    window = find_window("m", decodes, prompts, warmup_tokens=4, tail_tokens=2)
    # First: 4-5 to 9-10. Second, whose token at 4.5 released them: 4.5-5.5 to 8.5-9.5.
    assert len(window.gaps) == 6 + 5 and window.seconds == 10 - 4.5
    # Everyone has two tokens at 2.5: 3-4 of the first, 2.5-3.5 and 3.5-4.5 of the second.
    assert len(window.quiet_gaps) == 1 + 2


def test_a_stall_is_in_the_window_and_not_in_the_quiet_time():
    decodes = [answered(0, 1.0, 2.0, 3.0, 4.0, 13.0, 14.0, 15.0, 16.0)]
    window = find_window("m", decodes, [answered(4.0, 12.9)], warmup_tokens=4, tail_tokens=1)
    assert window.gaps == [9.0, 1.0] and window.quiet_gaps == [1.0, 1.0]


def test_decodes_must_outlast_the_window():
    decodes = [answered(0, 1.0, 2.0, 3.0, 4.0, 5.0), answered(0, 1.0, 2.0, 3.0, 4.0, 9.0, 10.0)]
    with pytest.raises(RuntimeError, match="m: 1 of 2 decodes ended before the window did"):
        find_window("m", decodes, [answered(4.0, 8.0)], warmup_tokens=4, tail_tokens=1)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("milestone", "front"),
    [*((name, "async") for name in milestone_names()), ("m1_basic", "sync"), ("m4_flash", "sync")],
)
def test_serve_counts_requests_and_tokens(tmp_path, milestone, front):
    report = bench(tmp_path, *SERVE, "--milestone", milestone, "--front", front, "--request-rate",
                   "400,inf", "--goodput", "ttft:9e6", "--goodput", "itl:9e6")
    paced, at_once = report["rows"]
    assert report["kind"] == paced["measure"] == "serve" and report["ceilings"] is None
    assert (paced["request_rate"], at_once["request_rate"]) == (400.0, None)
    for row in report["rows"]:
        pairs = [(r.input_len, r.output_len) for r in ServePass(
            "", 6, Lengths(4, 20), Lengths(2, 9)).requests(320, run=1)]
        assert row["prompt_tokens"] == sum(pair[0] for pair in pairs)
        assert row["output_tokens"] == sum(pair[1] for pair in pairs)
        assert row["goodput_share"] == 1.0
        assert row["goodput_requests_per_s"] == row["requests_per_s"]
        assert row["num_steps"] <= row["output_tokens"]
        assert row["e2e_max_s"] <= row["seconds"] and row["ttft_p50_s"] <= row["e2e_p50_s"]
        assert row["num_waiting_mean"] <= row["num_present_mean"] <= row["num_present_peak"] <= 6
    assert at_once["num_present_peak"] == 6 and at_once["num_waiting_peak"] == 6
    assert paced["seconds"] > 6 / 400


def test_limits_that_nobody_keeps(tmp_path):
    report = bench(tmp_path, *SERVE, "--milestone", "m4", "--goodput", "ttft:1e-6")
    assert report["rows"][0]["goodput_share"] == 0.0
    assert report["work"]["ttft_limit_s"] == pytest.approx(1e-9)
    assert report["work"]["request_rate"] == "inf"


@pytest.mark.parametrize(
    ("milestone", "front"), [*((name, "async") for name in BATCHING), ("m4_flash", "sync")]
)
def test_mixed_counts_the_gaps_of_the_window(tmp_path, milestone, front):
    report = bench(tmp_path, *MIXED, "--milestone", milestone, "--front", front, "--repeat", "1")
    (row,) = report["rows"]
    assert row["measure"] == "mixed" and row["num_requests"] == 5
    assert row["prompt_tokens"] == 3 * 5 + 2 * 50 and row["output_tokens"] == 3 * 90 + 2 * 3
    assert len(row["prompt_ttfts_s"]) == 2
    assert row["prompt_ttft_min_s"] <= row["prompt_ttft_max_s"] <= row["window_s"]
    assert row["itl_p50_s"] <= row["itl_p99_s"] <= row["itl_max_s"]
    assert row["quiet_itl_p50_s"] <= row["quiet_itl_max_s"]
    assert row["itl_max_s"] <= row["run_itl_max_s"]
    assert row["num_steps"] >= 90


def test_every_field_is_documented(tmp_path):
    milestone = ("--milestone", BATCHING[-1])
    (served,) = bench(tmp_path, *SERVE, *milestone, "--goodput", "tpot:5")["rows"]
    (mixed,) = bench(tmp_path, *MIXED, *milestone, "--repeat", "1")["rows"]
    for row, own, lines in (
        (served, SERVE_FIELDS, SERVE_LINES), (mixed, MIXED_FIELDS, MIXED_LINES)
    ):
        assert set(own) <= set(row) <= {*own, *FIELDS, *CHUNK_FIELDS}
        assert {field for _, field, _ in lines} <= {*row, *CHUNK_FIELDS}


@pytest.mark.skipif("m5_chunked" not in BATCHING, reason="chunks come with m5")
def test_chunks_are_counted_by_what_ended_them(tmp_path):
    report = bench(tmp_path, *MIXED, "--milestone", "m5_chunked", "--prompt-len", "100",
                   "--max-num-seqs", "8", "--max-num-batched-tokens", "40", "--repeat", "1",
                   "--front", "sync")
    (row,) = report["rows"]
    # 3 decodes leave 37 tokens: 37 + 37 + 26 of the first; 11 + 37 + 37 + 15 of the second.
    assert row["chunks_by_budget"] == 5 and row["chunks_by_prompt"] == 3 + 2


def test_figures_are_medians_and_subjects_stand_side_by_side(tmp_path, capsys):
    report = bench(tmp_path, *MIXED, "--milestone", "m4", "--repeat", "2")
    (row,) = report["rows"]
    assert row["seconds"] == pytest.approx((row["seconds_min"] + row["seconds_max"]) / 2)
    assert "speed against" not in capsys.readouterr().out
    report["rows"].append(row | {"name": "another"})
    show(report, Console(width=200))
    shown = capsys.readouterr().out
    assert "speed against m4_flash" in shown and "ITL, quiet p99" in shown


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (SERVE, ["--request-rate", "0"], "a number above 0"),
        (SERVE, ["--request-rate", "4,x"], "a number above 0"),
        (SERVE, ["--burstiness", "inf"], "a number above 0"),
        (SERVE, ["--goodput", "speed:5"], "a limit names ttft, tpot, itl, e2e"),
        (SERVE, ["--goodput", "ttft"], "a number above 0"),
        (SERVE, ["--front", "http"], "invalid choice: 'http'"),
        (SERVE, ["--against", "hf"], "unrecognized arguments: --against"),
        (SERVE, ["--output-len", "4000"], "serves at most 2048"),
        (SERVE, ["--temperature", "-1"], "temperature must be"),
        (MIXED, ["--ceilings", "1,1"], "unrecognized arguments: --ceilings"),
        (MIXED, ["--milestone", "m1"], "m1_basic runs one request at a time"),
        (MIXED, ["--warmup-tokens", "3"], "--warmup-tokens must be at least 4"),
        (MIXED, ["--tail-tokens", "90"], "must be more than warm-up and tail together (98)"),
        (MIXED, ["--max-num-seqs", "2"], "decodes ended before the window did"),
    ],
)
def test_misuse_is_a_clear_error(command, options, message, capsys):
    try:
        code = cli.main([*command, *options])
    except SystemExit as error:  # argparse's own way
        code = error.code
    assert code == cli.EXIT_USAGE
    assert message in capsys.readouterr().err.replace("\n", " ")

"""The comparison of milestones: what it counts, what it concludes, what it does when parts fail."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from support import MILESTONES, ROOT

from common.metrics import RequestMetrics
from dev.bench.load import ServedRun
from dev.bench.report import FIELDS as BENCH_FIELDS
from dev.bench.roofline import Ceilings
from dev.bench.serving_fields import HIT_FIELDS, MIXED_FIELDS, PREFIX_FIELDS
from dev.bench.session import check, run_task
from dev.compare import cli
from dev.compare import run as running
from dev.compare.changes import BETTER, SAME, WORSE, change, pairs, what_it_adds
from dev.compare.claims import CLAIMS, HELD, NOT_HELD, NOT_MEASURED, Claim, check_claims
from dev.compare.counting import served_at_once
from dev.compare.metrics import LESS, MORE, Metric, find_rows, metrics_of, show_value
from dev.compare.parts import PRESETS
from dev.compare.run import FIELDS, Plan, new_report, run
from dev.compare.worker import PartFailedError, Worker

COMPARED = [name for name in MILESTONES if name >= "m1"]
GIVEN = Ceilings(1e10, 1e11, "given")
SMALL = 0.1  # of the work of --quick


class InProcess:
    """A worker without a process: what is tested here is not the pipe."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.is_alive = True

    def run(self, task, budget_s):
        threads = torch.get_num_threads()
        try:
            return run_task(task)
        finally:
            torch.set_num_threads(threads)

    def stop(self):
        self.is_alive = False


def plan(*milestones: str, only: tuple[str, ...] = (), preset: str = "quick",
         scale: float = SMALL) -> Plan:
    parts = [part for part in PRESETS[preset].parts(scale) if not only or part.name in only]
    options = {"model": "random:tiny-llama", "device": "cpu"}
    return Plan(PRESETS[preset], milestones or COMPARED, parts, options, scale, ceilings=GIVEN)


def measured(one: Plan, monkeypatch, report: dict | None = None) -> dict:
    monkeypatch.setattr(running, "Worker", InProcess)
    report = report or new_report(one, "python -m dev.compare")
    return run(one, report, save=lambda _: None, progress=lambda _: None)


def rows_of(report: dict, part: str, pick: str = "") -> dict[str, dict]:
    return {row["name"]: row for name in report["milestones"]
            for row in find_rows(report, part, name, pick)}


@pytest.fixture(scope="module")
def everything():
    """All milestones and parts of --quick, small."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield measured(plan(), monkeypatch)


# --- what is measured -------------------------------------------------------------------------


def test_all_milestones_do_the_same_work(everything):
    assert everything["not_run"] == []
    for part in everything["parts"]:
        for measure in {row["measure"] for row in everything["rows"] if row["part"] == part}:
            work = {
                (row["num_requests"], row.get("input_len"), row.get("prompt_tokens"),
                 row.get("output_tokens"), row.get("workload"))
                for row in everything["rows"]
                if (row["part"], row["measure"]) == (part, measure)
            }
            cases = [case[4] or case[:2] for case in work]
            assert len(cases) == len(set(cases)), part


def test_every_field_is_documented(everything):
    known = {**BENCH_FIELDS, **PREFIX_FIELDS, **MIXED_FIELDS, **HIT_FIELDS, **FIELDS}
    fields = {name for row in everything["rows"] for name in row}
    assert {name for name in fields if not name.startswith("chunks_by_")} <= known.keys()


def test_the_headline_figures_are_all_there(everything):
    parts = everything["parts"]
    shown = {metric.field for part in parts for metric in metrics_of(everything, part)}
    assert {
        "output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "itl_p50_s", "itl_p90_s", "itl_p99_s",
        "itl_max_s", "kv_utilization", "peak_memory_bytes", "num_steps", "work_roofline_share",
    } <= shown


def test_m2_takes_fewer_steps(everything):
    steps = {name: row["num_steps"] for name, row in rows_of(everything, "throughput").items()}
    assert steps["m2_batching"] < steps["m1_basic"]


def test_a_prefix_hit_is_counted_in_tokens(everything):
    hits = rows_of(everything, "prefix", "hit")
    assert hits["m5_chunked"]["computed_tokens"] == 102  # of 1,024, a tenth
    assert hits["m6_prefix"]["computed_tokens"] == 102 - hits["m6_prefix"]["tokens_saved"] <= 10
    without = rows_of(everything, "prefix", "none")
    assert without["m6_prefix"]["tokens_saved"] == 0


def test_what_a_part_of_a_milestone_uses_alone_it_is_given():
    one = plan("m2_batching", "m3_paged", only=("memory",), scale=1.0)
    (part,) = one.parts
    m2, m3 = (one.task(name, part).options for name in one.milestones)
    assert m2["num_kv_tokens"] == 8192 and "num_kv_blocks" not in m2
    assert m3["num_kv_blocks"] * 16 == 8192 and "num_kv_tokens" not in m3


def test_requests_at_once_are_those_of_crowded_steps():
    """Two run together while a third waits until step 4; what comes behind does not count."""
    times = ([1, 2, 3], [1, 2, 3], [4, 5, 6, 7])
    run = ServedRun(7, [RequestMetrics(0.0, token_times=list(t)) for t in times])
    assert served_at_once(run) == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_every_milestone(preset):
    """At full size; nothing is loaded for that."""
    parts = PRESETS[preset].parts(1.0)
    one = Plan(PRESETS[preset], COMPARED, parts, {"device": "cpu"})
    for milestone, part in one.jobs():
        check(one.task(milestone, part))
    names = [part.name for part in parts]
    assert len(names) == len(set(names))


def test_every_claim_has_a_part_that_measures_it():
    parts = {part.name for part in PRESETS["h200"].parts(1.0)}
    for claim in CLAIMS:
        assert not claim.parts or parts & set(claim.parts), claim.text
    assert {claim.milestone for claim in CLAIMS} >= {"m2", "m3", "m4", "m5", "m6", "m7"}


def test_the_h200_preset_runs_small(monkeypatch):
    """Every part of it, with the first milestone that takes part."""
    for part in PRESETS["h200"].parts(0.02):
        first = next(name for name in COMPARED if part.takes(name))
        one = replace(plan(first, preset="h200", scale=0.02), parts=[part])
        report = measured(one, monkeypatch)
        assert report["rows"] and not report["not_run"], part.name


# --- what is concluded ------------------------------------------------------------------------


def report_of(rows: list[dict], milestones=("m1_basic", "m2_batching"), gpu=None, load=0.1) -> dict:
    return {
        "rows": [{"part": "p", "measure": "throughput", **row} for row in rows],
        "milestones": list(milestones),
        "environment": {"gpu": gpu, "load_average": load, "num_cpus": 2},
        "parts": {"p": {}},
        "not_run": [],
    }


@pytest.mark.parametrize(
    ("better", "is_counted", "before", "after", "factor", "verdict"),
    [
        (MORE, False, 10.0, 20.0, 2.0, BETTER),
        (LESS, False, 10.0, 20.0, 2.0, WORSE),
        (LESS, False, 20.0, 10.0, 2.0, BETTER),
        (LESS, False, 10.0, 10.9, 1.09, SAME),  # times vary
        (LESS, True, 100, 105, 1.05, WORSE),  # counts do not
        (LESS, True, 5, 0, None, BETTER),
        (LESS, True, 0, 0, None, SAME),
        (None, False, 1.0, 2.0, None, None),
    ],
)
def test_changes(better, is_counted, before, after, factor, verdict):
    report = report_of([{"name": "m1_basic", "x": before}, {"name": "m2_batching", "x": after}])
    metric = Metric("x", "p", "x", "number", better, is_counted=is_counted)
    one = change(report, metric, "m1_basic", "m2_batching")
    assert one.factor == (None if factor is None else pytest.approx(factor))
    assert one.verdict == verdict
    assert change(report, metric, "m1_basic", "m3_paged") is None


def test_times_of_a_busy_machine_are_not_compared():
    rows = [{"name": "m1_basic", "x": 10.0}, {"name": "m2_batching", "x": 20.0}]
    timed, counted = (Metric("x", "p", "x", "number", MORE, is_counted=is_counted)
                      for is_counted in (False, True))
    names = "m1_basic", "m2_batching"
    busy = report_of(rows, load=1.5)
    assert change(busy, timed, *names).verdict is None
    assert change(busy, counted, *names).verdict == BETTER
    assert change(report_of(rows, load=1.5, gpu="H200"), timed, *names).verdict == BETTER


def test_pairs_leave_out_who_was_not_measured():
    rows = [{"name": name, "x": 1} for name in ("m1_basic", "m3_paged")]
    assert pairs(report_of(rows, ("m1_basic", "m2_batching", "m3_paged"))) == [
        ("m1_basic", "m3_paged")
    ]


@pytest.mark.parametrize("milestone", COMPARED)
def test_what_a_milestone_adds_is_its_title(milestone):
    assert 5 < len(what_it_adds(milestone)) < 80


CLAIM = Claim("m2", "", "how", ("p",), "x", against="m1", at_least=4.0)


@pytest.mark.parametrize(
    ("claim", "m1", "m2", "verdict", "factor"),
    [
        (CLAIM, 10, 40, HELD, 4.0),
        (CLAIM, 10, 39, NOT_HELD, 3.9),
        (replace(CLAIM, better=LESS), 40, 10, HELD, 4.0),
        (replace(CLAIM, better=LESS), 10, 40, NOT_HELD, 0.25),
        (replace(CLAIM, against=None, at_least=0.96), 0, 0.97, HELD, 0.97),
        (replace(CLAIM, against=None, at_least=0.96), 0, 0.95, NOT_HELD, 0.95),
        (replace(CLAIM, is_timed=True), 10, 40, NOT_MEASURED, None),
        (replace(CLAIM, parts=("q",)), 10, 40, NOT_MEASURED, None),
        (replace(CLAIM, against="m0"), 10, 40, NOT_MEASURED, None),
        (replace(CLAIM, parts=()), 10, 40, NOT_MEASURED, None),
        (CLAIM, 0, 40, NOT_MEASURED, None),
    ],
)
def test_claims(claim, m1, m2, verdict, factor):
    report = report_of([{"name": "m1_basic", "x": m1}, {"name": "m2_batching", "x": m2}])
    (one,) = check_claims(report, [claim])
    assert (one.verdict, one.factor) == (verdict, factor)
    assert bool(one.reason) == (verdict == NOT_MEASURED)


def test_a_timed_claim_is_checked_on_a_gpu():
    rows = [{"name": "m1_basic", "x": 10}, {"name": "m2_batching", "x": 40}]
    (one,) = check_claims(report_of(rows, gpu="H200"), [replace(CLAIM, is_timed=True)])
    assert one.verdict == HELD


def test_of_several_cases_the_worst_counts():
    rows = [
        {"name": name, "measure": "tpot", "num_requests": batch, "x": x}
        for name, values in (("m1_basic", (8, 8)), ("m2_batching", (1, 4)))
        for batch, x in zip((1, 16), values, strict=True)
    ]
    claim = replace(CLAIM, pick="tpot", better=LESS, at_least=3.0)
    (one,) = check_claims(report_of(rows), [claim])
    assert (one.verdict, one.factor, one.ours) == (NOT_HELD, 2.0, 4)


def test_a_claim_says_why_its_figure_is_missing():
    report = report_of([{"name": "m1_basic", "x": 1}])
    report["not_run"] = [{"part": "p", "name": "m2_batching", "reason": "not done in 5 s"}]
    (one,) = check_claims(report, [CLAIM])
    assert one.verdict == NOT_MEASURED and "not done in 5 s" in one.reason


def test_counted_claims_hold_on_any_machine(monkeypatch):
    """At full size, tiny model: the memory, stall and prefix parts of --quick."""
    only = ("memory", "stall", "prefix")
    report = measured(plan("m2_batching", "m3_paged", "m4_flash", "m5_chunked", "m6_prefix",
                           only=only, scale=1.0), monkeypatch)
    counted = [claim for claim in CLAIMS if set(claim.parts) & set(only) and not claim.is_timed]
    verdicts = check_claims(report, counted)
    assert [(one.text, one.factor) for one in verdicts if one.verdict != HELD] == []
    assert len(verdicts) == 5


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [(None, "time", "–"), (0.0123, "time", "12.3 ms"), (1.5, "time", "1.5 s"),
     (0.987, "share", "98.7%"), (3 << 30, "bytes", "3,072 MiB"), (1234.5, "count", "1,234"),
     (96.34, "number", "96.3"), (25275.4, "number", "25,275")],
)
def test_values_are_readable(value, style, text):
    assert show_value(value, style) == text


# --- runs that do not go well -----------------------------------------------------------------


def test_what_is_done_is_not_done_again(monkeypatch):
    one = plan("m2_batching", "m3_paged", only=("memory",))
    first = measured(replace(one, milestones=("m2_batching",)), monkeypatch)
    InProcess.made = 0
    report = measured(one, monkeypatch, {**first, "milestones": list(one.milestones)})
    assert InProcess.made == 1
    assert [row["name"] for row in report["rows"]] == ["m2_batching", "m3_paged"]


def test_a_part_that_fails_leaves_the_others(monkeypatch):
    class Fails(InProcess):
        def run(self, task, budget_s):
            if task.work.kind == "crowd":
                self.is_alive = False
                raise PartFailedError("out of memory")
            return super().run(task, budget_s)

    one = plan("m2_batching", only=("memory", "stall"))
    saved = []
    monkeypatch.setattr(running, "Worker", Fails)
    report = run(one, new_report(one, ""), lambda r: saved.append(len(r["rows"])), lambda _: None)
    assert [row["part"] for row in report["rows"]] == ["stall"]
    assert report["not_run"] == [
        {"part": "memory", "name": "m2_batching", "reason": "out of memory"}
    ]
    assert saved == [0, 1]


def test_no_part_begins_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(running, "Worker", InProcess)
    one = replace(plan("m2_batching", "m3_paged", only=("stall",)), limit_s=10.0)
    times = iter([0.0, 1.0, 2.0, 11.0])
    report = run(one, new_report(one, ""), lambda _: None, lambda _: None, lambda: next(times))
    assert [row["name"] for row in report["rows"]] == ["m2_batching"]
    assert report["not_run"][0]["name"] == "m3_paged"
    assert "10 s of the run" in report["not_run"][0]["reason"]


def test_senseless_work_is_refused_before_anything_runs(monkeypatch):
    one = plan("m2_batching", only=("memory",))
    one = replace(one, options={**one.options, "dtype": "float17"})
    with pytest.raises(ValueError, match=r"m2_batching, part memory: .*float17"):
        measured(one, monkeypatch)


def test_a_process_measures_and_is_ended_when_it_hangs(monkeypatch):
    """The one test with real processes: a task, one that fails, one that gets no time."""
    one = plan("m2_batching", only=("stall",))
    task = replace(one.task("m2_batching", one.parts[0]), threads=1)
    worker = Worker()
    assert worker.run(task, 60.0)["rows"][0]["name"] == "m2_batching"
    broken = replace(task, options={**task.options, "max_model_len": 4})
    with pytest.raises(PartFailedError, match=r"ValueError: .*4 tokens"):
        worker.run(broken, 60.0)
    assert not worker.is_alive
    monkeypatch.setattr("dev.compare.worker.START_S", 0.0)
    worker = Worker()
    with pytest.raises(PartFailedError, match="not done within its 0 s"):
        worker.run(task, 0.0)
    assert not worker.is_alive
    assert not worker._process.is_alive()


# --- the command line and the page ------------------------------------------------------------

TINY = ["--model", "random:tiny-llama", "--device", "cpu", "--ceilings", "10,0.1", "--scale", "0.1"]


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(running, "Worker", InProcess)


def test_a_run_is_written_shown_and_gone_on_with(tmp_path, capsys, in_process):
    file, html = tmp_path / "new" / "report.json", tmp_path / "page.html"
    words = ["--quick", *TINY, "--only", "throughput", "--json", str(file)]
    cli.main([*words, "--milestone", "m1", "--quiet"])
    assert capsys.readouterr().out == ""
    cli.main([*words, "--milestone", "m1", "--milestone", "m3", "--resume", "--html", str(html)])
    shown = capsys.readouterr().out
    assert "m3_paged (a paged KV cache) against m1_basic" in shown
    assert "KV slots" in shown and "▲" in shown
    report = json.loads(file.read_text())
    assert report["kind"] == "compare" and report["milestones"] == ["m1_basic", "m3_paged"]
    assert {claim["verdict"] for claim in report["claims"]} == {NOT_MEASURED}
    assert report["environment"]["torch"] == torch.__version__
    assert cli.main(["show", "--from", str(file), "--quiet"]) == cli.EXIT_OK


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quick", "--only", "nothing"], "no part 'nothing' in quick"),
        (["--milestone", "m99"], "no milestone"),
        (["--quick", "--resume"], "--json"),
        (["show", "--from", "README.md"], "is not JSON"),
        (["show", "--from", "docs/results/cpu-throughput.json"], "not a report of dev.compare"),
        (["report", "--from", "docs/results"], "say what to write"),
        (["report", "--from", "tests", "--chart", "x.svg"], "no results in tests"),
        (["--quick", "--milestone", "m1", "--only", "memory"], "nothing to do"),
    ],
)
def test_misuse_is_explained(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(words) == cli.EXIT_USAGE
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_broken_claim_is_the_exit_code(tmp_path, everything):
    file = tmp_path / "report.json"
    claim = {**everything["claims"][0], "verdict": NOT_HELD}
    file.write_text(json.dumps({**everything, "claims": [claim]}))
    assert cli.main(["show", "--from", str(file), "--quiet"]) == cli.EXIT_NOT_HELD


def test_work_of_another_run_is_not_gone_on_with(tmp_path, everything, capsys):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(everything))
    words = ["--quick", *TINY[:-1], "0.2", "--json", str(file), "--resume"]
    assert cli.main(words) == cli.EXIT_USAGE
    assert "its scale is 0.1" in capsys.readouterr().err.replace("\n", " ")


def test_the_page_stands_alone(everything):
    from dev.compare.page import page

    text = page(everything)
    assert not re.search(r"<(script|link|iframe|img)\b|@import|url\((?!#)", text)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "prefers-color-scheme: dark" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    body = text[text.index("<body>") : text.index("</body>") + len("</body>")]
    tree = ElementTree.fromstring(body.replace("<br>", "<br/>"))  # what opens is closed
    pictures = tree.findall(".//{http://www.w3.org/2000/svg}svg")
    assert len(pictures) > 8
    for picture in pictures:
        assert picture.get("role") == "img" and re.search(r"m\d ", picture.get("aria-label"))
    for table in tree.findall(".//table"):
        assert table.find("caption") is not None
        assert all(cell.get("scope") for cell in table.iter("th"))
    assert "#00000" not in text  # every placeholder has become a colour of the page


def test_names_are_no_markup(everything):
    from dev.compare.page import page

    few = {"memory": everything["parts"]["memory"]}
    text = page({**everything, "parts": few, "command": "<script>alert(1)</script>"})
    assert "<script>" not in text


# --- documents made from results --------------------------------------------------------------


@pytest.fixture(scope="module")
def sources():
    from dev.compare.sources import Sources

    return Sources.read([ROOT / "docs" / "results"])


def test_the_committed_comparison_is_what_the_results_say(sources):
    from dev.compare.document import document

    folder = ROOT / "docs"
    text = document(sources, folder, folder / "images" / "ladder.svg")
    assert text == (folder / "technical_comparison.md").read_text(encoding="utf-8"), (
        "write it again: python -m dev.compare report --from docs/results "
        "--markdown docs/technical_comparison.md --chart docs/images/ladder.svg"
    )


def test_the_committed_ladder_says_the_same_figures(sources, tmp_path):
    from dev.compare.ladder import write_ladder

    write_ladder(sources, tmp_path / "ladder.svg")
    ours, committed = (ElementTree.parse(file).getroot()
                       for file in (tmp_path / "ladder.svg", ROOT / "docs/images/ladder.svg"))
    svg = "{http://www.w3.org/2000/svg}"
    assert ours.find(f"{svg}desc").text == committed.find(f"{svg}desc").text
    assert "vLLM 23,101" in ours.find(f"{svg}desc").text
    shown = {text.text for text in ours.iter(f"{svg}text")}
    assert {"vLLM", "nano-vllm", "m1", COMPARED[-1][:2], "23,101"} <= shown
    style = ours.find(f"{svg}style").text
    assert "prefers-color-scheme: dark" in style


def test_the_newest_usual_row_counts(sources):
    """m3's TPOT stands in an older report, too; m4's also with parts of it switched off."""
    assert sources.find("m3", "tpot", num_requests=8).file.name == "h200-compare.json"
    assert sources.find("m4", "tpot", num_requests=1).file.name == "h200-compare-later.json"
    assert sources.find("m4", "tpot", "random:qwen3-8b", num_requests=1) is None
    # The part that is there to compare 4 bits with more has batch 8, too.
    usual = sources.find("m6", "tpot", num_requests=8)
    weighed = sources.find("m6", "tpot", beside_4_bits=True, num_requests=8)
    assert "linear_bytes" in weighed.row and "linear_bytes" not in usual.row
    assert sources.find("vllm", "tpot", num_requests=1).row["seconds"] == 0.00162
    assert sources.find("vllm", "tpot", num_requests=1, weights="gptq").row["seconds"] == 0.00224


def test_losses_are_told(sources):
    from dev.compare.document import losses
    from dev.compare.sections import sections

    found = {(one.label, one.who, one.whom) for one in losses(sections(sources))}
    assert ("32 short requests, output tokens/s", "m3", "m2") in found
    assert ("prompts 8x2048, TFLOP/s", "m4 and later", "FlashAttention-3") in found
    assert not any(whom == "vLLM" for label, _, whom in found if label.startswith("256 requests"))


def test_results_of_this_command_are_read_as_those_of_the_bench(tmp_path, everything):
    from dev.compare.sources import Sources

    file = tmp_path / "h200-compare.json"
    file.write_text(json.dumps({**everything, "scale": 1}))
    read = Sources.read([tmp_path])
    (m3,) = (e for e in read.entries if e.row["measure"] == "crowd" and e.name == "m3")
    assert m3.options["num_kv_blocks"] and m3.model == "random:tiny-llama"
    assert m3.work == everything["parts"]["memory"]["work"]
    file.write_text(json.dumps(everything))
    with pytest.raises(ValueError, match="a trial"):
        Sources.read([file])

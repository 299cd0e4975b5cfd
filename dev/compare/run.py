"""Has every milestone do every part, within a budget of time; what is done is kept.

    report = run(Plan(preset, milestones, parts, options), save=lambda report: ...)

    {"schema": 1, "kind": "compare", "command": ..., "preset": ..., "scale": ..., "model": ...,
     "milestones": [...], "environment": {...}, "ceilings": {...},
     "parts": {"throughput": {"title": ..., "work": {...}, "options": {"m1_basic": {...}}}},
     "rows": [{"part": "throughput", "name": "m1_basic", ...}], "not_run": [...], "claims": [...]}

Rows are the bench's (``dev.bench.report.FIELDS``, ``serving_fields``), with the name of their part;
``FIELDS`` has what this tool adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dev.bench.report import SCHEMA, Report
from dev.bench.roofline import Ceilings
from dev.bench.session import Task, check
from dev.compare.claims import as_rows, check_claims
from dev.compare.parts import Part, Preset
from dev.compare.worker import PartFailedError, Worker

KIND = "compare"
WITH_ROOFLINE = ("throughput", "latency")

FIELDS: dict[str, str] = {
    "part": "which part of the run the row belongs to",
    "at_once": "memory: requests that get a token in a step, median over the steps while others "
    "wait for a first one",
    **{
        f"gap_{point}_tokens": "stall: tokens computed for anybody between two tokens of a decode "
        f"while prompts arrive: {point}"
        for point in ("mean", "p50", "p90", "p99", "max")
    },
    "computed_tokens": "prefix: prompt tokens that were not found in the cache; of the workload "
    "hit those of the prompt whose beginning is cached",
    "linear_bytes": "bytes of the layers' matrices as they are multiplied, packed or not, without "
    "embedding and head",
    "part_s": "seconds the whole part took: engine, warm-up, repetitions",
}
"""Fields of a row beyond those of the bench. ``memory`` and ``stall`` count: the seconds in their
rows, if any, mean nothing."""


@dataclass(frozen=True)
class Plan:
    """What to run. ``options`` are the engine's, of which each milestone takes what it has."""

    preset: Preset
    milestones: Sequence[str]
    parts: Sequence[Part]
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    threads: int | None = None
    ceilings: Ceilings | str = "measure"
    limit_s: float | None = None  # None: the preset's

    @property
    def model(self) -> str:
        """The model of every part that does not name another."""
        return self.options.get("model") or self.preset.model

    def task(self, milestone: str, part: Part) -> Task:
        """What the process of a milestone is told."""
        options = part.engine_options(milestone, {**self.options, "model": self.model})
        ceilings = self.ceilings if part.work.kind in WITH_ROOFLINE else "skip"
        schedule = part.schedule(milestone)
        return Task(milestone, options, part.work, schedule, False, self.threads, ceilings)

    def jobs(self) -> list[tuple[str, Part]]:
        """Who does what, a milestone after the other."""
        return [(m, part) for m in self.milestones for part in self.parts if part.takes(m)]


def new_report(plan: Plan, command: str) -> Report:
    """A report in which nothing has been measured."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "command": command,
        "preset": plan.preset.name,
        "scale": plan.scale,
        "model": plan.model,
        "milestones": list(plan.milestones),
        "environment": None,
        "ceilings": None,
        "parts": {part.name: {"title": part.title, "work": dict(part.work.describe()),
                              "model": part.model or plan.model, "options": {}}
                  for part in plan.parts},
        "rows": [],
        "not_run": [],
        "claims": [],
    }


def run(
    plan: Plan,
    report: Report,
    save: Callable[[Report], None],
    progress: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Fill a report: what has rows in it already is not measured again.

    Args:
        save: told the report after every part, so that an interrupted run loses one part only.

    Raises:
        ValueError: the work or an option makes no sense for a milestone; nothing has run then.
    """
    jobs = plan.jobs()
    if not jobs:
        raise ValueError("nothing to do: none of these milestones takes part in these parts")
    for milestone, part in jobs:
        try:
            check(plan.task(milestone, part))
        except ValueError as error:
            raise ValueError(f"{milestone}, part {part.name}: {error}") from None
    done = {(row["part"], row["name"]) for row in report["rows"]}
    report["not_run"] = []
    limit_s = plan.preset.limit_s if plan.limit_s is None else plan.limit_s
    end = clock() + limit_s
    with _Crew() as crew:
        for milestone, part in jobs:
            if (part.name, milestone) in done:
                continue
            begin = clock()
            if begin >= end:
                _note(report, part, milestone, f"the {limit_s:.0f} s of the run were over")
                continue
            progress(f"{milestone}: {part.title}")
            task = _with_ceilings(plan.task(milestone, part), report)
            try:
                result = crew.worker(milestone).run(task, min(part.budget_s, end - begin))
            except PartFailedError as error:
                progress(f"{milestone}: {part.name}: {error}")
                _note(report, part, milestone, str(error))
            else:
                _add(report, part, milestone, result, clock() - begin)
                report["claims"] = as_rows(check_claims(report))
            save(report)
    if not report["rows"]:
        # Neither an environment nor a figure: nothing that could be shown.
        raise RuntimeError(f"nothing was measured: {report['not_run'][0]['reason']}")
    report["claims"] = as_rows(check_claims(report))  # which know now what was not run
    return report


class _Crew:
    """One process at a time, of the milestone that is measured."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._milestone = ""

    def worker(self, milestone: str) -> Worker:
        """The milestone's process, a fresh one if there is none or the last part ended it."""
        if self._worker is None or self._milestone != milestone or not self._worker.is_alive:
            self._stop()
            self._worker, self._milestone = Worker(), milestone
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None and self._worker.is_alive:
            self._worker.stop()

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()


def _note(report: Report, part: Part, milestone: str, reason: str) -> None:
    report["not_run"].append({"part": part.name, "name": milestone, "reason": reason})


def _with_ceilings(task: Task, report: Report) -> Task:
    """Whoever measures first measures the machine; its ceilings hold for all."""
    if task.ceilings != "measure" or report["ceilings"] is None:
        return task
    return replace(task, ceilings=Ceilings(**report["ceilings"]))


def _add(report: Report, part: Part, milestone: str, result: Report, seconds: float) -> None:
    on_gpu = result["environment"]["gpu"] is not None
    is_first = all(row["name"] != milestone for row in report["rows"])
    for row in result["rows"]:
        row = {"part": part.name, **row, "part_s": seconds}
        if not on_gpu and not is_first and "peak_memory_bytes" in row:
            # The most that the process ever had resident: of its first part, not of this one.
            row["peak_memory_bytes"] = None
        report["rows"].append(row)
    report["parts"][part.name]["options"][milestone] = result["options"][milestone]
    report["environment"] = report["environment"] or result["environment"]
    report["ceilings"] = report["ceilings"] or result["ceilings"]

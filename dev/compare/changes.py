"""What differs between a milestone and the one before it in the run, and by what factor."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from dev.bench.report import Report
from dev.bench.runner import REPOSITORY
from dev.compare.metrics import MORE, Metric, metrics_of, value

BETTER, WORSE, SAME = "better", "worse", "same"
NOISE = {"gpu": 0.03, "cpu": 0.10}
"""Times that differ by less are called the same."""
COUNTS_ALIKE = 0.01
"""And counts, which do not vary."""

BUSY = 0.5
"""Processes waiting for each CPU, before the run, from which on a machine is busy."""


@dataclass(frozen=True)
class Change:
    """One metric of two milestones.

    factor: how many times better (or worse) the later one is, at least 1; None where one of the two
    values is 0. verdict: BETTER, WORSE, SAME, or None for a metric that has no better, and for
    times of a machine that was busy.
    """

    metric: Metric
    before: float
    after: float
    factor: float | None
    verdict: str | None


def change(report: Report, metric: Metric, before: str, after: str) -> Change | None:
    """What one metric says of two milestones; None where one of them has no value."""
    old, new = value(report, metric, before), value(report, metric, after)
    if old is None or new is None:
        return None
    if metric.better is None or (is_busy(report) and not metric.is_counted):
        return Change(metric, old, new, None, None)
    gains = new > old if metric.better == MORE else new < old
    if old <= 0 or new <= 0:  # of a clock's noise, or a count of none: there is no factor
        return Change(metric, old, new, None, SAME if old == new else BETTER if gains else WORSE)
    factor = max(old, new) / min(old, new)
    if factor < 1 + (COUNTS_ALIKE if metric.is_counted else noise(report)):
        verdict = SAME
    else:
        verdict = BETTER if gains else WORSE
    return Change(metric, old, new, factor, verdict)


def is_busy(report: Report) -> bool:
    """Whether others used the CPU when a run began: its times then say nothing."""
    where = report["environment"]
    return where["gpu"] is None and where["load_average"] > BUSY * where["num_cpus"]


def noise(report: Report) -> float:
    """By how much times differ from run to run on the machine of a report, as a share."""
    return NOISE["gpu" if report["environment"]["gpu"] else "cpu"]


def changes(report: Report, before: str, after: str) -> list[Change]:
    """All metrics of two milestones, in the order of the tables."""
    found = (
        change(report, metric, before, after)
        for part in report["parts"]
        for metric in metrics_of(report, part)
    )
    return [one for one in found if one is not None]


def pairs(report: Report) -> list[tuple[str, str]]:
    """Each milestone that was measured, behind the one before it."""
    measured = {row["name"] for row in report["rows"]}
    names = [name for name in report["milestones"] if name in measured]
    return list(itertools.pairwise(names))


def what_it_adds(milestone: str) -> str:
    """The title of a milestone's README: what it is about."""
    title = (REPOSITORY / milestone / "README.md").read_text(encoding="utf-8").split("\n", 1)[0]
    return title.removeprefix("# ").partition(": ")[2] or title

"""What is shown of a run, in which order, and which direction is the better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dev.bench.report import Report, Row

MORE, LESS = "more", "less"
"""Which values are better."""


@dataclass(frozen=True)
class Metric:
    """One line of the tables: a field of the rows of a part.

    pick: which of a milestone's rows (see ``find_rows``). better: MORE, LESS, or None where neither
    is. is_counted: the same in every run, where times are not. style: as ``show_value`` takes it.
    """

    label: str
    part: str
    field: str
    style: str
    better: str | None = None
    pick: str = ""
    is_counted: bool = False


def find_rows(report: Report, part: str, milestone: str, pick: str = "") -> list[Row]:
    """A milestone's rows of a part.

    Args:
        milestone: its name or number. pick: "" for all; "tpot" or "ttft" for all of that measure,
            "tpot:8" for a batch of 8, "ttft:512" for a prompt of 512, "ttft:max" for the longest
            one; otherwise the name of a workload.
    """
    rows = [row for row in report["rows"]
            if row["part"] == part and milestone in (row["name"], number_of(row["name"]))]
    if not pick:
        return rows
    measure, _, which = pick.partition(":")
    if measure not in CASES:
        return [row for row in rows if row.get("workload") == pick]
    case = CASES[measure]
    rows = sorted((row for row in rows if row["measure"] == measure), key=lambda row: row[case])
    if which == "max":
        return rows[-1:]
    return [row for row in rows if not which or row[case] == int(which)]


CASES = {"tpot": "num_requests", "ttft": "input_len"}
"""What tells the rows of a measure from each other."""


def number_of(milestone: str) -> str:
    """``m3`` of ``m3_paged``."""
    return milestone.split("_")[0]


def value(report: Report, metric: Metric, milestone: str) -> float | None:
    """What a milestone reached; None where it was not measured."""
    for row in find_rows(report, metric.part, milestone, metric.pick):
        return row.get(metric.field)
    return None


def metrics_of(report: Report, part: str) -> list[Metric]:
    """The lines of one part of a run, without those that nobody has a value for."""
    rows = [row for row in report["rows"] if row["part"] == part]
    lines: list[Metric] = []
    for measure in dict.fromkeys(row["measure"] for row in rows):
        if measure in CASES:
            lines += _latency(part, measure, rows)
        elif measure == "prefix":
            for workload in dict.fromkeys(row["workload"] for row in rows):
                lines += [_metric(part, line, workload) for line in _PREFIX]
        else:
            lines += [_metric(part, line) for line in _LINES[measure]]
    return [line for line in lines
            if any(value(report, line, name) is not None for name in report["milestones"])]


# Label, field, style, better, is counted.
_Line = tuple[str, str, str, str | None, bool]

_TIMES: tuple[_Line, ...] = (
    ("output tokens/s", "output_tokens_per_s", "number", MORE, False),
    ("TTFT p50", "ttft_p50_s", "time", LESS, False),
    ("TTFT p99", "ttft_p99_s", "time", LESS, False),
    ("TPOT p50", "tpot_p50_s", "time", LESS, False),
    ("ITL p50", "itl_p50_s", "time", LESS, False),
    ("ITL p90", "itl_p90_s", "time", LESS, False),
    ("ITL p99", "itl_p99_s", "time", LESS, False),
    ("ITL max", "itl_max_s", "time", LESS, False),
)
_COUNTS: tuple[_Line, ...] = (
    ("steps", "num_steps", "count", LESS, True),
    ("KV slots used of allocated", "kv_utilization", "share", MORE, True),
    ("padding", "padding_share", "share", LESS, True),
    ("preemptions", "num_preemptions", "count", None, True),
)
_LINES: dict[str, tuple[_Line, ...]] = {
    "throughput": (
        *_TIMES,
        *_COUNTS,
        ("peak memory", "peak_memory_bytes", "bytes", None, False),
        ("share of the roofline", "work_roofline_share", "share", None, False),
    ),
    "crowd": (("at once, while others wait", "at_once", "number", MORE, True), *_COUNTS),
    "stall": (
        ("tokens between two tokens, p50", "gap_p50_tokens", "number", LESS, True),
        ("tokens between two tokens, p99", "gap_p99_tokens", "number", LESS, True),
        ("tokens between two tokens, max", "gap_max_tokens", "number", LESS, True),
        ("steps", "num_steps", "count", LESS, True),
    ),
    "mixed": (
        ("ITL p50, prompts arriving", "itl_p50_s", "time", LESS, False),
        ("ITL p99, prompts arriving", "itl_p99_s", "time", LESS, False),
        ("ITL p50, to the end", "run_itl_p50_s", "time", LESS, False),
        ("ITL p99, to the end", "run_itl_p99_s", "time", LESS, False),
        ("ITL max", "run_itl_max_s", "time", LESS, False),
        ("prompts: last TTFT", "prompt_ttft_max_s", "time", LESS, False),
        ("output tokens/s", "output_tokens_per_s", "number", MORE, False),
        ("steps", "num_steps", "count", LESS, True),
    ),
}
_PREFIX: tuple[_Line, ...] = (
    ("prompt tokens computed", "computed_tokens", "count", LESS, True),
    ("TTFT of the cached prompt", "cached_ttft_s", "time", LESS, False),
    ("TTFT of one that is not", "uncached_ttft_s", "time", LESS, False),
    ("output tokens/s", "output_tokens_per_s", "number", MORE, False),
    ("steps", "num_steps", "count", LESS, True),
)


def _metric(part: str, line: _Line, workload: str = "") -> Metric:
    label, field, style, better, is_counted = line
    if workload:
        label = f"{workload}: {label}"
    return Metric(label, part, field, style, better, workload, is_counted)


def _latency(part: str, measure: str, rows: Sequence[Row]) -> list[Metric]:
    lines = []
    case = CASES[measure]
    for size in sorted({row[case] for row in rows if row["measure"] == measure}):
        what = f"TPOT, batch {size:,}" if measure == "tpot" else f"TTFT, prompt of {size:,}"
        pick = f"{measure}:{size}"
        lines.append(Metric(what, part, "seconds", "time", LESS, pick))
        lines.append(Metric("  share of the roofline", part, "work_roofline_share", "share",
                            None, pick))
    if measure == "tpot":
        lines.append(Metric("weights of the layers", part, "linear_bytes", "bytes", LESS, measure,
                            True))
    return lines


def show_value(number: Any, style: str) -> str:
    """A value as people read it; "–" for None."""
    if number is None:
        return "–"
    if style == "share":
        return f"{number:.1%}"
    if style == "time":
        return f"{number * 1e3:,.3g} ms" if abs(number) < 1 else f"{number:,.3g} s"
    if style == "bytes":
        return f"{number / 2**20:,.0f} MiB" if number >= 2**23 else f"{number / 2**10:,.0f} KiB"
    if style == "count":
        return f"{number:,.0f}"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def show_factor(factor: float) -> str:
    """How many times as much: "3.4x", and with more digits where it is near 1."""
    return f"{factor:,.0f}x" if factor >= 100 else f"{factor:.3g}x"

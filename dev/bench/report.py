"""The report: what is in the JSON file, and how it is shown in the terminal.

    {"schema": 1, "kind": "throughput", "command": "...", "work": {...}, "environment": {...},
     "ceilings": {"read_bytes_per_s": ..., "flops_per_s": ..., "source": "measured"},
     "options": {"m3_paged": {...}}, "rows": [{"name": "m3_paged", ...}, ...]}

``rows`` are flat; ``FIELDS`` says what each field means. A field that does not apply is left out,
one that is not known is null. The schema's number grows when a field changes its meaning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dev.bench.roofline import Ceilings, Cost

SCHEMA = 1

Report = dict[str, Any]
Row = dict[str, Any]

FIELDS: dict[str, str] = {
    "name": "who was measured: a milestone, or hf (transformers)",
    "measure": "throughput; tpot (one step of a batch); ttft (a prompt alone to its first token)",
    "num_requests": "requests of the work; for tpot the batch size",
    "input_len": "prompt length of each request (tpot, ttft)",
    "output_len": "output length of each request (tpot, ttft)",
    "prompt_tokens": "tokens of all prompts",
    "output_tokens": "tokens generated for the user; padding does not count",
    "seconds": "throughput: from the first submission to the last token, the run of median "
    "duration; tpot: (median time for all tokens - median for one) / (output_len - 1); "
    "ttft: median",
    "seconds_min": "the fastest repetition",
    "seconds_max": "the slowest repetition",
    "output_tokens_per_s": "output tokens by seconds",
    "total_tokens_per_s": "prompt and output tokens by seconds",
    "prompt_tokens_per_s": "prompt tokens by seconds (ttft)",
    "requests_per_s": "requests by seconds",
    **{
        f"{name}_{point}_s": f"{what}: {point}, in seconds"
        for name, what in (
            ("ttft", "time to first token, queueing included"),
            ("tpot", "mean time per output token after the first, per request"),
            ("itl", "gap between two tokens of a request"),
        )
        for point in ("mean", "p50", "p90", "p99", "max")
    },
    "load_s": "seconds to load the model and set the engine up",
    "peak_memory_bytes": "on a GPU: allocated by torch at most; on the CPU: resident set of the "
    "process at most; null for a subject that shares its process with an earlier one",
    "num_steps": "forward passes",
    "num_preemptions": "requests that lost their cache and were computed again",
    "num_running_peak": "most sequences at once since the engine started",
    "kv_utilization": "share of the allocated KV slots that hold a token, mean over the steps "
    "since the engine started; null without a cache",
    "kv_slots_total": "size of the KV cache in tokens",
    "kv_slots_used_peak": "most slots that held a token since the engine started",
    "kv_slots_allocated_peak": "most slots kept from other requests since the engine started",
    "padding_share": "share of the rows computed that were padding",
    "schedule_share": "share of the step time in which the scheduler decided",
    "work_bytes": "bytes that must be read for this work: the weights once for every token of the "
    "longest output, cached keys and values once for every token; for tpot those of a step",
    "work_flops": "floating point operations of its matrix products",
    "work_roofline_s": "the least time for both at the ceilings; the larger one counts",
    "work_roofline_share": "that time by seconds: 1 is the machine's limit",
    "work_bound": "which of the two is larger: bytes or flops",
    "steps_bytes": "bytes that must be read in the steps the engine took: weights once in each",
    "steps_flops": "floating point operations it made, recomputation included",
    "steps_roofline_s": "the least time for those",
    "steps_roofline_share": "that time by seconds: what is lost beside the choice of steps",
    "steps_bound": "which of the two is larger: bytes or flops",
}
"""Every field a row can have."""


def add_roofline(rows: Sequence[Row], ceilings: Ceilings) -> None:
    """Put the time each row takes at least, and the share of it reached, beside its cost."""
    for row in rows:
        for kind in ("work", "steps"):
            if f"{kind}_bytes" not in row:
                continue
            cost = Cost(row[f"{kind}_bytes"], row[f"{kind}_flops"])
            least = cost.seconds(ceilings)
            row[f"{kind}_roofline_s"] = least
            row[f"{kind}_roofline_share"] = least / row["seconds"] if row["seconds"] > 0 else None
            row[f"{kind}_bound"] = cost.bound(ceilings)


def write_json(report: Report, path: Path) -> None:
    """Write a report; its folder is made where need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(report: Report, console: Console) -> None:
    """Print what was measured, the figures, and how far they are from the machine's limit."""
    console.print(_headline(report), highlight=False)
    rows = report["rows"]
    if report["kind"] == "throughput":
        console.print(_throughput_table(rows))
    else:
        for measure in ("tpot", "ttft"):
            chosen = [row for row in rows if row["measure"] == measure]
            if chosen:
                console.print(_latency_table(chosen, measure))
    console.print(_explanation(report), style="dim", highlight=False)


def _headline(report: Report) -> str:
    environment, work = report["environment"], report["work"]
    where = environment["gpu"] or f"{environment['cpu']}, {environment['num_threads']} threads"
    what = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in work.items())
    return f"[bold]{report['kind']}[/bold] on {where}\n{what}"


def _throughput_table(rows: Sequence[Row]) -> Table:
    """One column for each subject; factors are against the first."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column("")
    for row in rows:
        table.add_column(row["name"], justify="right")
    for label, field, style in _THROUGHPUT_LINES:
        if any(row.get(field) is not None for row in rows):
            table.add_row(label, *(_formatted(row.get(field), style) for row in rows))
    if len(rows) > 1:
        factors = (row["output_tokens_per_s"] / rows[0]["output_tokens_per_s"] for row in rows)
        table.add_row(f"against {rows[0]['name']}", *(f"{factor:.2f}x" for factor in factors))
    return table


_THROUGHPUT_LINES = (
    ("output tokens/s", "output_tokens_per_s", "number"),
    ("all tokens/s", "total_tokens_per_s", "number"),
    ("requests/s", "requests_per_s", "number"),
    ("seconds", "seconds", "number"),
    ("TTFT p50", "ttft_p50_s", "time"),
    ("TTFT p99", "ttft_p99_s", "time"),
    ("TPOT p50", "tpot_p50_s", "time"),
    ("TPOT p99", "tpot_p99_s", "time"),
    ("ITL p50", "itl_p50_s", "time"),
    ("ITL p99", "itl_p99_s", "time"),
    ("ITL max", "itl_max_s", "time"),
    ("steps", "num_steps", "count"),
    ("most at once", "num_running_peak", "count"),
    ("preemptions", "num_preemptions", "count"),
    ("KV slots used of allocated", "kv_utilization", "share"),
    ("padding", "padding_share", "share"),
    ("scheduling", "schedule_share", "share"),
    ("peak memory", "peak_memory_bytes", "bytes"),
    ("roofline of the work", "work_roofline_s", "time"),
    ("  share reached", "work_roofline_share", "share"),
    ("  bound by", "work_bound", "text"),
    ("roofline of the steps taken", "steps_roofline_s", "time"),
    ("  share reached", "steps_roofline_share", "share"),
    ("  bound by", "steps_bound", "text"),
)


def _latency_table(rows: Sequence[Row], measure: str) -> Table:
    """One line for each case and subject; factors are against the first subject of the case."""
    by_batch = measure == "tpot"
    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column("batch" if by_batch else "prompt", justify="right")
    table.add_column("")
    headings = ["TPOT" if by_batch else "TTFT", "fastest", "slowest", "tokens/s", "roofline"]
    for heading in [*headings, "share", "bound by", "peak memory", "factor"]:
        table.add_column(heading, justify="right")
    case_field = "num_requests" if by_batch else "input_len"
    rate_field = "output_tokens_per_s" if by_batch else "prompt_tokens_per_s"
    first_of: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row[case_field]):
        first = first_of.setdefault(row[case_field], row)
        table.add_row(
            f"{row[case_field]:,}" if row is first else "",
            row["name"],
            *(_formatted(row[name], "time") for name in ("seconds", "seconds_min", "seconds_max")),
            _formatted(row[rate_field], "number"),
            _formatted(row.get("work_roofline_s"), "time"),
            _formatted(row.get("work_roofline_share"), "share"),
            _formatted(row.get("work_bound"), "text"),
            _formatted(row["peak_memory_bytes"], "bytes"),
            f"{first['seconds'] / row['seconds']:.2f}x" if row["seconds"] > 0 else "",
        )
    return table


def _explanation(report: Report) -> str:
    ceilings = report["ceilings"]
    if ceilings is None:
        return "No roofline: ceilings were skipped."
    return (
        f"Ceilings ({ceilings['source']}): reading {ceilings['read_bytes_per_s'] / 1e9:,.4g} GB/s, "
        f"multiplying {ceilings['flops_per_s'] / 1e12:,.4g} TFLOP/s. The roofline is the least "
        "time at these: for all requests at once, and for the steps each engine took."
        if report["kind"] == "throughput"
        else f"Ceilings ({ceilings['source']}): reading "
        f"{ceilings['read_bytes_per_s'] / 1e9:,.4g} GB/s, "
        f"multiplying {ceilings['flops_per_s'] / 1e12:,.4g} TFLOP/s."
    )


def _formatted(value: Any, style: str) -> str:
    if value is None:
        return "–"
    if style == "share":
        return f"{value:.1%}"
    if style == "time":
        return f"{value * 1e3:,.2f} ms" if abs(value) < 1 else f"{value:,.2f} s"
    if style == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    if style == "count":
        return f"{value:,}"
    if style == "number":
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)

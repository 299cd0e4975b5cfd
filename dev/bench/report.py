"""The report: what is in the JSON file, and how it is shown in the terminal.

    {"schema": 1, "kind": "throughput", "command": "...", "work": {...}, "environment": {...},
     "ceilings": {"read_bytes_per_s": ..., "flops_per_s": ..., "source": "measured"},
     "options": {"m3_paged": {...}}, "rows": [{"name": "m3_paged", ...}, ...]}

``rows`` are flat; ``FIELDS`` says what each field means (``KERNEL_FIELDS`` and ``STARTUP_FIELDS``
for these two kinds; ``serving_fields`` says what serve, mixed and prefix have besides). A field
that does not apply is left out, one that is not known is null. The schema's number grows when a
field changes its meaning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dev.bench.roofline import Ceilings, Cost
from dev.bench.serving_fields import MIXED_LINES, PREFIX_LINES, SERVE_LINES, Line

SCHEMA = 1

Report = dict[str, Any]
Row = dict[str, Any]

FIELDS: dict[str, str] = {
    "name": "who was measured: a milestone, or hf (transformers)",
    "measure": "throughput; tpot (one step of a batch); ttft (a prompt alone to its first token); "
    "serve; mixed; prefix",
    "num_requests": "requests of the work; for tpot the batch size",
    "input_len": "prompt length of each request (tpot, ttft)",
    "output_len": "output length of each request (tpot, ttft)",
    "prompt_tokens": "tokens of all prompts",
    "output_tokens": "tokens generated for the user; padding does not count",
    "seconds": "throughput, serve, prefix: from the start to the last token, the run of median "
    "duration; mixed: the same, median; tpot: (median time for all tokens - median for one) / "
    "(output_len - 1); ttft: median",
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
    "num_graph_steps": "those of them that replayed a CUDA graph",
    "num_graphs_captured": "CUDA graphs recorded since the engine started, warm-up included",
    "capture_time_s": "seconds that took, compilation of the kernels included",
    "num_preemptions": "requests that lost their cache and were computed again",
    "num_running_peak": "most sequences at once since the engine started",
    "num_running_mean": "sequences at once, mean over the steps since the engine started",
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
"""Every field that a row of ``throughput`` or ``latency`` can have; ``serve``, ``mixed`` and
``prefix`` have some of them too."""

KERNEL_FIELDS: dict[str, str] = {
    "name": "who was measured: a milestone and its backend, a set of operations, or a library",
    "measure": "the operation",
    "case": "its size, as --case takes it; of named operations without the name",
    "us": "microseconds of a call: median replay of a CUDA graph of calls, divided by their number;"
    " on the CPU, and where no graph can hold the calls, us_per_call; null where it failed",
    "us_per_call": "median microseconds of a call launched by itself, the device idle before",
    "bytes": "bytes that must be moved, at least",
    "flops": "floating point operations of its matrix products; pairs that are masked do not count",
    "bytes_per_s": "bytes by us",
    "flops_per_s": "flops by us",
    "read_share": "bytes_per_s by the read ceiling; above 1 where a cache memory helps",
    "flops_share": "flops_per_s by the ceiling of the matrix product",
    "bound": "which of the two takes longer at the ceilings: bytes or flops",
    "difference": "norm of the result less that of the case's first subject, by the norm of that; "
    "left out where inputs or random numbers differ",
    "error": "why there is no time",
}
"""Every field that a row of ``kernels`` can have."""

STARTUP_FIELDS: dict[str, str] = {
    "name": "the milestone",
    "measure": "startup",
    "case": "cold: the Triton cache was empty; warm: it was as the cold start had left it",
    "input_len": "prompt length",
    "output_len": "output length",
    "first_token_s": "from the start of the process to the first token, in seconds, as all below",
    "last_token_s": "from the start of the process to the last token",
    "interpreter_s": "until Python runs the first line",
    "imports_s": "importing the milestone and what it needs",
    "engine_s": "making the engine: weights, KV cache, whatever it prepares",
    "prefill_s": "from there to the first token, compilation included",
    "decode_s": "from the first token to the last, compilation and capture included",
    "num_kernels_compiled": "Triton kernels compiled in this run",
    "num_graphs_captured": "CUDA graphs captured in it",
    "capture_time_s": "seconds that took, compilation of the graphs' kernels included",
}
"""Every field that a row of ``startup`` can have."""


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
    console.print(_headline(report), highlight=False, soft_wrap=True)
    rows = report["rows"]
    if report["kind"] in _LINES:
        for workload in dict.fromkeys(row.get("workload") for row in rows):
            if workload is not None:
                console.print(f"\n[bold]{workload}[/bold]")
            chosen = [row for row in rows if row.get("workload") == workload]
            console.print(_column_table(chosen, _LINES[report["kind"]]))
    for measure in ("tpot", "ttft"):
        chosen = [row for row in rows if row["measure"] == measure]
        if chosen:
            console.print(_latency_table(chosen, measure))
    if footnote := _footnote(report):
        console.print(footnote, style="dim", highlight=False, soft_wrap=True)


def _headline(report: Report) -> str:
    environment = report["environment"]
    options = next(iter(report["options"].values()))
    threads = environment["num_threads"]
    processor = f"{environment['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    where = environment["gpu"] or processor
    what = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report["work"].items())
    return (
        f"[bold]{report['kind']}[/bold] of {options['model']} in {options['dtype']} on {where}\n"
        f"{escape(what)}"
    )


_THROUGHPUT_LINES: tuple[Line, ...] = (
    ("output tokens/s", "output_tokens_per_s", "number"),
    ("all tokens/s", "total_tokens_per_s", "number"),
    ("requests/s", "requests_per_s", "number"),
    ("duration", "seconds", "time"),
    ("TTFT p50", "ttft_p50_s", "time"),
    ("TTFT p99", "ttft_p99_s", "time"),
    ("TPOT p50", "tpot_p50_s", "time"),
    ("TPOT p99", "tpot_p99_s", "time"),
    ("ITL p50", "itl_p50_s", "time"),
    ("ITL p99", "itl_p99_s", "time"),
    ("ITL max", "itl_max_s", "time"),
    ("steps", "num_steps", "count"),
    ("  as CUDA graphs", "num_graph_steps", "count"),
    ("capturing the graphs", "capture_time_s", "time"),
    ("most at once", "num_running_peak", "count"),
    ("at once, mean", "num_running_mean", "number"),
    ("preemptions", "num_preemptions", "count"),
    ("KV slots used of allocated", "kv_utilization", "share"),
    ("padding", "padding_share", "share"),
    ("scheduling", "schedule_share", "share"),
    ("peak memory", "peak_memory_bytes", "bytes"),
    ("least time for the work", "work_roofline_s", "time"),
    ("  bound by", "work_bound", "text"),
    ("  share reached", "work_roofline_share", "share"),
    ("least time for its steps", "steps_roofline_s", "time"),
    ("  bound by", "steps_bound", "text"),
    ("  share reached", "steps_roofline_share", "share"),
)
_LINES = {
    "throughput": _THROUGHPUT_LINES,
    "serve": SERVE_LINES,
    "mixed": MIXED_LINES,
    "prefix": PREFIX_LINES,
}


def _column_table(rows: Sequence[Row], lines: Sequence[Line]) -> Table:
    """One column for each row."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column("")
    for row in rows:
        table.add_column(row["name"], justify="right")
    for label, field, style in lines:
        if any(row.get(field) is not None for row in rows):
            table.add_row(label, *(_formatted(row.get(field), style) for row in rows))
    if len({row["name"] for row in rows}) == len(rows) > 1:
        factors = (row["output_tokens_per_s"] / rows[0]["output_tokens_per_s"] for row in rows)
        label = f"[bold]speed against {rows[0]['name']}[/bold]"
        table.add_row(label, *(f"[bold]{factor:.2f}x[/bold]" for factor in factors))
    return table


def _latency_table(rows: Sequence[Row], measure: str) -> Table:
    """One line for each case and subject; speed is against the first subject of the case."""
    case, heading, rate, per_s = {
        "tpot": ("num_requests", "batch", "TPOT", "output_tokens_per_s"),
        "ttft": ("input_len", "prompt", "TTFT", "prompt_tokens_per_s"),
    }[measure]
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in (f"{rate} ms", "fastest", "tokens/s", "least ms", "share", "bound", "speed"):
        table.add_column(heading, justify="right", no_wrap=True)
    first_of: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row[case]):
        first = first_of.setdefault(row[case], row)
        table.add_row(
            f"{row[case]:,}" if row is first else "",
            row["name"],
            _formatted(row["seconds"], "ms"),
            _formatted(row["seconds_min"], "ms"),
            _formatted(row[per_s], "number"),
            _formatted(row.get("work_roofline_s"), "ms"),
            _formatted(row.get("work_roofline_share"), "share"),
            _formatted(row.get("work_bound"), "text"),
            f"{first['seconds'] / row['seconds']:.2f}x" if row["seconds"] > 0 else "–",
        )
    return table


def _footnote(report: Report) -> str:
    """How to read the shares, and what memory the latency runs took."""
    if report["kind"] in ("serve", "mixed", "prefix"):
        return ""
    lines = []
    if report["kind"] == "latency":
        peaks: dict[str, int] = {}
        for row in report["rows"]:
            if row["peak_memory_bytes"] is not None:
                peaks[row["name"]] = max(peaks.get(row["name"], 0), row["peak_memory_bytes"])
        shown = (f"{name} {_formatted(peak, 'bytes')}" for name, peak in peaks.items())
        lines.append(f"Peak memory: {', '.join(shown)}.")
    ceilings = report["ceilings"]
    if ceilings is None:
        lines.append("No roofline: the ceilings were skipped.")
    else:
        read_gb, tflops = ceilings["read_bytes_per_s"] / 1e9, ceilings["flops_per_s"] / 1e12
        lines.append(
            f"Least: at the {ceilings['source']} {read_gb:,.4g} GB/s and {tflops:,.4g} TFLOP/s, "
            "reading all weights once a step and the KV cache once a token, or multiplying."
        )
        if report["kind"] == "throughput":
            lines.append(
                "The work: all requests at once, as many steps as the longest output. "
                "Its steps: the ones this engine took."
            )
    return "\n".join(lines)


def _formatted(value: Any, style: str) -> str:
    if value is None:
        return "–"
    if style == "share":
        return f"{value:.1%}"
    if style == "time":
        return f"{value * 1e3:,.2f} ms" if abs(value) < 1 else f"{value:,.2f} s"
    if style == "ms":
        return f"{value * 1e3:,.2f}"
    if style == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    if style == "count":
        return f"{value:,}"
    if style == "number":
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)

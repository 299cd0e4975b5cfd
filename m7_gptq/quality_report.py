"""The report on quality: what is in the JSON file, the table, the plot.

    {"schema": 1, "kind": "perplexity", "command": "...", "environment": {...}, "model": "...",
     "texts": {"builtin": {...}}, "calibration": {...}, "compute": {...}, "rows": [{...}, ...]}

``rows`` are flat; ``FIELDS`` says what each field means. A field that does not apply is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .perplexity import EvaluationText
from .sweep import Row

SCHEMA = 1

Report = dict[str, Any]

FIELDS: dict[str, str] = {
    "name": "the model that was given, or how it was quantized",
    "method": "nearest: rounded to nearest; gptq: by this repository; gptqmodel: by that library "
    "with the same settings and samples",
    "calibration": "the text that the quantization looked at",
    "quantize_s": "seconds that took",
    "error_ratio_median": "‖WX − ŴX‖² by GPTQ over that by rounding to nearest, of the projections "
    "of all layers: median",
    "error_ratio_worst": "the largest of them",
    "damping_worst": "the largest damp_percent that a Hessian needed",
    "stored_as": "dtype of the weights in the file, or the version of the GPTQ format",
    "bits": "bits of a code",
    "group_size": "inputs that share a scale and a zero point; -1: all",
    "sym": "whether the zero point is the middle of the range",
    "desc_act": "whether columns were rounded in order of their activations",
    "quantizer": "who wrote the checkpoint, as it says itself",
    "linear_bytes": "bytes of the linear layers of the decoder in the file: weights, or codes, "
    "scales and zero points",
    "bits_per_weight": "those by the number of weights",
    "text": "the text that was scored; see texts",
    "perplexity": "e to the loss",
    "loss": "mean negative log-likelihood of a token, in nats",
    "num_tokens": "tokens that were scored",
    "evaluate_s": "seconds that took",
}
"""Every field that a row can have."""


def describe_text(text: EvaluationText, source: str) -> dict[str, Any]:
    return {
        "source": source,
        "context": text.context,
        "stride": text.stride,
        "num_windows": len(text.windows),
        "num_tokens": text.num_tokens,
        "sha256_of_token_ids": text.digest,
    }


def write_json(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show(report: Report, console: Console) -> None:
    """Print a table for each text; the first row is what the others are held against."""
    for name, about in report["texts"].items():
        rows = [row for row in report["rows"] if row["text"] == name]
        if not rows:
            continue
        console.print(
            f"\n[bold]{name}[/bold]: {about['num_tokens']:,} tokens scored in windows of "
            f"{about['context']}, one every {about['stride']}",
            highlight=False,
        )
        console.print(_table(rows))


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    has_calibration = len({row.get("calibration") for row in rows} - {None, "–"}) > 1
    headings = ["perplexity", "change", "bits", "MB", "error", "worst"]
    if has_calibration:
        headings.append("calibrated on")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        change = row["perplexity"] / rows[0]["perplexity"] - 1
        cells = [
            row["name"],
            f"{row['perplexity']:,.3f}",
            "" if row is rows[0] else f"{change:+.1%}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['linear_bytes'] / 1e6:,.4g}",
            *(
                f"{row[key]:.3f}" if key in row else ""
                for key in ("error_ratio_median", "error_ratio_worst")
            ),
        ]
        table.add_row(*cells, *([row.get("calibration", "")] if has_calibration else []))
    return table


_STYLES = {"nearest": ("o", ":"), "gptq": ("s", "-"), "gptqmodel": ("^", "--")}
"""Marker and line of each method."""


def plot(report: Report, path: Path) -> None:
    """Perplexity over the size of a weight: a line for each method and width, its points groups.

    The first text only. Written as what the name says: .svg, .png, .pdf.
    """
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    matplotlib.rcParams.update({"svg.hashsalt": "folovllm", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    text = next(iter(report["texts"]))
    rows = [row for row in report["rows"] if row["text"] == text]
    full = rows[0]["perplexity"]
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    axes.axhline(full, color="0.5", linewidth=1)
    axes.annotate(
        f"full precision, {full:.2f}", (1, full), xycoords=("axes fraction", "data"),
        xytext=(-4, -4), textcoords="offset points", ha="right", va="top", color="0.4", fontsize=8,
    )  # fmt: skip
    widths = sorted({row["bits"] for row in rows if "bits" in row})
    for row_method, (marker, line) in _STYLES.items():
        for index, bits in enumerate(widths):
            points = sorted(
                (row["bits_per_weight"], row["perplexity"], row["group_size"])
                for row in rows
                if row.get("method") == row_method and row["bits"] == bits
            )
            if not points:
                continue
            sizes, scores, groups = zip(*points, strict=True)
            label = row_method if bits == widths[-1] else None
            axes.plot(
                sizes, scores, line, marker=marker, markersize=5, color=f"C{index}", label=label
            )
            for size, score, group in zip(sizes, scores, groups, strict=True):
                axes.annotate(
                    "all" if group == -1 else str(group), (size, score), fontsize=7,
                    xytext=(4, 3), textcoords="offset points", color=f"C{index}",
                )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, scales and zero points included")
    about = report["texts"][text]
    axes.set_ylabel(f"perplexity of {text} ({about['num_tokens']:,} tokens, {about['context']})")
    axes.set_title(f"{report['model']}: labels are group sizes", fontsize=10)
    handles = [
        plt.Line2D([], [], color="0.3", marker=marker, linestyle=line, label=method)
        for method, (marker, line) in _STYLES.items()
        if any(row.get("method") == method for row in rows)
    ]
    if handles:
        axes.legend(handles=handles, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)

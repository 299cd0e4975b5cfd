"""The ladder as one chart: every milestone beside vLLM and nano-vllm on the same card.

An SVG with a panel of its own, in the reader's colours (light or dark), made by matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dev.compare.plots import ACCENT, INK, LADDER, SOFT, new_figure, standalone_svg
from dev.compare.sections import NOT_YET, Line, is_ours, sections, show, show_cell
from dev.compare.sources import Sources

PANELS = (
    ("256 requests, output tokens/s", "Output tokens per second", "256 requests, more is better"),
    ("an output token, batch 1, ms", "Milliseconds for a token", "batch 1, less is better"),
    ("an output token, batch 256, ms", "Milliseconds for a token", "batch 256, less is better"),
    ("the first token of a prompt of 8,192, ms", "Milliseconds to the first token",
     "prompt of 8,192, less is better"),
)
"""Labels of lines of the document, and the titles of their panels."""


def write_ladder(sources: Sources, path: Path) -> None:
    """Draw it from the same lines as the document's first table."""
    section = sections(sources)[0]
    lines = {line.label: line for line in section.lines}
    where = sources.peers["environment"]["gpu"]
    figure, panels = new_figure(11.0, 4.4, len(PANELS))
    for panel, (label, title, note) in zip(panels, PANELS, strict=True):
        _draw(panel, lines[label], section.columns, title, note)
    title = f"m1 to m7, vLLM and nano-vllm on one {where}, Qwen3-0.6B's shapes"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(standalone_svg(figure, title, description(lines, section.columns)),
                    encoding="utf-8")


def description(lines: dict[str, Line], columns: dict[str, str]) -> str:
    """The chart in words, for who cannot see it."""
    said = []
    for label, title, note in PANELS:
        figures = [f"{shown} {show(lines[label].value(name), lines[label].style)}"
                   for name, shown in columns.items() if lines[label].value(name) is not None]
        said.append(f"{title} ({note}): {', '.join(figures)}.")
    return " ".join(said)


def _draw(panel, line: Line, columns: dict[str, str], title: str, note: str) -> None:  # noqa: ANN001
    names: Sequence[str] = list(columns)
    values = [line.value(name) for name in names]
    known = [value for value in values if value is not None]
    most = max(known)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        if value is None:
            text = show_cell(line, name).replace(NOT_YET, "not yet measured")
            panel.text(most * 0.02, place, text, color=SOFT, fontsize=8, va="center")
            continue
        color = LADDER if is_ours(name) else ACCENT
        panel.barh(place, value, color=color, height=0.66)
        panel.text(value + most * 0.02, place, show(value, line.style), color=INK,
                   fontsize=8.5, va="center")
    panel.set_xlim(0, most * 1.3)  # room for the figures behind the bars
    panel.set_yticks(range(len(names)), columns.values(), fontsize=9)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.set_title(f"{title}\n{note}", fontsize=9, color=INK, loc="left")
    panel.set_xticks([])

"""Draws the pictures of note 2. Needs nothing but Python.

    python learn/images/02_figures.py

Every picture has a light panel of its own, so it reads the same on a light and on a dark page. The
steps drawn in the timeline and the points of the queueing picture are what 02_experiments.py prints
(policies, queue).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
INK, SOFT, PANEL, LINE, GRID = "#1f2328", "#5c636b", "#fcfbf8", "#c9c5ba", "#e6e3da"
IDLE = "url(#idle)"
COLORS = {
    "A": "#4e79a7", "B": "#f28e2b", "C": "#59a14f", "D": "#b07aa1",
    "E": "#e15759", "F": "#2f9e9a", "G": "#9c755f", "H": "#b59a1f",
}
RED = COLORS["E"]
Points = Sequence[tuple[float, float]]


class Canvas:
    """Collects shapes and writes an SVG file."""

    def __init__(self, name: str, title: str, width: int, height: int) -> None:
        self.path = HERE / f"02_{name}.svg"
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" fill="{INK}">',
            f"<title>{title}</title>",
            '<defs><pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="6" height="6" fill="#f1efe9"/>'
            '<line x1="0" y1="0" x2="0" y2="6" stroke="#bdb8ab" stroke-width="1.6"/></pattern>'
            "</defs>",
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" '
            f'fill="{PANEL}" stroke="{LINE}"/>',
        ]

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "none",
        width: float = 1, rx: float = 2,
    ) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{rx}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="{width}"/>'
        )

    def text(
        self, x: float, y: float, text: str, size: float = 12, fill: str = INK,
        anchor: str = "start", bold: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" '
            f'text-anchor="{anchor}"{weight}>{text}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, color: str = SOFT, width: float = 1,
        dash: str = "",
    ) -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
            f'stroke-width="{width}"{dashes}/>'
        )

    def arrow(
        self, x1: float, y1: float, x2: float, y2: float, color: str = SOFT, both: bool = False
    ) -> None:
        self.line(x1, y1, x2, y2, color, 1.4)
        angle = math.atan2(y2 - y1, x2 - x1)
        tips = [(x2, y2, angle)] + ([(x1, y1, angle + math.pi)] if both else [])
        for x, y, way in tips:
            sides = [(x - 8 * math.cos(way + t), y - 8 * math.sin(way + t)) for t in (0.4, -0.4)]
            listed = " ".join(f"{a:.1f},{b:.1f}" for a, b in [(x, y), *sides])
            self._parts.append(f'<polygon points="{listed}" fill="{color}"/>')

    def curve(self, points: Points, color: str, width: float = 2.2, dash: str = "") -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f'<polyline points="{listed}" fill="none" stroke="{color}" stroke-width="{width}"'
            f"{dashes}/>"
        )

    def dot(self, x: float, y: float, radius: float, fill: str, stroke: str = "none") -> None:
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{stroke}" '
            'stroke-width="2"/>'
        )

    def save(self) -> None:
        self.path.write_text("\n".join([*self._parts, "</svg>"]) + "\n", encoding="utf-8")


def batch_roofline() -> None:
    """The bound on decode throughput by batch size, for three lengths of context."""
    weights, kv, flops, flops_per_context = 1_192_099_840, 114_688, 1_191_968_768, 229_376
    bandwidth, peak = 4.8e12, 989e12
    c = Canvas("batch_roofline", "Bound on decode throughput by batch size", 760, 446)
    c.text(24, 30, "Decode at its best: Qwen3-0.6B in bfloat16, H200 data sheet "
           "(4.8 TB/s, 989 TFLOP/s)", 13, bold=True)
    left, right, top, bottom = 84, 560, 66, 366

    def x(batch: float) -> float:
        return left + (right - left) * math.log2(batch) / 10

    def y(rate: float) -> float:
        return bottom - (bottom - top) * (math.log10(rate) - 3) / 3

    for power in range(11):
        c.line(x(2**power), bottom, x(2**power), top, GRID)
        c.text(x(2**power), bottom + 17, str(2**power), 11, SOFT, "middle")
    for rate in (1e3, 1e4, 1e5, 1e6):
        c.line(left, y(rate), right, y(rate), GRID)
        c.text(left - 8, y(rate) + 4, f"{rate:,.0f}", 11, SOFT, "end")
    c.text(left - 60, top - 12, "tokens/s, at most", 11, SOFT)
    c.text((left + right) / 2, bottom + 38, "requests decoded in one step (batch size B)",
           12, INK, "middle")
    batches = [2 ** (i / 8) for i in range(81)]
    lone = [(x(b), y(b * bandwidth / weights)) for b in batches if b * bandwidth / weights < 1e6]
    c.curve(lone, "#9aa0a6", 1.6, "5 4")
    c.text(x(60), y(5.2e5), "weights only: B times the tokens", 11, SOFT, "end")
    c.line(left, y(peak / flops), right, y(peak / flops), "#9aa0a6", 1.6, "2 3")
    c.text(right + 10, y(peak / flops) + 2, "arithmetic, without attention:", 11, SOFT)
    c.text(right + 10, y(peak / flops) + 16, f"{peak / flops:,.0f} tokens/s", 11, SOFT)

    def rate(batch: float, context: int) -> float:
        reading = (weights + batch * context * kv) / bandwidth
        multiplying = batch * (flops + flops_per_context * context) / peak
        return batch / max(reading, multiplying)

    for context, color in ((192, COLORS["A"]), (1024, COLORS["B"]), (4096, RED)):
        c.curve([(x(b), y(rate(b, context))) for b in batches], color)
        half = weights / (context * kv)
        c.dot(x(half), y(rate(half, context)), 4.5, PANEL, color)
        end = y(rate(1024, context))
        c.text(right + 10, end - 2, f"context {context:,}", 12, color, bold=True)
        c.text(right + 10, end + 13, f"limit {bandwidth / context / kv:,.0f} tokens/s", 11, SOFT)
    c.dot(left + 12, bottom + 60, 4.5, PANEL, INK)
    c.text(left + 24, bottom + 64, "KV bytes = weight bytes: half of the limit is reached; from "
           "here on more requests buy little", 11, SOFT)
    c.save()


NAMES = "ABCDEFGH"
ARRIVALS = (0, 0, 1, 3, 5, 6, 8, 9)
# Who got a token in which step.
STEPS = {
    "static: start when four are there (or no more come), run to the end":
        "... ABCD ABCD ABCD DBC DBC DB DB DB DB D D D EFGH EFGH EFH EFH HF HF F",
    "dynamic: the same, but the oldest waits at most two steps":
        ".. ABC ABC ABC CB CB B B B B DEFG DEFG DEF DEF DF DF DF D D D D D H H H H H H",
    "continuous: whoever is there runs; the prefill of a newcomer pauses the others":
        "AB C ABC D ABCD E DBCE DBCE F DBEF G DBFG H DBFH DBFH DHF DHF DH D",
}


def steps_of(text: str) -> list[str]:
    steps: list[str] = []
    for word in text.split():
        steps += [""] * len(word) if word.startswith(".") else [word]
    return steps


def timeline() -> None:
    """Three policies, the same requests: who computes in which step."""
    c = Canvas("timeline", "Static, dynamic and continuous batching", 760, 492)
    c.text(20, 28, "Eight requests, four rows, a column a step: the same work under three policies",
           14, bold=True)
    c.box(20, 46, 16, 13, COLORS["A"])
    c.text(42, 57, "decode", 11, SOFT)
    c.box(100, 46, 16, 13, COLORS["A"], INK, 2.2)
    c.text(122, 57, "prefill, gives the first token", 11, SOFT)
    c.box(300, 46, 16, 13, IDLE, LINE)
    c.text(322, 57, "kept, computes nothing: the batch is not over, or a prefill runs", 11, SOFT)
    y = 80
    for title, text in STEPS.items():
        c.text(20, y + 4, title, 12, bold=True)
        draw_policy(c, y + 12, steps_of(text), holds_batch=not title.startswith("continuous"))
        y += 141
    c.save()


def draw_policy(c: Canvas, top: float, steps: list[str], holds_batch: bool) -> None:
    left, cell, height = 84, 21, 17
    first = {n: min(t for t, row in enumerate(steps) if n in row) for n in NAMES}
    last = {n: max(t for t, row in enumerate(steps) if n in row) for n in NAMES}
    end = dict(last)
    if holds_batch:
        end = {n: max(last[m] for m in NAMES if first[m] == first[n]) for n in NAMES}
    free_from = [0] * 4
    for name in sorted(NAMES, key=lambda n: (first[n], n)):
        lane = next(i for i in range(4) if free_from[i] <= first[name])
        free_from[lane] = end[name] + 1
        for t in range(first[name], end[name] + 1):
            x, y = left + t * cell + 1, top + lane * height + 1
            if name not in steps[t]:
                c.box(x, y, cell - 2, height - 2, IDLE, LINE)
                continue
            stroke = INK if t == first[name] else "none"
            c.box(x, y, cell - 2, height - 2, COLORS[name], stroke, 2)
            c.text(x + cell / 2 - 1, y + 11.5, name, 10.5, "#ffffff", "middle", bold=True)
    y = top + 4 * height + 14
    for lane in range(4):
        c.text(left - 10, top + lane * height + 13, f"row {lane}", 10, SOFT, "end")
    c.text(left - 10, y, "arrives", 10, SOFT, "end")
    for place, (name, arrival) in enumerate(zip(NAMES, ARRIVALS, strict=True)):
        shift = 9 * place - 4 if ARRIVALS.count(arrival) > 1 else 0
        c.text(left + arrival * cell + cell / 2 + shift, y, name, 10, COLORS[name], "middle", True)

    def mean(times: dict[str, int]) -> float:
        return sum(times[n] - a + 1 for n, a in zip(NAMES, ARRIVALS, strict=True)) / len(NAMES)

    used = sum(map(len, steps)) / (4 * len(steps))
    c.text(left, y + 18, f"{len(steps)} steps; first token after {mean(first):.1f} steps, whole "
           f"answer after {mean(end):.1f} (means); {used:.0%} of the row-steps used", 11)


def draw_slot(
    c: Canvas, left: float, y: float, slot_len: int, slot: int, name: str, used: int
) -> None:
    size = 5
    left += slot * slot_len * size
    c.box(left, y, used * size, 22, COLORS.get(name, PANEL), rx=0)
    for i in range(4, slot_len, 4):
        c.line(left + i * size, y, left + i * size, y + 22, "#ffffff" if i < used else GRID, 0.7)
    c.box(left, y, slot_len * size, 22, "none", INK, 1.4, 0)
    if name:
        c.text(left + used * size / 2, y + 16, name, 12, "#ffffff", "middle", bold=True)
    c.text(left + 2, y + 34, f"slot {slot}", 9.5, SOFT)


def slots() -> None:
    """What a leaving sequence and a growing one do to the others."""
    c = Canvas("slots", "Slots without holes, and slots that double", 760, 430)
    left = 92

    def row(y: float, label: str, slot_len: int, used: Sequence[tuple[str, int]]) -> None:
        c.text(20, y + 16, label, 11, SOFT)
        for slot in range(128 // slot_len):
            name, tokens = used[slot] if slot < len(used) else ("", 0)
            draw_slot(c, left, y, slot_len, slot, name, tokens)

    c.text(20, 28, "1. No holes: B leaves, the last sequence moves into its slot", 13, bold=True)
    row(44, "before", 32, [("A", 20), ("B", 26), ("C", 12), ("D", 17)])
    row(118, "after", 32, [("A", 20), ("D", 17), ("C", 12)])
    c.arrow(left + 96 * 5 + 30, 68, left + 32 * 5 + 46, 115)
    c.text(left + 75 * 5, 104, "Move(source=96, target=32, num_tokens=17)", 10.5)
    c.text(20, 184, "The batch is the slice [0 : 3] of the slots: attention reads it in place, "
           "without an index.", 11, SOFT)
    c.line(20, 200, 740, 200, LINE)
    c.text(20, 226, "2. Doubling: A holds 32 tokens and computes its 33rd next", 13, bold=True)
    row(242, "before", 32, [("A", 32), ("B", 18), ("C", 26), ("D", 11)])
    row(332, "after", 64, [("A", 32), ("B", 18)])
    c.arrow(left + 32 * 5 + 62, 266, left + 64 * 5 + 48, 329)
    c.text(92, 309, "Move(source=32, target=64, num_tokens=18)", 10.5)
    c.text(left + 86 * 5, 298, "C and D give up their slots: preempted,", 10.5, RED)
    c.text(left + 86 * 5, 312, "recomputed when there is a slot again", 10.5, RED)
    c.text(20, 396, "128 tokens of memory are four slots of 32 or two of 64. Where several "
           "sequences stay, the last moves first:", 11, SOFT)
    c.text(20, 412, "moving the first one first would overwrite the second before it is copied.",
           11, SOFT)
    c.save()


def padding() -> None:
    """A padded prefill step, and why nobody ever reads the padding."""
    c = Canvas("padding", "A padded prefill step and its mask", 760, 402)
    c.text(20, 28, "A prefill step of three prompts (6, 2 and 4 tokens): B = 3 rows, T = 6 columns",
           13, bold=True)
    for row, (name, length) in enumerate((("A", 6), ("B", 2), ("C", 4))):
        c.text(72, 72 + 30 * row, f"row {row}", 11, SOFT, "end")
        for t in range(6):
            x, y = 84 + 30 * t, 52 + 30 * row
            if t < length:
                c.box(x, y, 28, 28, COLORS[name], INK if t == length - 1 else "none", 2.4)
                c.text(x + 14, y + 19, f"{name}{t}", 11, "#ffffff", "middle", bold=True)
            else:
                c.box(x, y, 28, 28, IDLE, LINE)
                c.text(x + 14, y + 19, f"{name}{length - 1}", 10, SOFT, "middle")
    c.text(72, 154, "position", 10, SOFT, "end")
    for t in range(6):
        c.text(98 + 30 * t, 154, str(t), 10, SOFT, "middle")
    for place, line in enumerate((
        "18 tokens are computed, 12 are wanted: 33 % padding.",
        "Padding repeats the row's last token and counts positions on: its",
        "keys and values go to the row's own slot, behind the real ones.",
        "Outlined: the last real token of each row. Only its hidden state",
        "goes through the lm_head.",
    )):
        c.text(300, 66 + 20 * place, line, 11.5)
    c.line(20, 176, 740, 176, LINE)
    c.text(20, 202, "One rule: a query at position p sees keys 0 to p. Row 1, the prompt of two "
           "tokens:", 13, bold=True)
    draw_mask(c, 20, "its prefill", range(6), num_real=2)
    for place, line in enumerate((
        "The queries at 0 and 1 are real:", "they see real keys only.",
        "The pale ones are padding:", "computed, never read.",
    )):
        c.text(214, 260 + 17 * place, line, 11, SOFT)
    draw_mask(c, 460, "its next decode step", range(2, 3), num_real=3)
    for place, line in enumerate((
        "Token 2 is stored first, over the padding that",
        "lay at position 2. Then it looks at 0, 1 and itself.",
        "The stale keys at 3, 4 and 5 lie in its future",
        "and stay hidden.",
    )):
        c.text(460, 296 + 17 * place, line, 11, SOFT)
    c.save()


def draw_mask(c: Canvas, left: float, title: str, queries: range, num_real: int) -> None:
    c.text(left, 226, title, 11, bold=True)
    for key in range(6):
        c.text(left + 54 + 22 * key, 240, str(key), 9.5, SOFT, "middle")
    for row, query in enumerate(queries):
        y = 246 + 22 * row
        c.text(left + 38, y + 14, f"q at {query}", 9.5, INK if query < num_real else SOFT, "end")
        for key in range(6):
            seen = COLORS["B"] if query < num_real else "#ead9c3"
            c.box(left + 44 + 22 * key, y, 20, 20, seen if key <= query else "#ffffff", LINE)


def metrics() -> None:
    """What each of the four times measures."""
    c = Canvas("metrics", "The times of one request", 760, 268)
    c.text(20, 28, "One request on the time axis", 13, bold=True)
    y = 116

    def x(t: float) -> float:
        return 40 + 29 * t

    tokens = (7.0, 8.2, 9.4, 10.6, 14.8, 16.0, 17.2, 18.4, 19.6)
    c.arrow(x(0), y, x(24.2), y)
    c.text(x(24), y + 18, "time", 10.5, SOFT, "end")
    c.box(x(0), y - 22, x(4) - x(0), 20, IDLE, LINE)
    c.text(x(2), y - 8, "waits", 11, INK, "middle")
    c.box(x(4), y - 22, x(7) - x(4), 20, COLORS["A"])
    c.text(x(5.5), y - 8, "prefill", 11, "#ffffff", "middle")
    for start, end in pairwise(tokens):
        if end - start > 2:
            c.box(x(start), y - 22, x(end - 1.2) - x(start), 20, RED)
            c.text((x(start) + x(end - 1.2)) / 2, y - 8, "another's prefill", 9.5, "#fff", "middle")
        c.box(x(end - 1.2), y - 22, x(end) - x(end - 1.2) - 1, 20, COLORS["C"])
    for place, t in enumerate(tokens, start=1):
        c.dot(x(t), y, 4, INK)
        c.text(x(t), y + 18, f"t{place}", 10, INK, "middle")
    c.dot(x(0), y, 4, PANEL, INK)
    c.text(x(0), y + 18, "arrival", 10, INK, "middle")
    for start, end, level, label in (
        (0.0, 7.0, 164, "TTFT = t1 - arrival"), (7.0, 19.6, 164, "TPOT = (t9 - t1) / 8"),
        (0.0, 19.6, 202, "end to end"),
    ):
        c.arrow(x(start), level, x(end), level, both=True)
        c.text((x(start) + x(end)) / 2, level - 6, label, 11, INK, "middle")
    for start, end, label, color in (
        (0.0, 4.0, "queue time", SOFT), (8.2, 9.4, "an ITL", SOFT),
        (10.6, 14.8, "the ITL that p99 shows", RED),
    ):
        c.arrow(x(start), 78, x(end), 78, color, both=True)
        c.text((x(start) + x(end)) / 2, 66, label, 11, color, "middle")
    c.text(20, 232, "TPOT is the mean pace after the first token: an eighth of the long gap is in "
           "it, which is hard to see.", 11, SOFT)
    c.text(20, 250, "ITL keeps every gap: its 99th percentile and its maximum show what a reader "
           "notices.", 11, SOFT)
    c.save()


# Requests served per step, mean steps in the system, mean steps to the first token.
LOADS = (
    (0.0492, 20.09, 1.0), (0.0980, 21.02, 1.0), (0.1465, 22.05, 1.0), (0.1946, 23.54, 1.4),
    (0.2330, 25.69, 2.9), (0.2710, 32.78, 9.3), (0.3049, 56.61, 32.7),
)


def queue() -> None:
    """Waiting grows without bound as the load nears the capacity."""
    c = Canvas("queue", "Time in the system by load", 620, 330)
    c.text(20, 28, "Load and waiting: eight slots, 400 requests, Poisson arrivals", 13, bold=True)
    left, right, top, bottom = 70, 430, 62, 270

    def x(rate: float) -> float:
        return left + (right - left) * rate / 0.34

    def y(steps: float) -> float:
        return bottom - (bottom - top) * steps / 60

    for steps in range(0, 61, 10):
        c.line(left, y(steps), right, y(steps), GRID)
        c.text(left - 8, y(steps) + 4, str(steps), 11, SOFT, "end")
    for rate in (0.0, 0.1, 0.2, 0.3):
        c.line(x(rate), bottom, x(rate), bottom + 5)
        c.text(x(rate), bottom + 19, f"{rate:g}", 11, SOFT, "middle")
    c.text((left + right) / 2, bottom + 42, "requests served per step", 12, INK, "middle")
    c.text(left - 48, top - 12, "steps", 11, SOFT)
    capacity = 1 / (1 + 18.2 / 8)
    c.line(x(capacity), bottom, x(capacity), top, RED, 1.6, "5 4")
    c.text(x(capacity) + 10, bottom - 26, "capacity: one prefill step and", 11, RED)
    c.text(x(capacity) + 10, bottom - 11, "18.2 / 8 decode steps a request", 11, RED)
    for column, color, label in (
        (1, COLORS["A"], "in the system (R)"), (2, COLORS["B"], "until the first token")
    ):
        points = [(x(load[0]), y(load[column])) for load in LOADS]
        c.curve(points, color)
        for point in points:
            c.dot(*point, 3.6, color)
        c.text(points[-1][0] + 10, points[-1][1] + 4, label, 12, color, bold=True)
    c.save()


if __name__ == "__main__":
    for draw in (batch_roofline, timeline, slots, padding, metrics, queue):
        draw()

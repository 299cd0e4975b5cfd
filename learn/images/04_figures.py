"""Draws the pictures of note 4. Needs nothing but Python.

    python learn/images/04_figures.py

Every picture has a light panel of its own, so it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from canvas import BLUE, CORAL, GREY, INK, LINE, PANEL, SAND, SOFT, TEAL, Canvas


def tiling() -> None:
    """The score matrix in tiles, and what one program holds while it walks along a row of them."""
    c = Canvas("04_tiling", "Scores are computed tile by tile and never leave the chip", 860, 420)
    cell, left, top, n = 30, 76, 96, 8
    c.text(left, 64, "scores [T, S], never stored", bold=True)
    c.text(left + n * cell / 2, 84, "keys", anchor="middle", size=12, fill=SOFT)
    c.text(left - 12, top + n * cell / 2, "queries", anchor="end", size=12, fill=SOFT)
    for i in range(n):
        for j in range(n):
            fill = GREY if j > i else SAND if j == i else TEAL
            c.box(left + j * cell, top + i * cell, cell - 2, cell - 2, fill, "none")
    c.line([(left - 3, top + 5 * cell - 2), (left + 6 * cell, top + 5 * cell - 2),
            (left + 6 * cell, top + 6 * cell), (left - 3, top + 6 * cell),
            (left - 3, top + 5 * cell - 2)], CORAL, 2.4)
    c.text(left + 6 * cell + 8, top + 5.6 * cell, "one program", size=12, fill=CORAL, bold=True)
    for i, (label, color) in enumerate((
        ("no mask needed", TEAL), ("on the diagonal: masked", SAND), ("skipped: never read", GREY),
    )):
        c.box(left, top + n * cell + 14 + i * 20, 13, 13, color, "none")
        c.text(left + 20, top + n * cell + 25 + i * 20, label, size=12)

    c.text(430, 64, "what that program does", bold=True)
    c.box(430, 84, 400, 74, GREY, LINE)
    c.text(442, 104, "HBM, 4.4 TB/s (the L2 cache between holds 50 MB)", size=12)
    for j in range(6):
        c.box(442 + j * 62, 116, 54, 30, BLUE if j < 5 else SAND)
        c.text(469 + j * 62, 136, f"K V {j}", anchor="middle", size=11)
    c.arrow(593, 148, 593, 190)
    c.text(606, 174, "a tile a turn, the next one on its way", size=12, fill=SOFT)
    c.box(430, 192, 400, 66, PANEL, INK)
    c.text(442, 212, "shared memory, 227 KB", size=12)
    c.box(442, 222, 92, 26, CORAL)
    c.text(488, 240, "Q tile", anchor="middle", size=12)
    for j, name in enumerate(("K V 2", "K V 3", "K V 4")):
        c.box(560 + j * 70, 222, 62, 26, BLUE)
        c.text(591 + j * 70, 240, name, anchor="middle", size=11)
    c.arrow(593, 250, 593, 282)
    c.box(430, 284, 400, 106, PANEL, INK)
    c.text(442, 304, "registers, 256 KB", size=12)
    c.box(442, 314, 130, 28, SAND)
    c.text(507, 333, "scores of 1 tile", anchor="middle", size=12)
    c.box(586, 314, 104, 28, TEAL)
    c.text(638, 333, "m, l: [rows]", anchor="middle", size=12)
    c.box(704, 314, 114, 28, TEAL)
    c.text(761, 333, "o: [rows, D]", anchor="middle", size=12)
    for x, y, formula in (
        (442, 362, "m' = max(m, max s)"), (606, 362, "l' = l 2^(m-m') + sum 2^(s-m')"),
        (442, 380, "at the end: o / l"), (606, 380, "o' = o 2^(m-m') + 2^(s-m') V"),
    ):
        c.text(x, y, formula, mono=True, size=10.5)
    c.save()


def roofline() -> None:
    """Attention's arithmetic intensity against what an H200 reads and multiplies."""
    c = Canvas("04_roofline", "Attention on an H200: 4.37 TB/s, 787 TFLOP/s (measured)", 860, 420)
    left, right, top, bottom = 90, 590, 70, 360
    low_x, high_x, low_y, high_y = 0, 4, 0, 3.2  # decades: FLOP/byte, TFLOP/s

    def at(intensity: float, tflops: float) -> tuple[float, float]:
        x = left + (math.log10(intensity) - low_x) / (high_x - low_x) * (right - left)
        y = bottom - (math.log10(tflops) - low_y) / (high_y - low_y) * (bottom - top)
        return x, y

    def ceiling(intensity: float) -> float:
        return min(4.37 * intensity, 787.0)

    for decade in range(5):
        x, _ = at(10**decade, 1)
        c.line([(x, top), (x, bottom)], LINE, 1)
        c.text(x, bottom + 18, f"{10**decade:,}", anchor="middle", size=11, fill=SOFT)
    for decade in range(4):
        _, y = at(1, 10**decade)
        c.line([(left, y), (right, y)], LINE, 1)
        c.text(left - 8, y + 4, f"{10**decade:,}", anchor="end", size=11, fill=SOFT)
    c.text((left + right) / 2, bottom + 40, "FLOP per byte of HBM traffic", anchor="middle",
           size=12, fill=SOFT)
    c.text(left - 8, top - 10, "TFLOP/s", anchor="end", size=12, fill=SOFT)
    c.line([at(1, 4.37), at(787 / 4.37, 787), at(10_000, 787)], INK, 2.4)
    x, y = at(787 / 4.37, 787)
    c.line([(x, y), (x, bottom)], SOFT, 1, dashed=True)
    c.text(x + 5, bottom - 8, "180", size=11, fill=SOFT)
    points = (
        (2, "decode, G = 2", TEAL, 12, 16),
        (512 / 24, "scores through memory, float32", CORAL, 12, 16),
        (2 * 8192 * 8192 * 2048 / (8192 * 12_288), "tiled, 8,192 tokens", BLUE, -50, 24),
    )
    for intensity, label, color, dx, dy in points:
        x, y = at(intensity, ceiling(intensity))
        c.dot(x, y, color)
        c.text(x + dx, y + dy, label, size=12)
    notes = (
        "Decode: every cached key is used", "for G queries, whatever the batch.", "",
        "Scores through memory: 512 FLOP", "and at least 24 bytes a score.", "",
        "Tiled: q, k, v and the output move", "once, 2 T^2 Hq D FLOP for 12,288 T", "bytes.", "",
        "The dots are upper bounds.",
    )
    for i, note in enumerate(notes):
        c.text(614, 92 + i * 20, note, size=11.5, fill=SOFT)
    c.save()


def launches() -> None:
    """The same five kernels launched from Python, replayed, and launched early."""
    c = Canvas("04_launches", "One layer of a decode step at batch 1, three ways", 860, 440)
    kernels = (("qkv", 46), ("attention", 72), ("o", 34), ("gate_up", 60), ("down", 44))
    colors = (TEAL, SAND, BLUE, CORAL, TEAL)

    def lane(y: float, name: str) -> None:
        c.text(28, y + 17, name, size=12, fill=SOFT)

    c.text(28, 68, "launched from Python: the GPU waits for the next launch", bold=True)
    lane(80, "CPU")
    lane(112, "GPU")
    for i, (name, width) in enumerate(kernels):
        x = 110 + i * 140
        c.box(x, 80, 132, 24, GREY)
        c.text(x + 66, 97, "Python, checks, launch", anchor="middle", size=10.5, fill=SOFT)
        c.box(x + 122, 112, width, 24, colors[i])
        c.text(x + 122 + width / 2, 129, name, anchor="middle", size=10)
        c.arrow(x + 118, 104, x + 122, 111)

    c.text(28, 178, "replayed from a graph: back to back, with a gap at every boundary", bold=True)
    lane(190, "CPU")
    lane(222, "GPU")
    c.box(110, 190, 60, 24, GREY)
    c.text(140, 207, "replay", anchor="middle", size=10.5, fill=SOFT)
    x = 164.0
    for i, (name, width) in enumerate(kernels):
        c.box(x, 222, width, 24, colors[i])
        c.text(x + width / 2, 239, name, anchor="middle", size=10)
        x += width + 12
    c.text(x + 16, 239, "the last wave drains, the next kernel starts, loads, waits", size=11.5,
           fill=SOFT)

    title = "the same, launched early: the next kernel loads its weights while the last one drains"
    c.text(28, 288, title, bold=True)
    lane(300, "CPU")
    lane(332, "GPU")
    c.box(110, 300, 60, 24, GREY)
    c.text(140, 317, "replay", anchor="middle", size=10.5, fill=SOFT)
    x = 164.0
    for i, (name, width) in enumerate(kernels):
        y = 332 + (i % 2) * 28
        c.box(x, y, 20, 24, PANEL, colors[i])
        c.box(x + 20, y, width - 10, 24, colors[i])
        c.text(x + 20 + (width - 10) / 2, y + 17, name, anchor="middle", size=10)
        x += width - 11
    c.box(520, 338, 18, 20, PANEL, TEAL)
    c.text(546, 353, "before gdc_wait: weights, tables, old keys", size=11.5)
    c.box(520, 364, 18, 20, TEAL)
    c.text(546, 379, "behind it: activations, every write", size=11.5)
    c.text(28, 420, "Not to scale. m3 has 588 operations in its 28 layers; at batch 1 one "
           "takes 19 us from launch to launch.", size=12, fill=SOFT)
    c.save()


def schedule(items: Sequence[tuple[int, str]], places: int) -> list[tuple[int, int, int, str]]:
    """(place, start, length, color): items in order, each where something is free first."""
    ends = [0] * places
    plan = []
    for length, color in items:
        place = ends.index(min(ends))
        plan.append((place, ends[place], length, color))
        ends[place] += length
    return plan


def work_list() -> None:
    """One long sequence among short ones on eight places: fixed splits against a work list."""
    c = Canvas(
        "04_work_list", "One long sequence among eleven short ones, eight programs at a time",
        860, 420,
    )
    long, short = 48, 4
    panels = (
        ("one program a sequence", [(short, BLUE)] * 11 + [(long, CORAL)]),
        ("every sequence in four", [(1, BLUE)] * 44 + [(long // 4, CORAL)] * 4),
        ("work list: items of about (44 + 48) / 8 tokens, longest first",
         [(long // 4, CORAL)] * 4 + [(short, BLUE)] * 11),
    )
    unit, row = 13.0, 11
    for place, (title, items) in enumerate(panels):
        top = 62 + place * 118
        start = 1  # what a program takes before it reads
        plan = schedule([(length + start, color) for length, color in items], 8)
        end = max(begin + length for _, begin, length, _ in plan)
        c.text(28, top + 2, title, bold=True, size=12.5)
        c.text(824, top + 2, f"{len(items)} programs, ends at {end}", anchor="end", size=12,
               fill=SOFT)
        for where in range(8):
            c.box(28, top + 10 + where * row, 55 * unit, row - 2, "#eef0f4", "none")
        for where, begin, length, color in plan:
            x, y = 28 + begin * unit, top + 10 + where * row
            c.box(x, y, start * unit - 1, row - 2, GREY, "none")
            c.box(x + start * unit, y, (length - start) * unit - 1, row - 2, color, "none")
    c.save()


if __name__ == "__main__":
    tiling()
    roofline()
    launches()
    work_list()

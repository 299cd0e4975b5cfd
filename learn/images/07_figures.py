"""Draws the pictures of note 7.

python learn/images/07_figures.py
"""

from __future__ import annotations

import math

from canvas import BLUE, CORAL, GREY, INK, LINE, PANEL, SAND, SOFT, TEAL, Canvas


def lattice() -> None:
    """Rounding two correlated weights: each by itself, and the second for the first."""
    c = Canvas("07_lattice", "Two weights whose inputs are alike (correlation 0.9)", 860, 400)
    left, top, unit = 90, 330, 150
    c.text(
        24,
        58,
        "Lines of equal error: what the layer's output feels, not how far a weight moves.",
        size=12,
        fill=SOFT,
    )

    def place(a: float, b: float) -> tuple[float, float]:
        return left + 60 + a * unit, top - 60 - b * unit

    # w + t (1, -1) cd. the ellipse a² + 1.8 a b + b² = loss, axes along (1, 1) and (1, -1)
    for loss, color in ((0.088, TEAL), (0.608, CORAL)):
        long, short = math.sqrt(loss / 0.1), math.sqrt(loss / 1.9)
        points = []
        for step in range(121):
            turn = 2 * math.pi * step / 120
            u, v = long * math.cos(turn) / math.sqrt(2), short * math.sin(turn) / math.sqrt(2)
            a, b = 0.4 + u + v, 0.4 - u + v
            if -0.35 <= a <= 1.45 and -0.35 <= b <= 1.25:
                points.append(place(a, b))
            elif points:
                c.line(points, color, 1.4, dashed=True)
                points = []
        c.line(points, color, 1.4, dashed=True)
    for a in (0, 1):
        for b in (0, 1):
            c.dot(*place(a, b), GREY)
    c.text(place(0, 0)[0] - 14, place(0, 0)[1] + 20, "(0, 0)", anchor="end", size=12)
    c.text(place(0, 1)[0] - 14, place(0, 1)[1] + 4, "(0, 1)", anchor="end", size=12)
    c.text(place(1, 0)[0] + 10, place(1, 0)[1] + 18, "(1, 0)", size=12)
    c.dot(*place(0.4, 0.4), INK)
    c.text(place(0.4, 0.4)[0] + 10, place(0.4, 0.4)[1] + 16, "w = (0.4, 0.4)", size=12, bold=True)
    x, y = place(0.4, 0.4)
    c.arrow(x, y, *place(0.03, 0.03), CORAL)
    c.arrow(x, y, *place(0.0, 0.76), BLUE)
    c.arrow(*place(0.0, 0.76), *place(0.0, 0.96), TEAL)
    rows = (
        (CORAL, "round each to nearest: (0, 0)", "error 0.4² + 0.4² + 1.8 · 0.4 · 0.4 = 0.608"),
        (BLUE, "round the first: 0.4 -> 0", "the second moves to 0.4 + 0.9 · 0.4 = 0.76"),
        (TEAL, "round the second: 0.76 -> 1", "error 0.4² + 0.6² - 1.8 · 0.4 · 0.6 = 0.088"),
    )
    for i, (color, what, result) in enumerate(rows):
        y = 130 + i * 66
        c.box(480, y - 14, 18, 18, color)
        c.text(508, y, what, bold=True)
        c.text(508, y + 22, result, size=12, fill=SOFT)
    c.text(480, 340, "A seventh of the error, and farther from w.", size=13)
    c.save()


def columns() -> None:
    """One step of the algorithm: fixed columns, the column that is rounded, blocks that wait."""
    c = Canvas("07_columns", "One column at a time, all rows at once, a block at a time", 860, 380)
    x0, y0, w, h, n = 60, 90, 20, 150, 32
    for i in range(n):
        fill = TEAL if i < 11 else CORAL if i == 11 else SAND if i < 16 else PANEL
        c.box(x0 + i * w, y0, w, h, fill, LINE)
    c.box(x0 + 8 * w, y0 - 4, 8 * w, h + 8, "none")
    c.text(x0 + 4 * w, y0 - 12, "fixed codes", anchor="middle", size=12)
    c.text(x0 + 12 * w, y0 - 12, "the block", anchor="middle", size=12, bold=True)
    c.text(x0 + 24 * w, y0 - 12, "wait for the block's end", anchor="middle", size=12, fill=SOFT)
    for i in (13, 14, 15):
        c.arrow(x0 + 11.5 * w, y0 + 40, x0 + (i + 0.3) * w, y0 + 58 + 14 * (i - 13), INK)
    c.line([(x0 + 8 * w, y0 + h + 16), (x0 + 16 * w, y0 + h + 16)], SOFT)
    c.arrow(x0 + 16 * w, y0 + h + 16, x0 + 20 * w, y0 + h + 16, SOFT)
    c.text(x0 + 20.4 * w, y0 + h + 20, "errors of a whole block: one matrix product", size=12)
    c.text(x0 - 12, y0 + h / 2, "out", anchor="end", size=12, fill=SOFT)
    c.text(x0 + n * w + 10, y0 + h / 2, "in", size=12, fill=SOFT)
    for i, (color, text) in enumerate(
        (
            (TEAL, "rounded: never touched again"),
            (CORAL, "being rounded: e = (w - ŵ) / U[j, j]"),
            (SAND, "up to date: w -= e U[j, j+1:], for every column that is rounded"),
            (PANEL, "later blocks: w -= E U[block, later], once for 128 columns"),
        )
    ):
        y = 290 + i * 22
        c.box(60, y - 12, 14, 14, color, SOFT)
        c.text(84, y, text, size=12)
    c.save()


def packing() -> None:
    """Where a code lies in qweight, and a zero point in qzeros."""
    c = Canvas("07_packing", "4 bits: eight inputs of one output share a word", 860, 470)
    x0, cell = 60, 88
    c.text(
        24,
        62,
        "qweight, int32 [in / 8, out]: word r of a column holds inputs 8r to 8r + 7",
        size=12,
        bold=True,
    )
    for i in range(8):
        k = 7 - i
        c.box(x0 + i * cell, 76, cell - 2, 34, BLUE)
        c.text(x0 + i * cell + cell / 2, 98, f"q[8r + {k}]", anchor="middle", size=12, mono=True)
        c.text(
            x0 + i * cell + cell / 2,
            126,
            f"bits {4 * k + 3}..{4 * k}",
            anchor="middle",
            size=11,
            fill=SOFT,
        )
    c.text(24, 168, "qzeros, int32 [G, out / 8]: along the outputs instead", size=12, bold=True)
    for i in range(8):
        k = 7 - i
        c.box(x0 + i * cell, 182, cell - 2, 34, SAND)
        c.text(x0 + i * cell + cell / 2, 204, f"z[8c + {k}]", anchor="middle", size=12, mono=True)
    c.text(
        24,
        254,
        "version 1 stores one less: a symmetric zero point of 8 is stored as 7",
        size=12,
        bold=True,
    )
    for y, name, value, note in (
        (268, "gptq (version 1)", "0x77777777", "read, then + 0x11111111"),
        (300, "gptq_v2", "0x88888888", "read as it is"),
        (
            332,
            "asymmetric, v1",
            "0x..6F..",
            "a zero point of 0: stored as 0 - 1, which borrows above",
        ),
    ):
        c.box(x0, y, 150, 26, GREY)
        c.text(x0 + 75, y + 18, name, anchor="middle", size=12)
        c.text(x0 + 170, y + 18, value, size=12, mono=True)
        c.text(x0 + 290, y + 18, note, size=12, fill=SOFT)
    c.text(
        24,
        392,
        "3 bits: 32 codes in three words; two of them lie across a border",
        size=12,
        bold=True,
    )
    x = float(x0)
    for k in range(32):
        width = 704 / 32
        crossing = k in (10, 21)
        c.box(x, 406, width - 1, 28, CORAL if crossing else BLUE)
        c.text(x + width / 2, 424, str(k), anchor="middle", size=10)
        x += width
    for word in (1, 2):
        border = x0 + 704 * word / 3
        c.line([(border, 400), (border, 440)], INK, 2)
    for word in range(3):
        c.text(
            x0 + 704 * (word + 0.5) / 3, 454, f"word {word}", anchor="middle", size=11, fill=SOFT
        )
    c.save()


def act_order() -> None:
    """g_idx with act-order, and what is done with it at load."""
    c = Canvas("07_act_order", "Act-order: groups by importance, sorted once at load", 860, 330)
    x0, cell = 150, 56
    groups = (2, 0, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1)
    fills = (TEAL, SAND, BLUE)

    def row(y: float, label: str, order: list[int], under: str = "x") -> None:
        c.text(x0 - 12, y + 20, label, anchor="end", size=12)
        for place, i in enumerate(order):
            c.box(x0 + place * cell, y, cell - 2, 30, fills[groups[i]])
            c.text(
                x0 + place * cell + cell / 2 - 1,
                y + 20,
                f"{under}{i}",
                anchor="middle",
                size=12,
                mono=True,
            )

    row(60, "in the file", list(range(12)), "w")
    for i, g in enumerate(groups):
        c.text(x0 + i * cell + cell / 2, 106, str(g), anchor="middle", size=12, mono=True)
    c.text(x0 - 12, 106, "g_idx", anchor="end", size=12)
    order = sorted(range(12), key=lambda i: groups[i])
    row(150, "in memory", order, "w")
    row(200, "x, per call", order, "x")
    for g in range(3):
        left = x0 + g * 4 * cell
        c.line([(left, 244), (left + 4 * cell - 4, 244)], INK)
        c.text(left + 2 * cell, 262, f"group {g}: one scale", anchor="middle", size=12)
    c.text(
        24,
        298,
        "Every tile of weights has one scale again. x is brought into the order by one "
        "index_select, not the weights in the loop.",
        size=12,
        fill=SOFT,
    )
    c.save()


def roofline() -> None:
    """Time of one product over the batch size, in 16 and in 4 bits."""
    c = Canvas(
        "07_roofline", "gate_up of an 8B model (4,096 x 24,576) on an H200, at best", 860, 400
    )
    left, right, top, bottom = 90, 560, 70, 340
    bandwidth, peak = 4.37e12, 787e12
    n, k = 24576, 4096

    def time(m: float, bits: float) -> float:
        moved = n * k * bits / 8 + 2 * m * (n + k)
        return max(moved / bandwidth, 2 * m * n * k / peak) * 1e6

    low, high = 8.0, 2000.0

    def place(m: float, us: float) -> tuple[float, float]:
        x = left + (right - left) * math.log2(m) / 12
        y = bottom - (bottom - top) * math.log(us / low) / math.log(high / low)
        return x, y

    for power in range(0, 13, 2):
        x = place(2**power, low)[0]
        c.line([(x, top), (x, bottom)], LINE, 1)
        c.text(x, bottom + 18, str(2**power), anchor="middle", size=11, fill=SOFT)
    for us in (10, 30, 100, 300, 1000):
        y = place(1, us)[1]
        c.line([(left, y), (right, y)], LINE, 1)
        c.text(left - 8, y + 4, str(us), anchor="end", size=11, fill=SOFT)
    c.text(left - 8, top - 8, "us", anchor="end", size=11, fill=SOFT)
    c.text(
        (left + right) / 2,
        bottom + 38,
        "rows of x (sequences of a decode step, or prompt tokens)",
        anchor="middle",
        size=12,
    )
    sizes = [2 ** (i / 8) for i in range(97)]
    for bits, color in ((16.0, CORAL), (4.15625, TEAL)):
        c.line([place(m, time(m, bits)) for m in sizes], color, 2.4)
    reads = 2 * (n + k) * peak  # activations of a row, for each FLOP of that row
    turns = [n * k * bits / 8 * peak / (2 * n * k * bandwidth - reads) for bits in (4.15625, 16)]
    for m in turns:
        x, text = place(m, low)[0], f"{m:.0f}"
        c.line([(x, top), (x, bottom)], SOFT, 1.2, dashed=True)
        c.text(x, top - 6, text, anchor="middle", size=11, fill=SOFT)
    for i, (color, text) in enumerate(
        (
            (CORAL, "bf16: 201 MB"),
            (TEAL, "4 bits, groups of 128: 52 MB"),
        )
    ):
        c.box(590, 90 + i * 28, 16, 16, color)
        c.text(614, 103 + i * 28, text, size=12)
    for i, text in enumerate(
        (
            f"up to {turns[0]:.0f} rows: 3.8 times as fast,",
            "the ratio of the bytes",
            f"{turns[0]:.0f} to {turns[1]:.0f}: the gain melts away,",
            "arithmetic is the limit of one of both",
            f"above {turns[1]:.0f}: no gain; unpacking is extra",
        )
    ):
        c.text(
            590,
            176 + i * 22 + (10 if i > 1 else 0) + (10 if i > 3 else 0),
            text,
            size=12,
            fill=SOFT,
        )
    c.save()


if __name__ == "__main__":
    for draw in (lattice, columns, packing, act_order, roofline):
        draw()

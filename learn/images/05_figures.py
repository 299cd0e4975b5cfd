"""Draws the pictures of note 5; what they show comes from 05_experiments.py beside it.

    PYTHONPATH=. python learn/images/05_figures.py

Every picture has a light panel of its own, so it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from canvas import BLUE, CORAL, GREY, INK, LINE, SAND, SOFT, TEAL, Canvas

from m5_chunked.chunk_size import ChunkSize

experiments: Any = importlib.import_module("05_experiments")  # no identifier begins with a digit


def roofline() -> None:
    """Decodes, chunks, and steps of both, under the roofline of an H200."""
    c = Canvas(
        "05_roofline", "Whole steps of Qwen3-0.6B on an H200: 4.37 TB/s, 787 TFLOP/s", 860, 420,
    )
    left, right, top, bottom = 90, 590, 70, 360
    low_x, high_x, low_y, high_y = 0.5, 4, 1, 3.2  # decades: FLOP/byte, TFLOP/s

    def at(intensity: float, tflops: float) -> tuple[float, float]:
        x = left + (math.log10(intensity) - low_x) / (high_x - low_x) * (right - left)
        y = bottom - (math.log10(tflops) - low_y) / (high_y - low_y) * (bottom - top)
        return x, y

    for decade in range(1, 5):
        x, _ = at(10**decade, 10)
        c.line([(x, top), (x, bottom)], LINE, 1)
        c.text(x, bottom + 18, f"{10**decade:,}", anchor="middle", size=11, fill=SOFT)
    for decade in range(1, 4):
        _, y = at(10, 10**decade)
        c.line([(left, y), (right, y)], LINE, 1)
        c.text(left - 8, y + 4, f"{10**decade:,}", anchor="end", size=11, fill=SOFT)
    c.text((left + right) / 2, bottom + 40, "FLOP per byte of a step", anchor="middle", size=12,
           fill=SOFT)
    c.text(left - 8, top - 10, "TFLOP/s", anchor="end", size=12, fill=SOFT)
    c.line([at(10**0.5, 4.37 * 10**0.5), at(787 / 4.37, 787), at(10_000, 787)], INK, 2.4)
    x, y = at(787 / 4.37, 787)
    c.line([(x, y), (x, bottom)], SOFT, 1, dashed=True)
    c.text(x + 5, bottom - 8, "180", size=11, fill=SOFT)
    decodes = [(1023, 1024, True)] * 64
    for label, spans, color, dx, dy in (
        ("64 decodes", decodes, TEAL, 12, 6),
        ("and 448 tokens of a prompt", [*decodes, (4096, 4544, False)], SAND, 12, 14),
        ("and 1,984", [*decodes, (4096, 6080, False)], CORAL, -24, 24),
        ("a prompt of 8,192", [(0, 8192, True)], BLUE, -98, 24),
    ):
        matrix, attention, read = experiments.work(spans)
        intensity = (matrix + attention) / read
        x, y = at(intensity, min(4.37 * intensity, 787.0))
        c.dot(x, y, color)
        c.text(x + dx, y + dy, label, size=12)
    for i, note in enumerate((
        "64 decodes of 1,024 tokens read", "8.7 GB and do 0.09 TFLOP: the",
        "matrix units idle.", "",
        "448 prompt tokens use weights", "that are read anyway: 0.5 GB",
        "more, 0.84 TFLOP more.", "",
        "From 830 tokens on the step is", "bound by arithmetic, and each", "token more costs time.",
        "", "The dots are upper bounds.",
    )):  # fmt: skip
        c.text(614, 92 + i * 20, note, size=11.5, fill=SOFT)
    c.save()


def timeline() -> None:
    """Steps while four prompts arrive, to scale by the cost model."""
    c = Canvas(
        "05_timeline", "64 decodes, and four prompts of 8,192 arrive (time by the model)", 860, 420,
    )
    left, unit, span = 40, 4.7, 165.0
    for place, (title, scheduler) in enumerate((
        ("m4: prompts first, each whole", experiments.m4()),
        ("m5, 2,048 tokens a step", experiments.m5(2048)),
        ("m5, 1,024 tokens a step", experiments.m5(1024)),
    )):
        done, window, ttfts, _ = experiments.mixed_run(scheduler)
        top = 74 + place * 104
        c.text(left, top - 8, title, bold=True, size=12.5)
        c.text(824, top - 8, f"longest gap {max(window):.0f} ms, first tokens of the four after "
               f"{ttfts[0]:.0f} to {ttfts[-1]:.0f} ms", anchor="end", size=12, fill=SOFT)
        c.box(left, top, span * unit, 34, "#eef0f4", "none")
        now = 0.0
        for ms, ones, others in done.steps[done.late_from - 2 :]:
            if now + ms > span:
                break
            x, width = left + now * unit, max(ms * unit - 1, 1)
            if others:
                c.box(x, top, width, 34, CORAL, "none")
            if ones:
                height = 34 if not others else 9
                c.box(x, top + 34 - height, width, height, TEAL, "none")
            now += ms
            if ones:
                c.line([(left + now * unit, top + 37), (left + now * unit, top + 45)], INK, 1)
        c.text(left, top + 60, "a token for each decode", size=10.5, fill=SOFT)
    for i, (label, color) in enumerate((("decodes", TEAL), ("prompts", CORAL))):
        c.box(left + i * 110, 386, 13, 13, color, "none")
        c.text(left + 20 + i * 110, 397, label, size=12)
    c.line([(660, 393), (660 + 25 * unit, 393)], INK, 1.4)
    c.text(660 + 25 * unit + 8, 397, "25 ms", size=12)
    c.save()


def overlap() -> None:
    """Host and GPU with and without overlap, and a sequence that ends unforeseen."""
    c = Canvas("05_overlap", "The host's work beside the GPU's, not between", 860, 452)

    def lane(y: float, name: str) -> None:
        c.text(28, y + 18, name, size=12, fill=SOFT)

    def host(x: float, y: float, parts: Sequence[tuple[str, float, str]]) -> float:
        for label, width, color in parts:
            c.box(x, y, width - 2, 26, color, LINE)
            c.text(x + width / 2 - 1, y + 17, label, anchor="middle", size=10.5)
            x += width
        return x

    c.text(28, 66, "one after the other (--no-overlap): the GPU waits for the host", bold=True)
    lane(78, "host")
    lane(110, "GPU")
    x = 90.0
    for step in range(1, 5):
        end = host(x, 78, ((f"plan {step}", 46, SAND), ("launch", 40, BLUE)))
        c.box(end, 110, 68, 26, TEAL)
        c.text(end + 34, 127, f"step {step}", anchor="middle", size=11)
        c.arrow(end - 8, 104, end + 2, 110)
        x = host(end + 68, 78, ((f"read {step}", 38, GREY),))

    title = "overlapped: step N+1 is launched while N runs, then N's tokens are read"
    c.text(28, 176, title, bold=True)
    lane(188, "host")
    lane(238, "GPU")
    gpu, x = 176.0, 90.0
    x = host(x, 188, (("plan 1", 46, SAND), ("launch", 40, BLUE)))
    for step in range(1, 5):
        width = 128
        c.box(gpu, 238, width - 3, 26, TEAL)
        c.text(gpu + width / 2, 255, f"step {step}", anchor="middle", size=11)
        x = host(x, 188, ((f"plan {step + 1}", 46, SAND), ("launch", 40, BLUE)))
        c.arrow(x - 10, 215, gpu + width + 2, 236, BLUE)
        gpu += width
        c.line([(x, 201), (gpu, 201)], SOFT, 1, dashed=True)
        x = host(gpu, 188, ((f"read {step}", 38, GREY),))
        if step < 4:
            c.arrow(gpu - 6, 238, gpu + 6, 216)
    c.text(90, 282, "token pool:", size=11, fill=SOFT)
    for step in range(1, 4):
        px = 176 + 128 * step - 3
        c.line([(px - 18, 266), (px - 10, 276), (px + 10, 276), (px + 18, 266)], CORAL, 2)
    c.text(588, 282, "what N samples is N+1's input, on the GPU", size=11, fill=CORAL)

    c.text(28, 320, "a sequence whose token 2 turns out to be the end", bold=True)
    rows = (
        ("step 1", "samples token 1", "read: goes on", TEAL),
        ("step 2", "computes token 1, samples token 2", "read: EOS, shown, finished", TEAL),
        ("step 3", "computes token 2, samples token 3", "read: ignored", CORAL),
        ("step 4", "planned after step 2 was read: not in it", "", GREY),
    )
    for i, (name, does, read, color) in enumerate(rows):
        y = 334 + i * 24
        c.box(28, y, 60, 19, color, LINE)
        c.text(58, y + 14, name, anchor="middle", size=11)
        c.text(100, y + 14, does, size=11.5)
        c.text(400, y + 14, read, size=11.5, fill=CORAL if color == CORAL else SOFT)
    c.text(590, 348, "Step 3 was launched before", size=11.5, fill=SOFT)
    c.text(590, 366, "step 2 was read. Blocks freed", size=11.5, fill=SOFT)
    c.text(590, 384, "then are written by step 4 or", size=11.5, fill=SOFT)
    c.text(590, 402, "later: behind step 3 on the", size=11.5, fill=SOFT)
    c.text(590, 420, "same stream.", size=11.5, fill=SOFT)
    c.save()


def tradeoff() -> None:
    """ITL, TTFT and throughput against the budget."""
    c = Canvas(
        "05_tradeoff", "Choosing the budget: 64 decodes, four prompts of 8,192 (by the model)",
        860, 400,
    )
    budgets = (384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
    results = []
    for budget in budgets:
        done, window, ttfts, _ = experiments.mixed_run(experiments.m5(budget))
        made = sum(len(u.times) for u in done.users)
        results.append((max(window), float(np.mean(window)), ttfts[0], ttfts[-1],
                        made / done.seconds / 1e3))  # fmt: skip
    panels = (
        ("gap between a decode's tokens, ms", 40, ((0, "longest", CORAL), (1, "mean", TEAL))),
        ("first tokens of the prompts, ms", 400, ((3, "last of four", CORAL), (2, "first", TEAL))),
        ("all tokens made, thousand/s", 30, ((4, "", BLUE),)),
    )
    for place, (title, high, series) in enumerate(panels):
        left, width, top, bottom = 62 + place * 272, 212, 90, 320
        c.text(left - 30, 66, title, bold=True, size=12.5)
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = bottom - share * (bottom - top)
            c.line([(left, y), (left + width, y)], LINE, 1)
            c.text(left - 6, y + 4, f"{share * high:g}", anchor="end", size=11, fill=SOFT)

        def where(budget: int, left: int = left, width: int = width) -> float:
            return left + math.log2(budget / 384) / math.log2(8192 / 384) * width

        for budget in (512, 1024, 2048, 4096, 8192):
            c.text(where(budget), bottom + 18, f"{budget:,}", anchor="middle", size=10.5, fill=SOFT)
        for column, label, color in series:
            points = [
                (where(budget), bottom - row[column] / high * (bottom - top))
                for budget, row in zip(budgets, results, strict=True)
            ]
            c.line(points, color, 2.2)
            x, y = points[4] if place != 1 else points[2]
            dx, dy = ((-58, -14), (24, -10), (0, 0))[place]
            dx, dy = (10, 16) if label == "mean" else (dx, dy)
            c.text(x + dx, y + dy, label, size=11.5, fill=color, bold=True)
    c.text(430, 366, "tokens of a step (--max-num-batched-tokens)", anchor="middle", size=12,
           fill=SOFT)
    c.save()


def control() -> None:
    """The controller of ChunkSize, told of a step at once and one step late."""
    title = "A target of 10 ms; steps take 1.5 ms and 2.5 us a prompt token"
    c = Canvas("05_control", title, 860, 360)
    left, right, top, bottom, high = 74, 640, 64, 300, 9000
    for size in range(0, high + 1, 1500):
        y = bottom - size / high * (bottom - top)
        c.line([(left, y), (right, y)], LINE, 1)
        c.text(left - 8, y + 4, f"{size:,}", anchor="end", size=11, fill=SOFT)
    c.text(left - 8, top - 12, "tokens", anchor="end", size=11, fill=SOFT)
    c.text((left + right) / 2, bottom + 36, "step", anchor="middle", size=12, fill=SOFT)
    for step in range(0, 41, 10):
        x = left + step / 40 * (right - left)
        c.text(x, bottom + 18, str(step), anchor="middle", size=11, fill=SOFT)
    for delay, color in ((1, CORAL), (0, TEAL)):
        sizes, under_way, chunk_size = [], [], ChunkSize(8192, 10e-3)
        for _ in range(41):
            sizes.append(chunk_size.limit)
            under_way.append(chunk_size.limit)
            if len(under_way) > delay:
                size = under_way.pop(0)
                chunk_size.observe(size, 64, 1.5e-3 + 2.5e-6 * size)
        points = [(left + i / 40 * (right - left), bottom - min(size, high) / high * (bottom - top))
                  for i, size in enumerate(sizes)]  # fmt: skip
        c.line(points, color, 2.2)
    for i, (note, color) in enumerate((
        ("one after the other", TEAL),
        ("overlapped: what is", CORAL), ("seen is a step old", CORAL),
        ("", INK), ("3,400 tokens take 10 ms.", SOFT),
    )):
        c.text(660, 100 + i * 20, note, size=12, fill=color, bold=color != SOFT)
    c.save()


if __name__ == "__main__":
    roofline()
    timeline()
    overlap()
    tradeoff()
    control()

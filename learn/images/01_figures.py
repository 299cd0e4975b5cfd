"""Draws the pictures of note 1. Needs nothing but Python.

    python learn/images/01_figures.py

Every picture has a light panel of its own, so it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import math
from pathlib import Path

HERE = Path(__file__).parent
INK, SOFT, PANEL, LINE = "#1d2433", "#5b6577", "#fbfbf8", "#c9ced8"
TEAL, SAND, CORAL, GREY, BLUE = "#2a9d8f", "#e9c46a", "#e76f51", "#d9dde4", "#4a7fb5"


class Canvas:
    """Collects shapes and writes an SVG file."""

    def __init__(self, name: str, title: str, width: int, height: int) -> None:
        self.path = HERE / f"01_{name}.svg"
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{INK}">',
            f"<title>{title}</title>",
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" '
            f'fill="{PANEL}" stroke="{LINE}"/>',
        ]

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "none", rx: float = 2
    ) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{rx}" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", size: float = 13,
        fill: str = INK, weight: str = "normal", mono: bool = False,
    ) -> None:
        family = ' font-family="Menlo, DejaVu Sans Mono, monospace"' if mono else ""
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'font-weight="{weight}" fill="{fill}"{family}>{text}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, color: str = SOFT, width: float = 1.3,
        *, dash: str = "", arrow: bool = False,
    ) -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
            f'stroke-width="{width}"{dashes}/>'
        )
        if arrow:
            angle = math.atan2(y2 - y1, x2 - x1)
            points = [(x2, y2)] + [
                (x2 - 8 * math.cos(angle + turn), y2 - 8 * math.sin(angle + turn))
                for turn in (0.42, -0.42)
            ]
            listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            self._parts.append(f'<polygon points="{listed}" fill="{color}"/>')

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{INK}"/>'
        )

    def save(self) -> None:
        self.path.write_text("\n".join([*self._parts, "</svg>"]) + "\n", encoding="utf-8")


def layer_shapes() -> None:
    """One decoder layer: every reshape with its shape, letters and the numbers of SmolLM2."""
    c = Canvas("layer_shapes", "Shapes in one decoder layer", 900, 660)
    c.text(24, 32, "One decoder layer, T tokens", size=16, weight="bold")
    c.text(400, 32, "shape", weight="bold")
    c.text(660, 32, "SmolLM2-135M", weight="bold")
    rows = [
        ("residual stream", "[T, H]", "[T, 576]", GREY),
        ("rms_norm", "[T, H]", "[T, 576]", SAND),
        ("qkv_proj", "[T, (Hq + 2 Hkv) D]", "[T, 960]", TEAL),
        ("view: cut into heads", "[T, Hq + 2 Hkv, D]", "[T, 15, 64]", GREY),
        ("split: q | k | v", "[T, Hq, D] and 2 x [T, Hkv, D]", "[T, 9, 64], 2 x [T, 3, 64]", GREY),
        ("qk_norm_rope (q and k)", "unchanged", "unchanged", SAND),
        ("attend: store k, v", "cache [S, Hkv, D]", "[S, 3, 64]", CORAL),
        ("attend: scores q·k", "[Hq, T, S]", "[9, T, S]", CORAL),
        ("attend: softmax · v", "[T, Hq, D]", "[T, 9, 64]", CORAL),
        ("flatten heads, o_proj", "[T, Hq D] to [T, H]", "[T, 576] to [T, 576]", TEAL),
        ("+ residual, rms_norm", "[T, H]", "[T, 576]", SAND),
        ("gate_up_proj", "[T, 2 I]", "[T, 3072]", TEAL),
        ("silu(gate) · up", "[T, I]", "[T, 1536]", SAND),
        ("down_proj, + residual", "[T, H]", "[T, 576]", TEAL),
    ]
    for i, (what, shape, numbers, color) in enumerate(rows):
        y = 50 + i * 40
        c.box(110, y, 250, 30, color, INK, 4)
        c.text(235, y + 20, what, anchor="middle")
        c.text(400, y + 20, shape, mono=True, size=12)
        c.text(660, y + 20, numbers, mono=True, size=12)
        if i:
            c.line(235, y - 10, 235, y, arrow=True)
    for top, bottom in ((65, 465), (465, 585)):
        c.line(110, top, 72, top)
        c.line(72, top, 72, bottom - 4)
        c.line(72, bottom - 4, 108, bottom - 4, arrow=True)
    c.text(60, 270, "residual", anchor="end", size=11, fill=SOFT)
    c.text(60, 530, "residual", anchor="end", size=11, fill=SOFT)
    for i, (label, color) in enumerate((
        ("matrix product, weights", TEAL), ("small operation", SAND),
        ("the milestone's attend", CORAL), ("view or state", GREY),
    )):
        c.box(110 + i * 180, 624, 14, 14, color, INK)
        c.text(130 + i * 180, 636, label, size=12)
    c.save()


def recompute() -> None:
    """Which tokens each step computes, without and with a cache."""
    prompt, output, cell = 4, 5, 30
    c = Canvas("recompute", "Token computations per step, without and with a KV cache", 840, 330)
    for place, (name, cached) in enumerate((("m0: no cache", False), ("m1: KV cache", True))):
        left = 110 + place * 390
        c.text(left, 32, name, size=15, weight="bold")
        for token in range(prompt + output - 1):
            label = f"p{token}" if token < prompt else f"o{token - prompt}"
            c.text(left + token * cell + 14, 58, label, anchor="middle", size=11, fill=SOFT)
        total = 0
        for step in range(output):
            y, length = 66 + step * 40, prompt + step
            first = length - 1 if cached and step else 0
            for token in range(length):
                computed = token >= first
                fill = (CORAL if token < prompt else SAND) if computed else "none"
                c.box(left + token * cell, y, cell - 3, 28, fill, INK if computed else LINE, 3)
            total += length - first
            c.text(left + (prompt + output - 1) * cell + 8, y + 19, f"{length - first}", size=13)
            if place == 0:
                c.text(left - 14, y + 19, f"step {step}", anchor="end", size=12, fill=SOFT)
        formula = "4 + 5 + 6 + 7 + 8" if not cached else "4 + 1 + 1 + 1 + 1"
        c.text(left, 292, f"{formula} = {total} token computations", weight="bold")
    c.box(24, 306, 12, 12, CORAL, INK)
    c.text(42, 317, "prompt token computed", size=12)
    c.box(200, 306, 12, 12, SAND, INK)
    c.text(218, 317, "output token computed", size=12)
    c.box(376, 306, 12, 12, "none", LINE)
    c.text(394, 317, "keys and values read from the cache", size=12)
    c.save()


def kv_cache() -> None:
    """The contiguous cache: layers, slots, what is used and what is only reserved."""
    c = Canvas("kv_cache", "The contiguous KV cache of m1", 840, 320)
    c.text(24, 32, "m1's cache: keys and values, each [L, max_model_len, Hkv, D]", size=15,
           weight="bold")
    left, cell, slots, used = 120, 30, 20, 8
    for layer, name in enumerate(("layer 0", "layer 1", "…", "layer 29")):
        y = 62 + layer * 38
        c.text(left - 14, y + 20, name, anchor="end", size=12, fill=SOFT)
        if name == "…":
            continue
        for slot in range(slots):
            fill = CORAL if slot < 5 else SAND if slot < used - 1 else TEAL if slot < used else GREY
            c.box(left + slot * cell, y, cell - 3, 30, fill, INK if slot < used else LINE, 3)
    c.text(left + slots * cell + 8, 82, "… 8192", size=12, fill=SOFT)
    below = 62 + 4 * 38 + 8
    for x1, x2, label in ((0, 5, "prompt: written by prefill"), (8, 20, "reserved, empty")):
        c.line(left + x1 * cell, below, left + x2 * cell - 3, below, INK)
        c.text(left + (x1 + x2) * cell / 2, below + 17, label, anchor="middle", size=12)
    c.line(left + 7.4 * cell, below, left + 7.4 * cell, below + 26, INK)
    c.text(left + 7.4 * cell, below + 40, "slot `start`: the token of this decode step",
           anchor="middle", size=12)
    c.line(left, 48, left + used * cell - 3, 48, BLUE, 2)
    c.text(left + used * cell + 6, 52, "append returns [0, start + T): a view, nothing is copied",
           size=12, fill=BLUE)
    c.text(24, 300, "SmolLM2-135M, float32: a slot holds 2 x 3 x 64 numbers of 4 bytes in each of "
           "30 layers, 46,080 bytes a token", size=12, fill=SOFT)
    c.save()


def roofline() -> None:
    """Prefill and decode of Qwen3-0.6B in bf16 under the roof of an H200's data sheet."""
    bandwidth, peak = 4.8, 989.0  # TB/s, TFLOP/s
    c = Canvas("roofline", "Roofline of prefill and decode on an H200", 840, 470)
    c.text(24, 32, "Qwen3-0.6B, bfloat16, under an H200's data-sheet roof", size=15,
           weight="bold")
    left, right, top, bottom = 90, 800, 68, 400

    def at(intensity: float, tflops: float) -> tuple[float, float]:
        x = left + (math.log10(intensity) + 0.5) / 4.7 * (right - left)
        y = bottom - math.log10(tflops) / 3.4 * (bottom - top)
        return x, y

    for decade in range(5):
        x, _ = at(10**decade, 1)
        c.line(x, top, x, bottom, LINE, 0.8)
        c.text(x, bottom + 18, f"{10**decade:,}", anchor="middle", size=12, fill=SOFT)
    for decade in range(4):
        _, y = at(1, 10**decade)
        c.line(left, y, right, y, LINE, 0.8)
        c.text(left - 8, y + 4, f"{10**decade:,}", anchor="end", size=12, fill=SOFT)
    c.text((left + right) / 2, bottom + 40, "arithmetic intensity, FLOP per byte read from memory",
           anchor="middle", size=12)
    c.text(24, 54, "TFLOP/s at most", size=12, fill=SOFT)
    ridge = peak / bandwidth
    c.line(*at(10**-0.5, bandwidth * 10**-0.5), *at(ridge, peak), INK, 2.5)
    c.line(*at(ridge, peak), *at(10**4.2, peak), INK, 2.5)
    x, y = at(ridge, peak)
    c.line(x, y, x, bottom, SOFT, 1, dash="4 4")
    c.text(x + 6, bottom - 10, "ridge: 206 FLOP/byte", size=12, fill=SOFT)
    c.text(x + 10, y - 8, "989 TFLOP/s", size=12)
    x, y = at(8, 8 * bandwidth)
    c.text(x - 8, y - 14, "4.8 TB/s", size=12, anchor="end")
    for intensity, label, color, dx, dy in (
        (1.02, "decode, context 192: 4.9 TFLOP/s, 0.5 % of the peak", TEAL, 14, 12),
        (30.4, "64 decodes", BLUE, 14, 14),
        (95.3, "prefill 128", CORAL, -14, -2),
        (385, "512", CORAL, 0, 24),
        (1602, "2048", CORAL, 0, 24),
        (6996, "prefill 8192", CORAL, -6, 24),
    ):
        x, y = at(intensity, min(peak, bandwidth * intensity))
        c.dot(x, y, 6, color)
        anchor = "start" if dx > 0 else "end" if dx < -9 else "middle"
        c.text(x + dx, y + dy, label, size=12, anchor=anchor)
    c.text(24, 456, "Points are bounds computed from bytes and FLOPs, not measurements.", size=12,
           fill=SOFT)
    c.save()


def sampling() -> None:
    """What temperature and truncation do to a real distribution."""
    words = ["a", "the", "not", "forever", "ab", "painted", "indeed", "already"]
    ones = [0.3359, 0.0511, 0.0401, 0.0280, 0.0234, 0.0219, 0.0140, 0.0140]
    cold = [0.7262, 0.0493, 0.0348, 0.0209, 0.0162, 0.0147, 0.0078, 0.0078]
    c = Canvas("sampling", "Temperature and truncation on a real distribution", 840, 372)
    c.text(24, 32, "The eight likeliest tokens after “The sky is” (SmolLM2-135M, float32)", size=15,
           weight="bold")
    for place, (name, values, notes) in enumerate((
        ("temperature 1.0", ones,
         ["top_k 3 keeps 3 tokens, min_p 0.1 also 3,", "min_p 0.05 keeps 6, top_p 0.9 keeps 240"]),
        ("temperature 0.7", cold,
         ["top_k 3 keeps 3 tokens, min_p 0.1 only 1,", "min_p 0.05 keeps 2, top_p 0.9 keeps 12"]),
    )):
        left, base, width = 40 + place * 410, 270, 42
        c.text(left, 62, name, weight="bold")
        c.line(left, base, left + 8 * width, base, INK)
        limit = base - 0.1 * values[0] * 260
        for i, (word, value) in enumerate(zip(words, values, strict=True)):
            height = value * 260
            color = TEAL if i < 3 else SAND if value >= 0.05 * values[0] else GREY
            c.box(left + i * width + 3, base - height, width - 8, height, color, INK)
            above = min(base - height, limit)
            c.text(left + i * width + 20, above - 5, f"{value:.1%}", anchor="middle", size=10)
            c.text(left + i * width + 20, base + 15, word, anchor="middle", size=10)
        c.line(left, limit, left + 8 * width, limit, CORAL, 1.2, dash="5 4")
        c.text(left + 8 * width, limit - 22, "min_p 0.1 of the likeliest", anchor="end", size=11,
               fill=CORAL)
        for i, note in enumerate(notes):
            c.text(left, base + 44 + i * 18, note, size=12)
    c.box(24, 346, 12, 12, TEAL, INK)
    c.text(42, 357, "in top_k 3", size=12)
    c.box(140, 346, 12, 12, SAND, INK)
    c.text(158, 357, "at least 0.05 of the likeliest", size=12)
    c.box(356, 346, 12, 12, GREY, INK)
    c.text(374, 357, "below", size=12)
    c.save()


def timeline() -> None:
    """When a user sees tokens: TTFT, ITL, TPOT."""
    c = Canvas("timeline", "TTFT, ITL and TPOT of one request", 840, 200)
    left, y = 60, 92
    c.line(left, y + 26, 812, y + 26, INK, arrow=True)
    c.text(812, y + 46, "time", anchor="end", size=12, fill=SOFT)
    parts = [("queue", 90, GREY), ("prefill: T tokens, one step", 210, CORAL)]
    parts += [("decode", 62, TEAL)] * 6
    x, ends = left, []
    for name, width, color in parts:
        c.box(x, y, width - 3, 26, color, INK, 3)
        c.text(x + width / 2 - 2, y + 18, name, anchor="middle", size=11)
        x += width
        ends.append(x - 3)
    for i, end in enumerate(ends[1:], start=1):
        c.line(end, y + 26, end, y + 42, INK)
        c.text(end, y + 56, f"t{i}", anchor="middle", size=11)
    c.line(left, y + 26, left, y + 42, INK)
    c.text(left, y + 56, "arrival", anchor="middle", size=11)
    c.line(left, 58, ends[1], 58, CORAL, 2)
    c.text((left + ends[1]) / 2, 50, "TTFT = t1 − arrival", anchor="middle")
    c.line(ends[1], 58, ends[-1], 58, TEAL, 2)
    c.text((ends[1] + ends[-1]) / 2, 50, "TPOT = (tN − t1) / (N − 1); each gap is an ITL",
           anchor="middle")
    c.text(24, 184, "The first output token comes from the prefill step itself: N tokens need one "
           "prefill and N − 1 decode steps.", size=12, fill=SOFT)
    c.save()


if __name__ == "__main__":
    layer_shapes()
    recompute()
    kv_cache()
    roofline()
    sampling()
    timeline()

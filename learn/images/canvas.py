"""What the pictures of notes 3 to 7 are drawn with. Needs nothing but Python.

Every picture has a light panel of its own, so it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

INK, SOFT, PANEL, LINE = "#1d2433", "#5b6577", "#fbfbf8", "#c9ced8"
TEAL, SAND, CORAL, GREY, BLUE = "#2a9d8f", "#e9c46a", "#e76f51", "#d9dde4", "#7fa8d1"


class Canvas:
    """Collects shapes and writes ``<name>.svg`` beside this file; sizes are in pixels."""

    def __init__(self, name: str, title: str, width: int, height: int) -> None:
        self.path = Path(__file__).parent / f"{name}.svg"
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{INK}">',
            f"<title>{title}</title>",
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" '
            f'fill="{PANEL}" stroke="{LINE}"/>',
        ]
        self.text(24, 32, title, size=15, bold=True)

    def box(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = INK) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="2" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", size: float = 13,
        fill: str = INK, bold: bool = False, mono: bool = False,
    ) -> None:
        style = ' font-weight="bold"' if bold else ""
        style += ' font-family="Menlo, DejaVu Sans Mono, monospace"' if mono else ""
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{fill}"{style}>{text}</text>'
        )

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float = 1.4,
             dashed: bool = False) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dash}/>'
        )

    def dot(self, x: float, y: float, color: str) -> None:
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}"/>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, color: str = SOFT) -> None:
        angle = math.atan2(y2 - y1, x2 - x1)
        tips = [(x2 - 8 * math.cos(angle + t), y2 - 8 * math.sin(angle + t)) for t in (0.4, -0.4)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(x2, y2), *tips])
        self.line([(x1, y1), (x2, y2)], color)
        self._parts.append(f'<polygon points="{points}" fill="{color}"/>')

    def save(self) -> None:
        self.path.write_text("\n".join([*self._parts, "</svg>"]) + "\n", encoding="utf-8")

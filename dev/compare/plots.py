"""Plots as SVG text, in colours that the page or the reader's system chooses (light or dark).

matplotlib draws with placeholder colours; in the text they become CSS variables.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib.figure import Figure

# Placeholder colours: what they mean is in LIGHT and DARK.
INK, SOFT, PANEL, GRID = "#000001", "#000002", "#000003", "#000004"
LADDER, ACCENT, SERIES_2, SERIES_3 = "#000005", "#000006", "#000007", "#000008"
SERIES = (LADDER, ACCENT, SERIES_2, SERIES_3)
NAMES = {INK: "ink", SOFT: "soft", PANEL: "panel", GRID: "grid", LADDER: "c1", ACCENT: "c2",
         SERIES_2: "c3", SERIES_3: "c4"}
LIGHT = {"ink": "#1d2433", "soft": "#5b6577", "panel": "#fbfbf8", "grid": "#c9ced8",
         "c1": "#1d776c", "c2": "#b8452e", "c3": "#8a6700", "c4": "#3f6ea8"}
DARK = {"ink": "#e6e9f0", "soft": "#a3adbd", "panel": "#171b24", "grid": "#3a4252",
        "c1": "#4fc0b1", "c2": "#f08a6f", "c3": "#e9c46a", "c4": "#8fb8e8"}

_FONTS = "Helvetica, Arial, sans-serif"
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, and a screen reader can read it
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": SOFT,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
}


def new_figure(width: float, height: float, num_panels: int) -> tuple[Figure, list[Any]]:
    """A figure of so many inches with panels beside each other."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for panel in panels:
        panel.patch.set_visible(False)
        panel.tick_params(length=0)
        panel.spines["bottom"].set_visible(False)
    return figure, panels


def variables(colors: dict[str, str]) -> str:
    """CSS declarations of a palette."""
    return "".join(f"--{name}:{color};" for name, color in colors.items())


def inline_svg(figure: Figure, title: str, name: str) -> str:
    """An SVG element for a page that declares the variables.

    Args:
        title: what a screen reader says. name: makes ids unique on the page.
    """
    text = io.StringIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # would hold for the page
    svg = re.sub(r"font-family: [^;\"]*", f"font-family: {_FONTS}", svg)
    for color, variable in NAMES.items():
        svg = svg.replace(color, f"var(--{variable})")
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    head = f'<svg role="img" aria-label="{escape(title, quote=True)}"'
    lines = (line.rstrip() for line in svg.replace("<svg", head, 1).splitlines())
    return "\n".join(line for line in lines if line)


def standalone_svg(figure: Figure, title: str, description: str) -> str:
    """A file of its own: with a panel, and with both palettes."""
    svg = inline_svg(figure, title, "ladder")
    width, height = (float(x) for x in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    top = 34  # for the title
    style = (
        f"<style>svg{{{variables(LIGHT)}}}"
        f"@media (prefers-color-scheme: dark){{svg{{{variables(DARK)}}}}}</style>"
    )
    inner = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width + 24:.0f} {height + top + 12:.0f}" role="img" '
        f'aria-labelledby="title description">\n'
        f'<title id="title">{escape(title)}</title>\n'
        f'<desc id="description">{escape(description)}</desc>\n{style}\n'
        f'<rect x="0.5" y="0.5" width="{width + 23:.0f}" height="{height + top + 11:.0f}" rx="8" '
        'style="fill: var(--panel); stroke: var(--grid)"/>\n'
        f'<text x="18" y="26" style="font: bold 15px {_FONTS}; fill: var(--ink)">'
        f"{escape(title)}</text>\n"
        f'<g transform="translate(12 {top})">{inner}</g>\n</svg>\n'
    )


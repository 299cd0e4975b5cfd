"""Writes the page: one HTML file with everything in it, for any browser, with or without a network.

Its parts are in ``page/``: the document, the style, and the scripts in the order of ``SCRIPTS``
(each uses what stands before it).
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from dev.trace.page_data import page_data
from dev.trace.reader import Trace

PARTS = Path(__file__).parent / "page"
SCRIPTS = ("words", "model", "paint", "timeline", "blocks", "tree", "panels", "clock", "player",
           "view", "main")  # fmt: skip


def page(traces: Sequence[Trace]) -> str:
    """The page for one trace, or for two side by side.

    Raises:
        ValueError: a trace has no steps, so there is nothing to show.
    """
    for trace in traces:
        if not trace.frames:
            raise ValueError(f"{trace.path} has no steps: the engine was given nothing to do")
    names = " and ".join(trace.milestone for trace in traces)
    scripts = "\n".join(_part(f"{name}.js") for name in SCRIPTS)
    fields = {
        "title": html.escape(f"{names}, step by step"),
        "heading": html.escape(f"{names}, step by step"),
        "style": _part("style.css"),
        "data": "\n".join(_data(trace) for trace in traces),
        "script": f'"use strict";\n(() => {{\n{scripts}}})();',
    }
    text = _part("page.html")
    # From behind: what is put in is not looked at again.
    for name in ("script", "data", "style", "heading", "title"):
        text = text.replace("{{" + name + "}}", fields[name], 1)
    return text


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def _data(trace: Trace) -> str:
    """As JSON in a script element, where only ``</`` and ``<!--`` mean anything to HTML."""
    data = json.dumps(page_data(trace), ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    return f'<script type="application/json">{data}</script>'

"""Docstrings are read in an editor first, and are Markdown in two respects: an indented block of a
module's is code, and lines of the form ``name: what it is`` are a list.

reStructuredText wants marks for both. They would only be in the way there, so they are put in here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from operator import or_
from typing import Any

from sphinx.application import Sphinx

NAMED = re.compile(r"\w[\w, ]*: ")
INDENT = "    "


def mark(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put the marks in, in place; napoleon has turned sections like "Args:" into fields before."""
    if what == "module":
        lines[:] = _mark_code(lines)
    else:
        lines[:] = _mark_lists(lines)


def _mark_code(lines: list[str]) -> Iterator[str]:
    """``::`` before each indented block that has none."""
    is_code, last = False, ""
    for line in lines:
        if line.strip():
            begins = line.startswith(INDENT) and not is_code
            if begins and not last.endswith("::") and not last.startswith(("..", "- ", "* ")):
                yield from ("", "::", "")
            elif is_code and not line.startswith(INDENT):
                yield ""
            is_code, last = line.startswith(INDENT), line
        yield line


def _mark_lists(lines: list[str]) -> Iterator[str]:
    """Paragraphs of ``name: what it is``, with indented lines that go on, as lists."""
    for is_text, group in groupby(lines, key=lambda line: bool(line.strip())):
        paragraph = list(group)
        goes_on = [line.startswith(INDENT) for line in paragraph]
        named = [bool(NAMED.match(line)) for line in paragraph]
        if is_text and len(paragraph) > 1 and named[0] and all(map(or_, named, goes_on)):
            # What goes on is below the text of its entry, not deeper.
            yield from (
                f"- {line}" if begins else f"  {line.removeprefix(INDENT)}"
                for line, begins in zip(paragraph, named, strict=True)
            )
        else:
            yield from paragraph


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

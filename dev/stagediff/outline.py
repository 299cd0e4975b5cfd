"""What is in a file that is new: its functions and classes, each with its first sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dev.stagediff.notes import Section
from dev.stagediff.reading import FileChange
from dev.stagediff.units import CLASS

_SUMMARY = re.compile(r'^\s*[rR]?"""(.*?)(?:"""|$)')


@dataclass(frozen=True)
class Line:
    """``name`` is as in the file, without its class; ``depth`` counts the classes around it."""

    name: str
    kind: str
    depth: int
    number: int
    summary: str
    sections: tuple[Section, ...]


def outline(file: FileChange) -> list[Line]:
    """The definitions of an added or removed file, in order."""
    lines = []
    for unit in file.units:
        if not unit.name:
            continue
        sides = [row.new or row.old for row in unit.rows]
        if not sides:  # it has moved away
            continue
        number = next((n for n, text in sides if _defines(text, unit.kind)), sides[0][0])
        lines.append(
            Line(
                unit.name.rpartition(".")[2],
                unit.kind,
                unit.name.count("."),
                number,
                _summary([text for _, text in sides]),
                unit.sections,
            )
        )
    return lines


def _defines(text: str, kind: str) -> bool:
    words = ("class ",) if kind == CLASS else ("def ", "async def ")
    return text.lstrip().startswith(words)


def _summary(texts: list[str]) -> str:
    """The first line of its docstring; empty if it has none."""
    found = next((match[1] for text in texts if (match := _SUMMARY.match(text))), "")
    return found.strip()

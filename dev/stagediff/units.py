"""A file cut into what a reader thinks in: functions, methods, and what stands around them.

Every line belongs to exactly one unit. A function has the comments and blank lines directly above
it; a class has its own lines without its methods; the rest belongs to the module. So the docstring,
the imports and the constants of a file are one unit, wherever in the file they stand.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

MODULE, CLASS, FUNCTION = "module", "class", "function"

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = _Function | ast.ClassDef


@dataclass(frozen=True)
class Unit:
    """Some lines of a file.

    ``name`` is qualified (``Scheduler._decode``), and empty for the module. ``place`` tells units
    of one name apart (a property and its setter, overloads). ``numbers`` count from 1.
    """

    name: str
    kind: str
    place: int
    numbers: tuple[int, ...]
    lines: tuple[str, ...]

    @property
    def key(self) -> tuple[str, int]:
        """The same for the same unit of another version of the file."""
        return self.name, self.place

    @property
    def numbered(self) -> list[tuple[int, str]]:
        """The lines with their numbers."""
        return list(zip(self.numbers, self.lines, strict=True))


def split(path: str, text: str) -> list[Unit]:
    """The units of a file, by their first lines.

    What is not Python, or cannot be parsed, is one unit.
    """
    lines = text.splitlines()
    owner: list[tuple[str, str, int]] = [("", MODULE, 0)] * len(lines)
    if path.endswith(".py"):
        try:
            body = ast.parse(text).body
        except SyntaxError:  # somebody is working on it: its lines can be compared all the same
            body = []
        counts: dict[str, int] = {}
        for name, node in _definitions(body, ""):
            kind = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
            place = counts[name] = counts.get(name, -1) + 1
            first = _first_line(node, lines)
            owner[first - 1 : node.end_lineno] = [(name, kind, place)] * (
                node.end_lineno - first + 1
            )
    numbers: dict[tuple[str, str, int], list[int]] = {}
    for number, key in enumerate(owner, start=1):
        numbers.setdefault(key, []).append(number)
    return [
        Unit(name, kind, place, tuple(own), tuple(lines[number - 1] for number in own))
        for (name, kind, place), own in numbers.items()
    ]


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, _Definition]]:
    """Functions, classes and methods with their qualified names, outer ones first."""
    for node in body:
        if isinstance(node, _Definition):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            parts = [node.body, *(getattr(node, name, []) for name in ("orelse", "finalbody"))]
            parts += [handler.body for handler in getattr(node, "handlers", [])]
            for part in parts:
                yield from _definitions(part, prefix)


def _first_line(node: _Definition, lines: list[str]) -> int:
    """With decorators, the comments directly above, and the blank lines above these."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    indent = " " * node.col_offset
    while first > 1 and lines[first - 2].startswith(f"{indent}#"):
        first -= 1
    while first > 1 and not lines[first - 2].strip():
        first -= 1
    return first

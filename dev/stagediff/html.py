"""The reading as one page that needs nothing else: no network, no other file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dev.stagediff.highlight import DARK, LIGHT, Piece, lines_of, marked, shifted
from dev.stagediff.markdown import render_inline, render_section
from dev.stagediff.notes import Section
from dev.stagediff.outline import outline
from dev.stagediff.reading import FileChange, Reading, UnitChange
from dev.stagediff.rows import Row, hunks
from dev.stagediff.stages import REPOSITORY
from dev.stagediff.terminal import unified


def write_page(
    path: Path, reading: Reading, context: int, is_full: bool, root: Path = REPOSITORY
) -> None:
    """Write the page; its folder is made where need be.

    Args:
        context: unchanged lines around a change.
        is_full: whether files that are new or gone are unfolded at first.
        root: the repository; links to the notes lead there from the page's place.

    Raises:
        ValueError: ``path`` is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(reading, context, is_full, path.parent, root), encoding="utf-8")


def render(
    reading: Reading, context: int, is_full: bool, place: Path, root: Path = REPOSITORY
) -> str:
    """The page's text; ``place`` is the folder it will lie in."""
    environment = Environment(
        loader=PackageLoader("dev.stagediff", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = _Page(reading, context, place, root)
    return environment.get_template("page.html.jinja").render(
        page=page, reading=reading, is_full=is_full, light=LIGHT, dark=DARK
    )


class _Page:
    """What the template asks for."""

    def __init__(self, reading: Reading, context: int, place: Path, root: Path) -> None:
        self._reading = reading
        self._context = context
        self._place = place.resolve()
        self._root = root

    outline = staticmethod(outline)
    inline = staticmethod(render_inline)

    def id_of(self, path: str) -> str:
        """The anchor of a file."""
        return "file-" + path.replace("/", "-")

    def line_id(self, path: str, number: int) -> str:
        """The anchor of a line of a file that is shown whole."""
        return f"{self.id_of(path)}-{number}"

    def note_id(self, section: Section) -> str:
        """The anchor of a note's section on this page."""
        return f"note-{section.number}-{section.anchor}"

    def href(self, section: Section) -> str:
        """From the page to the section in the repository."""
        return f"{_relative(section.note, self._place)}#{section.anchor}"

    def note_text(self, section: Section) -> Markup:
        """The section's text; pictures are put into the page, links lead to the repository."""
        return render_section(section.text, section.note.parent, self._place)

    @cached_property
    def sections(self) -> list[Section]:
        """Every section that a file or unit refers to, in the order of the notes."""
        found: dict[tuple, Section] = {}
        for file in self._reading.differing:
            for section in [*file.sections, *(s for unit in file.units for s in unit.sections)]:
                found[section.number, section.line] = section
        return [found[key] for key in sorted(found)]

    def whole(self, file: FileChange) -> list[tuple[int, Markup]]:
        """Every line of a file in its newest version, with its number."""
        stages = (self._reading.new, self._reading.old)
        text = next(stage.files[file.path] for stage in stages if file.path in stage.files)
        lines = lines_of(file.path, text)[: len(text.splitlines())]
        return [(number, _html(line)) for number, line in enumerate(lines, start=1)]

    def hunks(self, unit: UnitChange) -> list[list[Row]]:
        """What of a unit is shown."""
        return hunks(unit.rows, self._context)

    def is_one_sided(self, hunk: Sequence[Row]) -> bool:
        """Whether there is nothing to put beside it."""
        return any(all(getattr(row, side) is None for row in hunk) for side in ("old", "new"))

    def side_by_side(self, file: FileChange, unit: UnitChange, hunk: Sequence[Row]) -> list[dict]:
        """The rows of a table with both versions beside each other."""
        return [
            {
                "is_equal": row.is_equal,
                "old": row.old and (row.old[0], self._old(file, unit, row)),
                "new": row.new and (row.new[0], self._new(file, row)),
            }
            for row in hunk
        ]

    def unified(self, file: FileChange, unit: UnitChange, hunk: Sequence[Row]) -> list[dict]:
        """The rows of a table with one column of code."""
        return [
            {
                "sign": {" ": "", "-": "−", "+": "+"}[sign],
                "kind": {" ": "equal", "-": "removed", "+": "added"}[sign],
                "old": row.old[0] if row.old and sign != "+" else "",
                "new": row.new[0] if row.new and sign != "-" else "",
                "code": self._old(file, unit, row) if sign == "-" else self._new(file, row),
            }
            for sign, row in unified(hunk)
        ]

    def _old(self, file: FileChange, unit: UnitChange, row: Row) -> Markup:
        path = unit.place.path if unit.place else file.path
        lines = lines_of(path, self._reading.old.files[path])
        number, text = row.old
        return _html(marked(shifted(lines[number - 1], text), row.old_spans))

    def _new(self, file: FileChange, row: Row) -> Markup:
        lines = lines_of(file.path, self._reading.new.files[file.path])
        number, text = row.new
        return _html(marked(shifted(lines[number - 1], text), row.new_spans))


def _html(pieces: Iterable[Piece]) -> Markup:
    """A line of code; kinds become classes, changed words ``<b>``."""
    parts = []
    for piece in pieces:
        text = escape(piece.text)
        if piece.kind:
            text = Markup('<i class="{}">{}</i>').format(piece.kind[:2], text)
        parts.append(Markup("<b>{}</b>").format(text) if piece.is_marked else text)
    return Markup("").join(parts)


def _relative(target: Path, place: Path) -> str:
    return Path(os.path.relpath(target, place)).as_posix()

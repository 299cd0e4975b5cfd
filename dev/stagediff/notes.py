"""The sections of the notes, and which of them explain a file or a function."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Sections about other engines name files of theirs, which are often called like ours.
_ABOUT_OTHERS = re.compile(r"How others do it|Sources|Interview questions", re.IGNORECASE)
_HEADING = re.compile(r"^(#{2,3}) (.+)$")
_CODE = re.compile(r"`([^`\n]+)`")
_DEFINITION = re.compile(r"^\s*(?:def|class) (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """A part of a note under a heading of its own; ``text`` is Markdown without the heading."""

    note: Path
    number: int  # of the note
    title: str
    parent: str  # the heading above, for one of the third level
    anchor: str
    line: int
    text: str

    @property
    def heading(self) -> str:
        """With the heading above it."""
        return f"{self.parent}: {self.title}" if self.parent else self.title

    @property
    def label(self) -> str:
        """``note 3, 4. Growth, and when the pool runs dry``."""
        return f"note {self.number}, {self.heading}"


def find_note(number: int, root: Path) -> Path | None:
    """The note of a milestone; m0 and m1 share the first one. None where there is none yet."""
    return next(iter(sorted((root / "learn").glob(f"{max(number, 1):02d}_*.md"))), None)


def read_sections(note: Path) -> list[Section]:
    """Every section of a note that is about this repository."""
    number = int(note.name[:2])
    sections, seen = [], dict[str, int]()
    parent, lines, is_code = "", note.read_text(encoding="utf-8").splitlines(), False
    starts: list[tuple[int, str, str, str]] = []  # line, title, parent, anchor
    for place, line in enumerate(lines):
        is_code ^= line.startswith("```")
        heading = None if is_code else _HEADING.match(line)
        if heading:
            title = heading[2].replace("`", "").strip()
            parent = parent if heading[1] == "###" else ""
            anchor = _anchor(title)
            seen[anchor] = count = seen.get(anchor, -1) + 1
            starts.append((place, title, parent, f"{anchor}-{count}" if count else anchor))
            parent = parent or title
    ends = [start[0] for start in starts[1:]] + [len(lines)]
    for (place, title, above, anchor), end in zip(starts, ends, strict=True):
        if not _ABOUT_OTHERS.search(above or title):
            text = "\n".join(lines[place + 1 : end]).strip()
            sections.append(Section(note, number, title, above, anchor, place + 1, text))
    return sections


def _anchor(title: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


class Notes:
    """Finds the sections that speak of a file or of a function."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self.sections = list(sections)
        self._named = [_names(section.text) for section in sections]

    def about_file(self, path: str, limit: int = 3) -> list[Section]:
        """Sections that name a file, those that name it most often first."""
        spellings = {path, path.rpartition("/")[2]}
        scores = [sum(names.get(name, 0) for name in spellings) for names in self._named]
        return self._best(scores, limit)

    def about_unit(self, path: str, name: str, is_unique: bool, limit: int = 2) -> list[Section]:
        """Sections that name a function or class.

        Args:
            path: the file it is in.
            name: its qualified name.
            is_unique: whether no other unit of the reading has the same name without its class; if
                one has, a section must also name the class or the file to be about this one.
        """
        owner, _, bare = name.rpartition(".")
        scores = []
        for names in self._named:
            score = 3 * names.get(name, 0) if owner else 0
            beside = names.get(path, 0) or (owner and names.get(owner, 0))
            if is_unique or beside:
                score += names.get(bare, 0)
            scores.append(score)
        return self._best(scores, limit)

    def _best(self, scores: Sequence[int], limit: int) -> list[Section]:
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:limit]
        return [self.sections[i] for i in order if scores[i] > 0]


def _names(text: str) -> dict[str, int]:
    """How often a text names something, by name: in backticks, or as a definition in a listing."""
    counts: dict[str, int] = {}
    for name in _all_names(text):
        counts[name] = counts.get(name, 0) + 1
    return counts


def _all_names(text: str) -> Iterator[str]:
    listings = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    yield from (name for listing in listings for name in _DEFINITION.findall(listing))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in _CODE.findall(prose):
        name = re.sub(r"^m\d_\w+/", "", code.removesuffix("()"))
        if re.fullmatch(r"[\w./]+", name):
            yield name

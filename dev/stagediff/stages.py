"""The milestones as folders: their names, their files, and what their READMEs say of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

ADDED, CHANGED, CARRIED, REMOVED = "added", "changed", "carried", "removed"

_SECTION = r"^## {}$\n(.*?)(?=^## |\Z)"
_BULLET = re.compile(r"^- (added|changed|carried|removed) `([^`]+)`(?:: (\S.*))?$", re.MULTILINE)
_ITEM = re.compile(r"^(\d+)\. (.*(?:\n(?!\d+\. |\n).+)*)", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """A bullet of a README's section "Files"; ``reason`` is empty where none is given."""

    change: str
    reason: str


@dataclass(frozen=True)
class ReadingStep:
    """An item of a README's section "What to read", as Markdown on one line."""

    number: int
    text: str

    @property
    def names(self) -> list[str]:
        """What stands in backticks: files, functions, folders."""
        return re.findall(r"`([^`]+)`", self.text)


@dataclass(frozen=True)
class Readme:
    """What a milestone says of itself."""

    title: str
    reading: tuple[ReadingStep, ...]
    entries: dict[str, Entry]

    @classmethod
    def parse(cls, text: str) -> Readme:
        """Read a README.md; a section that is not there is empty."""
        reading = _section(text, "What to read")
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        return cls(
            title[1] if title else "",
            tuple(
                ReadingStep(int(number), " ".join(item.split()))
                for number, item in _ITEM.findall(reading)
            ),
            {
                name: Entry(change, reason)
                for change, name, reason in _BULLET.findall(_section(text, "Files"))
            },
        )


def _section(text: str, heading: str) -> str:
    found = re.search(_SECTION.format(re.escape(heading)), text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


@dataclass(frozen=True)
class Stage:
    """One milestone's folder."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder's name: ``m3_paged``."""
        return self.folder.name

    @property
    def short(self) -> str:
        """``m3``."""
        return self.name.split("_")[0]

    @cached_property
    def files(self) -> dict[str, str]:
        """The text of every file but the README, by its path in the folder.

        Raises:
            ValueError: a file that is not text in UTF-8.
        """
        texts = {}
        for path in sorted(self.folder.rglob("*")):
            hidden = path.name.startswith(".") or "__pycache__" in path.parts
            if path.is_file() and not hidden and path.name != "README.md":
                try:
                    text = path.read_bytes().decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path} is not text in UTF-8: {error}") from None
                texts[path.relative_to(self.folder).as_posix()] = text
        return texts

    @cached_property
    def readme(self) -> Readme:
        """What its README.md says; empty where there is none."""
        path = self.folder / "README.md"
        return Readme.parse(path.read_text(encoding="utf-8") if path.is_file() else "")


def find_stages(root: Path = REPOSITORY) -> list[Stage]:
    """All milestones, in order: the folders ``mN_x`` that can be imported."""
    return [Stage(path.parent) for path in sorted(root.glob("m[0-9]_*/__init__.py"))]


def find_stage(name: str, stages: Sequence[Stage]) -> Stage:
    """The milestone of a name: ``m3_paged``, ``m3`` or ``3``; a slash behind it is allowed.

    Raises:
        ValueError: there is none of that name.
    """
    wanted = name.rstrip("/")
    for stage in stages:
        if wanted in (stage.name, stage.short, stage.short[1:]):
            return stage
    known = ", ".join(stage.name for stage in stages) or "none here"
    raise ValueError(f"there is no milestone {name!r}; there are: {known} (m3 is short enough)")


def classify(old: Stage | None, new: Stage) -> dict[str, str]:
    """What each file is with respect to the older milestone; without one all are added."""
    before = old.files if old else {}
    changes = {name: REMOVED for name in before if name not in new.files}
    for name, text in new.files.items():
        if name not in before:
            changes[name] = ADDED
        else:
            changes[name] = CARRIED if before[name] == text else CHANGED
    return changes

"""The reading itself: which files in which order, what changed in each, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from dev.stagediff import moves
from dev.stagediff.notes import Notes, Section, find_note, read_sections
from dev.stagediff.rows import Row, Size, compare
from dev.stagediff.stages import (
    ADDED,
    CARRIED,
    CHANGED,
    REMOVED,
    REPOSITORY,
    ReadingStep,
    Stage,
    classify,
)
from dev.stagediff.units import FUNCTION, Unit, split

MOVED = "moved"


@dataclass(frozen=True)
class Place:
    """Where a unit is or was."""

    path: str
    name: str


@dataclass(frozen=True)
class UnitChange:
    """A unit of a file, in both versions.

    ``change`` is also "moved": it was at ``place`` before, or (in the file where it was) is there
    now and has no rows here. A method whose class got another name has a ``place`` too.
    """

    name: str
    kind: str
    change: str
    rows: tuple[Row, ...]
    place: Place | None = None
    sections: tuple[Section, ...] = ()

    @cached_property
    def size(self) -> Size:
        return Size.of(self.rows)

    @property
    def is_shown(self) -> bool:
        """Whether there is anything to see: a change of blank lines alone is not."""
        return self.change == MOVED or any(row.is_visible_change for row in self.rows)


@dataclass(frozen=True)
class Reason:
    """What a milestone's README says of a file."""

    stage: str
    change: str
    text: str


@dataclass(frozen=True)
class FileChange:
    """A file in the reading. ``steps`` are the items of "What to read" that name it."""

    path: str
    change: str
    reasons: tuple[Reason, ...]
    units: tuple[UnitChange, ...]
    steps: tuple[ReadingStep, ...] = ()
    sections: tuple[Section, ...] = ()

    @cached_property
    def size(self) -> Size:
        """Lines; what a function that moved here brought with it counts as carried."""
        return sum((unit.size for unit in self.units), Size())

    @property
    def shown_units(self) -> list[UnitChange]:
        return [unit for unit in self.units if unit.is_shown]


@dataclass(frozen=True)
class Reading:
    """Two milestones and all that lies between them; ``files`` are in reading order."""

    old: Stage
    new: Stage
    files: tuple[FileChange, ...]
    notes: tuple[Path, ...] = field(default=())

    @property
    def carried(self) -> list[FileChange]:
        return [file for file in self.files if file.change == CARRIED]

    @property
    def differing(self) -> list[FileChange]:
        """All but those."""
        return [file for file in self.files if file.change != CARRIED]

    @property
    def size(self) -> Size:
        return sum((file.size for file in self.files), Size())

    def only(self, names: Sequence[str]) -> Reading:
        """The same with some files only, in their order here.

        Raises:
            ValueError: a name that no file has, or that several have.
        """
        chosen = {self._find(name).path for name in names}
        return replace(self, files=tuple(file for file in self.files if file.path in chosen))

    def _find(self, name: str) -> FileChange:
        wanted = name.removeprefix("./")
        for stage in (self.old, self.new):
            wanted = wanted.removeprefix(f"{stage.name}/")
        for ending in (wanted, f"/{wanted}"):
            found = [
                file
                for file in self.files
                if (file.path == ending if ending == wanted else file.path.endswith(ending))
            ]
            if len(found) == 1:
                return found[0]
            if found:
                several = ", ".join(file.path for file in found)
                raise ValueError(f"{name!r} may be {several}: write more of the path")
        known = ", ".join(file.path for file in self.files)
        raise ValueError(
            f"neither {self.old.name} nor {self.new.name} has a file {name!r}; there are: {known}"
        )


def read(old: Stage, new: Stage, stages: Sequence[Stage], root: Path = REPOSITORY) -> Reading:
    """Compare two milestones.

    Args:
        stages: all milestones in order; those between the two say why a file changed.
        root: the folder with ``learn/``, where the notes are.

    Raises:
        ValueError: ``old`` does not come before ``new``.
    """
    first, last = stages.index(old), stages.index(new)
    if first == last:
        raise ValueError(f"{old.name} and {new.name} are the same milestone: name two")
    if first > last:
        raise ValueError(
            f"{old.name} comes after {new.name}; the older one goes first: {new.short} {old.short}"
        )
    way = list(stages[first + 1 : last + 1])
    found = [find_note(int(stage.short[1:]), root) for stage in way]
    note_paths = tuple(dict.fromkeys(path for path in found if path))
    notes = Notes([section for path in note_paths for section in read_sections(path)])

    changes = classify(old, new)
    units = _with_moves(
        {
            path: _unit_changes(path, old.files.get(path), new.files.get(path))
            for path in changes
        }
    )
    bare_names = Counter(
        unit.name.rpartition(".")[2] for path in units for unit in units[path] if unit.name
    )
    files = []
    for path, change in changes.items():
        explained = tuple(
            replace(unit, sections=tuple(_sections(notes, path, unit, bare_names)))
            for unit in units[path]
        )
        sections = _file_sections(notes, path, explained) if change != CARRIED else ()
        files.append(FileChange(path, change, _reasons(path, way), explained, sections=sections))
    return Reading(old, new, tuple(_in_reading_order(files, way)), note_paths)


def _sections(
    notes: Notes, path: str, unit: UnitChange, bare_names: Counter[str]
) -> list[Section]:
    bare = unit.name.rpartition(".")[2]
    if not unit.name or unit.change == CARRIED or bare.startswith("__"):
        return []
    return notes.about_unit(path, unit.name, is_unique=bare_names[bare] == 1)


def _file_sections(
    notes: Notes, path: str, units: Sequence[UnitChange]
) -> tuple[Section, ...]:
    """Those that name the file; if none does, those that most of its units are explained in."""
    named = notes.about_file(path)
    counts = Counter(section for unit in units for section in unit.sections)
    return tuple(named or [section for section, _ in counts.most_common(2)])


def _reasons(path: str, way: Sequence[Stage]) -> tuple[Reason, ...]:
    """What the READMEs on the way say of a file, oldest first."""
    reasons = []
    for stage in way:
        entry = stage.readme.entries.get(path)
        if entry and (entry.reason or entry.change == REMOVED):
            reasons.append(Reason(stage.short, entry.change, entry.reason))
    return tuple(reasons)


def _unit_changes(path: str, old_text: str | None, new_text: str | None) -> list[UnitChange]:
    """The units of both versions: in the newer one's order, each removed one where it was."""
    before, after = split(path, old_text or ""), split(path, new_text or "")
    renamed = moves.renamed_classes([u.name for u in before], [u.name for u in after])
    old = {(_renamed(unit.name, renamed), unit.place): unit for unit in before}
    new = {unit.key: unit for unit in after}
    order: list[tuple[str, int]] = list(new)
    previous: tuple[str, int] | None = None
    for key in old:
        if key not in new:
            order.insert(order.index(previous) + 1 if previous else 0, key)
        previous = key
    return [_unit_change(path, old.get(key), new.get(key)) for key in order]


def _renamed(name: str, classes: dict[str, str]) -> str:
    """A qualified name after its class, or the class itself, got another name."""
    if name in classes:
        return classes[name]
    owner, dot, bare = name.rpartition(".")
    return f"{classes.get(owner, owner)}{dot}{bare}"


def _unit_change(path: str, old: Unit | None, new: Unit | None) -> UnitChange:
    if old and new:
        rows = compare(old.numbered, new.numbered)
        change = CARRIED if all(row.is_equal for row in rows) else CHANGED
        place = None if old.name == new.name else Place(path, old.name)
        return UnitChange(new.name, new.kind, change, tuple(rows), place)
    if new:
        rows = [Row(None, line) for line in new.numbered]
        return UnitChange(new.name, new.kind, ADDED, tuple(rows))
    rows = [Row(line, None) for line in old.numbered]
    return UnitChange(old.name, old.kind, REMOVED, tuple(rows))


def _with_moves(units: dict[str, list[UnitChange]]) -> dict[str, list[UnitChange]]:
    """A function that is removed here and added there, and much the same, has moved."""
    gone, come = (
        [
            (path, i)
            for path in units
            for i, unit in enumerate(units[path])
            if unit.change == change and unit.kind == FUNCTION
        ]
        for change in (REMOVED, ADDED)
    )
    found = moves.pair(
        [moves.Candidate(units[path][i].name, _side(units[path][i], "old")) for path, i in gone],
        [moves.Candidate(units[path][i].name, _side(units[path][i], "new")) for path, i in come],
    )
    result = {path: list(changes) for path, changes in units.items()}
    for gone_at, come_at in found:
        (source, i), (target, j) = gone[gone_at], come[come_at]
        old, new = units[source][i], units[target][j]
        rows = moves.compare_moved(
            [row.old for row in old.rows if row.old], [row.new for row in new.rows if row.new]
        )
        result[target][j] = replace(
            new, change=MOVED, rows=tuple(rows), place=Place(source, old.name)
        )
        result[source][i] = replace(old, change=MOVED, rows=(), place=Place(target, new.name))
    return result


def _side(unit: UnitChange, side: str) -> list[str]:
    return [line[1] for row in unit.rows if (line := getattr(row, side))]


def _in_reading_order(files: Sequence[FileChange], way: Sequence[Stage]) -> list[FileChange]:
    """As "What to read" of the newest README names them, then of the one before; then the rest:
    what changed, what is new, what is gone, what is the same."""
    order: dict[str, list[ReadingStep]] = {}
    for stage in reversed(way):
        for step in stage.readme.reading:
            for path in _files_named(step, files):
                steps = order.setdefault(path, [])
                if stage is way[-1]:
                    steps.append(step)
    places = {path: place for place, path in enumerate(order)}
    kinds = (CHANGED, ADDED, REMOVED, CARRIED)

    def rank(file: FileChange) -> tuple:
        is_carried = file.change == CARRIED
        place = places.get(file.path, len(places))
        named_later = file.path.endswith("__init__.py")  # names the milestone, most of the time
        return is_carried, place, named_later, kinds.index(file.change), file.path

    return [
        replace(file, steps=tuple(order.get(file.path, ()))) for file in sorted(files, key=rank)
    ]


def full_path(name: str, paths: Sequence[str]) -> str | None:
    """The path that a README means: itself, or the only one that ends with it."""
    if name in paths:
        return name
    ending = [path for path in paths if path.endswith(f"/{name}")]
    return ending[0] if len(ending) == 1 else None


def _files_named(step: ReadingStep, files: Sequence[FileChange]) -> list[str]:
    """The files that an item names; if it names none, those of the functions it names."""
    paths = [file.path for file in files]
    named = [path for name in step.names if (path := full_path(name, paths))]
    if named:
        return named
    functions = {re.sub(r"\(.*", "", name) for name in step.names}
    return [
        file.path
        for file in files
        for unit in file.units
        if unit.change != CARRIED and {unit.name, unit.name.rpartition(".")[2]} & functions
    ]

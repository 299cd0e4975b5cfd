"""Functions that went elsewhere: into another file, another class, or under another name."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dev.stagediff.rows import Numbered, Row, changed_words, compare

# Lines in common, as a share of both functions: with the same name, and with another.
_SAME_NAME, _OTHER_NAME = 0.5, 0.7
_MIN_LINES = 6  # a shorter function is like many others


@dataclass(frozen=True)
class Candidate:
    """A function that is only in one of the versions: its qualified name and its lines."""

    name: str
    lines: list[str]

    @property
    def bare_name(self) -> str:
        return self.name.rpartition(".")[2]


def pair(gone: Sequence[Candidate], come: Sequence[Candidate]) -> list[tuple[int, int]]:
    """Which function of ``gone`` is which of ``come``, by their places; the most alike first."""
    ours, theirs = ([_bag(candidate) for candidate in side] for side in (gone, come))
    scores = []
    for i, old in enumerate(gone):
        for j, new in enumerate(come):
            is_same = old.bare_name == new.bare_name and not old.bare_name.startswith("__")
            alike = 2 * (ours[i] & theirs[j]).total() / (ours[i].total() + theirs[j].total())
            short = min(ours[i].total(), theirs[j].total())
            needed = _SAME_NAME if is_same else _OTHER_NAME
            if alike >= needed and short >= _MIN_LINES:
                scores.append((alike + is_same, i, j))
    found: list[tuple[int, int]] = []
    for _, i, j in sorted(scores, key=lambda score: (-score[0], score[1:])):
        if not any(i == a or j == b for a, b in found):
            found.append((i, j))
    return found


def renamed_classes(old: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Which class of a file goes on under another name, from the qualified names of both versions.

    A class that is gone is the new one that has most of its methods, two of them at least.
    """
    ours, theirs = _methods(old), _methods(new)
    scores = [
        (len(ours[gone] & theirs[come]), gone, come)
        for gone in ours
        for come in theirs
        if gone not in theirs and come not in ours and len(ours[gone] & theirs[come]) >= 2
    ]
    found: dict[str, str] = {}
    for _, gone, come in sorted(scores, key=lambda score: (-score[0], *score[1:])):
        if gone not in found and come not in found.values():
            found[gone] = come
    return found


def _methods(names: Sequence[str]) -> dict[str, set[str]]:
    methods: dict[str, set[str]] = {}
    for owner, _, bare in (name.rpartition(".") for name in names):
        if owner:
            methods.setdefault(owner, set()).add(bare)
    return methods


def _bag(candidate: Candidate) -> Counter[str]:
    """Its lines without indentation, order and blank ones; never empty: there is a ``def``."""
    return Counter(line.strip() for line in candidate.lines if line.strip())


def compare_moved(old: Sequence[Numbered], new: Sequence[Numbered]) -> list[Row]:
    """The rows of a function that moved; how deep it is indented is no difference."""
    depths = [_depth(side) for side in (old, new)]
    flat = [
        [(number, text[depth:]) for number, text in side]
        for side, depth in zip((old, new), depths, strict=True)
    ]
    rows = compare(*flat)
    if depths[0] == depths[1]:
        pads = (" " * depths[0], " " * depths[1])
    else:
        pads = (" " * depths[1], " " * depths[1])
    return [_indented(row, pads) for row in rows]


def _depth(side: Sequence[Numbered]) -> int:
    text = "\n".join(line for _, line in side)
    flat = textwrap.dedent(text).split("\n")
    return max((len(line) - len(short) for (_, line), short in zip(side, flat, strict=True)
                if line.strip()), default=0)


def _indented(row: Row, pads: tuple[str, str]) -> Row:
    def put(side: Numbered | None, pad: str) -> Numbered | None:
        return side and (side[0], pad + side[1] if side[1] else "")

    old, new = put(row.old, pads[0]), put(row.new, pads[1])
    if old and new and old[1] != new[1]:
        return Row(old, new, *changed_words(old[1], new[1]))
    return Row(old, new)

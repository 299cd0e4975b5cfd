"""Two versions of some lines beside each other: rows, their hunks, and the words that changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest

Span = tuple[int, int]
Numbered = tuple[int, str]  # a line and its number, from 1

_TOKEN = re.compile(r"\w+|\s+|.", re.DOTALL)
_WORD = re.compile(r"\w+|[^\w\s]")

# Lines less alike than this are one removed and one added, not one changed. Of common tokens.
_ALIKE = 0.5
# Pairing compares every removed line of a block with every added one.
_MAX_PAIRS = 20_000


@dataclass(frozen=True)
class Row:
    """A line in both versions, or in one of them: then the other side is None.

    Both sides with different texts are two lines beside each other. If one became the other, the
    spans are the characters that the other has not.
    """

    old: Numbered | None
    new: Numbered | None
    old_spans: tuple[Span, ...] = ()
    new_spans: tuple[Span, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether both sides have the same text."""
        return self.old is not None and self.new is not None and self.old[1] == self.new[1]

    @property
    def is_visible_change(self) -> bool:
        """Whether it differs in more than blank lines."""
        sides = [side for side in (self.old, self.new) if side is not None]
        return not self.is_equal and any(text.strip() for _, text in sides)


@dataclass(frozen=True)
class Size:
    """Lines of a difference. A changed line is one added and one removed."""

    added: int = 0
    removed: int = 0
    carried: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            self.added + other.added, self.removed + other.removed, self.carried + other.carried
        )

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Size:
        """Count rows."""
        carried = sum(row.is_equal for row in rows)
        return cls(
            sum(row.new is not None for row in rows) - carried,
            sum(row.old is not None for row in rows) - carried,
            carried,
        )


def compare(old: Sequence[Numbered], new: Sequence[Numbered]) -> list[Row]:
    """The rows of two versions, in the order of both.

    Blank lines and lines without a letter anchor nothing: otherwise two unlike functions would be
    held together by their brackets.
    """
    matcher = SequenceMatcher(
        lambda text: not re.search(r"\w", text),
        [text for _, text in old],
        [text for _, text in new],
        autojunk=False,
    )
    rows: list[Row] = []
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            rows += map(Row, old[i:i_end], new[j:j_end])
        else:
            rows += _changed(old[i:i_end], new[j:j_end])
    return rows


def _changed(old: Sequence[Numbered], new: Sequence[Numbered]) -> Iterator[Row]:
    """Rows of a block that differs.

    Lines that are alike stand beside each other with the words that changed, the others as they
    come.
    """
    i = j = 0
    for i_pair, j_pair in [*_pairs(old, new), (len(old), len(new))]:
        yield from (Row(*sides) for sides in zip_longest(old[i:i_pair], new[j:j_pair]))
        if i_pair < len(old):
            one, other = old[i_pair], new[j_pair]
            yield Row(one, other, *changed_words(one[1], other[1]))
        i, j = i_pair + 1, j_pair + 1


def _pairs(old: Sequence[Numbered], new: Sequence[Numbered]) -> list[tuple[int, int]]:
    """Which removed line became which added one: the pairing, in order, of most likeness."""
    if not 0 < len(old) * len(new) <= _MAX_PAIRS:
        return []
    ours, theirs = ([Counter(_WORD.findall(text)) for _, text in side] for side in (old, new))
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]
    likeness = [[_likeness(a, b) for b in theirs] for a in ours]
    for i in range(len(old) - 1, -1, -1):
        for j in range(len(new) - 1, -1, -1):
            best[i][j] = max(best[i + 1][j], best[i][j + 1])
            if likeness[i][j] >= _ALIKE:
                best[i][j] = max(best[i][j], likeness[i][j] + best[i + 1][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        if likeness[i][j] >= _ALIKE and best[i][j] == likeness[i][j] + best[i + 1][j + 1]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _likeness(a: Counter[str], b: Counter[str]) -> float:
    """Tokens in common, as a share of both lines (Dice); two blank lines are alike."""
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def changed_words(old: str, new: str) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """The characters of two versions of a line that the other has not, by whole words."""
    ours, theirs = _TOKEN.findall(old), _TOKEN.findall(new)
    spans: tuple[list[Span], list[Span]] = ([], [])
    matcher = SequenceMatcher(str.isspace, ours, theirs, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag != "equal":
            for own, tokens, first, end in ((0, ours, i, i_end), (1, theirs, j, j_end)):
                start = sum(map(len, tokens[:first]))
                length = sum(map(len, tokens[first:end]))
                if length:
                    spans[own].append((start, start + length))
    return tuple(spans[0]), tuple(spans[1])


def hunks(rows: Sequence[Row], context: int) -> list[list[Row]]:
    """The rows near a visible change, in runs; blank lines at a run's ends are left out.

    Where line numbers jump, because another unit stands in between, a run ends.
    """
    return [_trimmed(run) for part in _contiguous(rows) for run in _near_changes(part, context)]


def _contiguous(rows: Sequence[Row]) -> list[list[Row]]:
    parts: list[list[Row]] = [[]]
    old = new = None  # the last number on each side
    for row in rows:
        jumps = (old and row.old and row.old[0] > old + 1) or (
            new and row.new and row.new[0] > new + 1
        )
        if jumps:
            parts.append([])
            old = new = None
        old, new = row.old[0] if row.old else old, row.new[0] if row.new else new
        parts[-1].append(row)
    return parts


def _near_changes(rows: Sequence[Row], context: int) -> list[list[Row]]:
    near = [False] * len(rows)
    for i, row in enumerate(rows):
        if row.is_visible_change:
            first, end = max(i - context, 0), i + context + 1
            near[first:end] = [True] * len(near[first:end])
    runs: list[list[Row]] = []
    for i, row in enumerate(rows):
        if near[i]:
            if not i or not near[i - 1]:
                runs.append([])
            runs[-1].append(row)
    return runs


def _trimmed(run: list[Row]) -> list[Row]:
    def is_blank(row: Row) -> bool:
        return not any(side and side[1].strip() for side in (row.old, row.new))

    first = next(i for i, row in enumerate(run) if not is_blank(row))
    last = next(i for i, row in enumerate(reversed(run)) if not is_blank(row))
    return run[first : len(run) - last]

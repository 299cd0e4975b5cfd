"""Source lines in a few kinds of tokens, and the colours both outputs give them.

Pygments knows a hundred kinds; a reader needs eight. Every text colour has a contrast of at least
4.5 to 1 (WCAG 2, level AA) on each background that it can stand on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from pygments.lexers import get_lexer_for_filename
from pygments.lexers.special import TextLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String
from pygments.util import ClassNotFound

from dev.stagediff.rows import Span

# The first that a token belongs to counts.
_KINDS: tuple[tuple[tuple, str], ...] = (
    (String.Doc, "doc"),
    (String, "string"),
    (Comment.Preproc, "keyword"),
    (Comment, "doc"),
    (Keyword, "keyword"),
    (Operator.Word, "keyword"),
    (Number, "number"),
    (Name.Function, "name"),
    (Name.Class, "name"),
    (Name.Decorator, "decorator"),
    (Name.Builtin, "builtin"),
)


@dataclass(frozen=True)
class Piece:
    """Some characters of one kind; ``kind`` is empty for plain text."""

    text: str
    kind: str
    is_marked: bool = False


@dataclass(frozen=True)
class Palette:
    """Colours by kind ("text" is plain), and the backgrounds of lines and of changed words."""

    text: dict[str, str]
    page: str
    added: str
    removed: str
    added_word: str
    removed_word: str

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """All that code can stand on."""
        return self.page, self.added, self.removed, self.added_word, self.removed_word


LIGHT = Palette(
    {
        "text": "#1f2328", "doc": "#505a64", "string": "#0a3f7a", "keyword": "#9c1a25",
        "number": "#0b4a8f", "name": "#5a2c9e", "decorator": "#5a2c9e", "builtin": "#7a3200",
    },
    page="#ffffff", added="#e6ffec", removed="#ffebe9", added_word="#aceebb",
    removed_word="#ffcecb",
)  # fmt: skip
DARK = Palette(
    {
        "text": "#e6edf3", "doc": "#bac3cc", "string": "#b6dcff", "keyword": "#ffb0a8",
        "number": "#a5d6ff", "name": "#dcc5ff", "decorator": "#dcc5ff", "builtin": "#ffca94",
    },
    page="#0d1117", added="#12261e", removed="#2d1719", added_word="#1b5530",
    removed_word="#732529",
)  # fmt: skip


@cache
def lines_of(path: str, text: str) -> tuple[tuple[Piece, ...], ...]:
    """Every line of a file as pieces, without line ends."""
    try:
        lexer = get_lexer_for_filename(path, stripnl=False, ensurenl=False)
    except ClassNotFound:
        lexer = TextLexer(stripnl=False, ensurenl=False)
    lines: list[list[Piece]] = [[]]
    for token, value in lexer.get_tokens(text):
        for place, part in enumerate(value.split("\n")):
            if place:
                lines.append([])
            if part:
                lines[-1].append(Piece(part, _kind(token)))
    return tuple(map(tuple, lines))


def _kind(token: tuple) -> str:
    return next((kind for wide, kind in _KINDS if token in wide), "")


def shifted(line: Sequence[Piece], text: str) -> list[Piece]:
    """The pieces of a line as it stands in ``text``, which may be indented more or less."""
    bare = "".join(piece.text for piece in line)
    depth = len(bare) - len(bare.lstrip())
    wanted = len(text) - len(text.lstrip())
    pieces = [Piece(text[:wanted], "")] if wanted else []
    for piece in line:
        rest = piece.text[depth:]
        depth = max(depth - len(piece.text), 0)
        if rest:
            pieces.append(Piece(rest, piece.kind))
    return pieces


def marked(line: Sequence[Piece], spans: Sequence[Span]) -> Iterator[Piece]:
    """The pieces of a line, cut where a changed word begins and ends."""
    edges = sorted({edge for span in spans for edge in span})
    at = 0
    for piece in line:
        end = at + len(piece.text)
        cuts = [at, *(edge for edge in edges if at < edge < end), end]
        for first, last in pairwise(cuts):
            is_marked = any(start <= first and last <= stop for start, stop in spans)
            yield Piece(piece.text[first - at : last - at], piece.kind, is_marked)
        at = end


def contrast(one: str, other: str) -> float:
    """Between two colours ``#rrggbb``, as WCAG 2 defines it: 1 to 21."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

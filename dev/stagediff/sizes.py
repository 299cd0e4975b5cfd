"""How large a step is: files, lines, and lines of code without comments and docstrings."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pygments.lexers import get_lexer_for_filename
from pygments.token import Comment, String, Whitespace
from pygments.util import ClassNotFound

from dev.stagediff.reading import Reading, read
from dev.stagediff.rows import Size
from dev.stagediff.stages import REPOSITORY, Stage, classify

_NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


@dataclass(frozen=True)
class StepSize:
    """A step of the ladder. ``old`` is None for the first milestone, where everything is added."""

    old: Stage | None
    new: Stage
    files: Counter[str]  # by "added", "changed", "carried", "removed"
    lines: Size
    total_lines: int  # of the newer milestone
    total_code: int
    code_gained: int  # against the older one


def step_sizes(stages: Sequence[Stage], root: Path = REPOSITORY) -> list[StepSize]:
    """The size of every step, from the first milestone on."""
    sizes = []
    for old, new in zip([None, *stages], stages, strict=False):
        total = sum(len(text.splitlines()) for text in new.files.values())
        lines = read(old, new, stages, root).size if old else Size(added=total)
        code = code_of(new)
        sizes.append(
            StepSize(
                old,
                new,
                Counter(classify(old, new).values()),
                lines,
                total,
                code,
                code - code_of(old) if old else code,
            )
        )
    return sizes


def code_of(stage: Stage) -> int:
    """Lines of code of a whole milestone."""
    return sum(code_lines(path, text) for path, text in stage.files.items())


def code_gained(reading: Reading, path: str) -> int:
    """Lines of code that a file has more than it had."""
    old, new = (stage.files.get(path, "") for stage in (reading.old, reading.new))
    return code_lines(path, new) - code_lines(path, old)


@cache
def code_lines(path: str, text: str) -> int:
    """Lines with something on them that is neither a comment nor a docstring.

    A file of no known language counts every line that is not blank.
    """
    if path.endswith(".py"):
        try:
            return len(set(_python_code(text)))
        except (SyntaxError, tokenize.TokenError):  # somebody is working on it
            pass
    return len(set(_other_code(path, text)))


def _python_code(text: str) -> Iterator[int]:
    """The numbers of lines with code."""
    strings = {
        (node.lineno, node.end_lineno)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        first, last = token.start[0], token.end[0]
        if token.type not in _NO_CODE and (first, last) not in strings:
            yield from range(first, last + 1)


def _other_code(path: str, text: str) -> Iterator[int]:
    try:
        tokens = get_lexer_for_filename(path, stripnl=False).get_tokens(text)
    except ClassNotFound:
        yield from (i for i, line in enumerate(text.splitlines()) if line.strip())
        return
    number = 0
    for kind, value in tokens:
        is_code = kind not in Whitespace and kind not in String.Doc
        is_code &= kind not in Comment or kind in Comment.Preproc or kind in Comment.PreprocFile
        for place, part in enumerate(value.split("\n")):
            number += place > 0
            if is_code and part.strip():
                yield number

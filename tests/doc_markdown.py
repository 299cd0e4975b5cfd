"""Reading the repository's Markdown: links, headings, code, commands."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support import ROOT

SKIPPED = {".venv", "build", "dist", "node_modules"}
FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,})\s*(\S*)")
HEADING = re.compile(r"^(#{1,6}) +(.*?)\s*#*$")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
HTML_LINK = re.compile(r"""<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)=["']([^"']+)["']""")
INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def documents() -> list[Path]:
    """Every Markdown file of the repository."""
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not any(p in SKIPPED or p[0] == "." for p in path.relative_to(ROOT).parts)
    )


@dataclass(frozen=True)
class Line:
    """A line of a document, and the language of the fence it is in (None: in no fence)."""

    number: int
    text: str
    language: str | None
    is_fence: bool = False  # the line that opens or closes it


@cache
def lines(path: Path) -> list[Line]:
    result, fence, language = [], "", None
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        mark = FENCE.match(text)
        if mark and (not fence or (mark[2].startswith(fence) and not mark[3])):
            fence, language = ("", None) if fence else (mark[2], mark[3])
            result.append(Line(number, text, mark[3] or None, is_fence=True))
        else:
            result.append(Line(number, text, language))
    assert not fence, f"{path}: a fence is never closed"
    return result


def prose(path: Path) -> list[Line]:
    """The lines that are in no fence."""
    return [line for line in lines(path) if line.language is None and not line.is_fence]


def fences(path: Path, language: str) -> Iterator[str]:
    """The code of each fence in a language."""
    code: list[str] = []
    for line in lines(path):
        if line.is_fence:
            if code:
                yield "\n".join(code)
            code = []
        elif line.language == language:
            code.append(line.text)


def headings(path: Path) -> list[tuple[int, str]]:
    return [(len(m[1]), m[2]) for line in prose(path) if (m := HEADING.match(line.text))]


@cache
def anchors(path: Path) -> frozenset[str]:
    """What a link may name behind ``#``: GitHub's slugs of the headings, and written anchors."""
    seen: Counter[str] = Counter()
    result = set()
    for _, title in headings(path):
        words = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        result.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    for line in prose(path):
        result |= set(re.findall(r"""<a\s[^>]*\b(?:id|name)=["']([^"']+)["']""", line.text))
    return frozenset(result)


@cache
def links(path: Path) -> list[str]:
    """Targets of all links and pictures outside of code, also of those that cross a line."""
    text = "\n".join(line.text for line in prose(path))
    text = INLINE_CODE.sub(lambda code: "`" + "x" * len(code[2]) + "`", text)
    return [*LINK.findall(text), *HTML_LINK.findall(text)]


def inline_code(path: Path) -> list[str]:
    text = "\n".join(line.text for line in prose(path))
    return [" ".join(code.split()) for _, code in INLINE_CODE.findall(text)]


def shell_commands(path: Path) -> list[str]:
    """Commands in shell fences and, where they are ``python -m`` or ``make``, in the text."""
    result = []
    for script in (*fences(path, "bash"), *fences(path, "sh"), *fences(path, "console")):
        result += [line for line in script.replace("\\\n", " ").split("\n") if line.strip()]
    for code in inline_code(path):
        if re.match(r"(\.venv/bin/)?python -m \S+ \S|make [a-z]", code):  # not a module's bare name
            result.append(code)
    return result


def words_of(command: str) -> list[list[str]]:
    """The words of each program that a line of shell runs, without variables set before it."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    programs: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word[0] in "|&;":
            programs.append([])
        elif word[0] in "<>":
            next(words, None)  # a file
        elif programs[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            programs[-1].append(word)
    return [words for words in programs if words]

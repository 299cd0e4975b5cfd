"""Figures in documents, and the results they must be found in.

Where a figure is from is said in one of these ways:

- A table's row links a file of ``docs/results`` (or ``dev/compare/peers.json``): its figures are
  from there. A row behind it whose first cell is empty, or that says "the same", goes on with the
  same files.
- A comment in front of a table or paragraph names the files, separated by blanks::

      <!-- figures: h200-latency-m3.json h200-latency-m4.json -->

  In a paragraph figures are the numbers with a unit. What the text computes from others is named
  behind a bar: ``<!-- figures: cpu-throughput.json | computed: 5 %, 1.6 times -->``; in front of
  a table whose rows link their files: ``<!-- figures: linked | computed: 15.1 -->``.
- ``<!-- computed: how -->`` in front of a table says that nothing was measured: formulas, counts.

A table's figures are the numbers in all cells but those of its first column. A number is found
if a field of a row (in the unit that stands behind the number, or in any) is the same after
rounding to the digits shown; percentiles and extremes count only where the text speaks of such. A
column, or a cell to the left, that names a milestone (``m3``) or a peer asks for its rows. "1.7x",
and a column headed ratio, factor or "m4 / …", is the ratio of two numbers of its row.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from support import ROOT

RESULTS = ROOT / "docs" / "results"
PEERS = ROOT / "dev" / "compare" / "peers.json"

COMMENT = re.compile(r"^\s*<!-- (figures|computed): ([^|]+?)(?: \| computed: (.+?))? -->\s*$")
LINK = re.compile(r"\[[^\]]*\]\(([^)]*)\)")
UNITS = r"ms|us|µs|s|%|GB/s|TB/s|TFLOP/s|tokens/s|MiB|GiB|GB|MB|x|times"
NUMBER = re.compile(
    rf"(?<![\w.,/-])(\d+(?:,\d{{3}})*(?:\.\d+)?)(?:\s?({UNITS})(?![\w/]))?(?!\w|[.,]\w)"
)
MEASURED = ("ms", "us", "µs", "tokens/s", "TFLOP/s", "GB/s")
"""A table with figures in these units has to say where they are from."""

SPREAD_FIELD = re.compile(r"_(mean|min|max|p\d\d)(_s)?$|^(load|part|capture_time)_s$")
SPREAD = re.compile(
    r"\b(p\d\d|max|mean|median|longest|last|fastest|slowest|spread|ITL|at once|to)\b"
)
"""Percentiles, extremes and side figures count only where the text around speaks of such."""

NAMES = {"transformers": "hf", "vLLM": "vllm", "nano-vllm": "nano-vllm",
         "FlashAttention-3": "FlashAttention-3", "SDPA": "SDPA"}


@dataclass(frozen=True)
class Figure:
    """A number of a document, and where it should be found."""

    file: Path
    line: int
    text: str  # the number as written
    unit: str
    names: tuple[str, ...]  # whose rows are asked for; empty: anybody's
    sources: tuple[str, ...]
    spread: bool = False  # whether it may be a percentile or an extreme
    ratio_of: tuple[str, ...] = ()  # of a ratio: the other numbers of its row

    @property
    def number(self) -> float:
        return float(self.text.replace(",", ""))

    @property
    def half_a_digit(self) -> float:
        """How far a value may be from the number that is its rounding."""
        decimals = len(self.text.partition(".")[2])
        return 0.5001 * 10.0**-decimals

    def is_found(self, number: float | None = None) -> bool:
        """Whether the sources have it (or another number, written with as many digits)."""
        number = self.number if number is None else number
        if self.ratio_of:
            return self._is_ratio(number)
        return any(abs(value - number) <= self.half_a_digit
                   for source in self.sources
                   for value in values(source, self.unit, self.names, self.spread))

    def _is_ratio(self, number: float) -> bool:
        for above, below in itertools.permutations(self.ratio_of, 2):
            (low, high), (least, most) = _bounds(above), _bounds(below)
            if least > 0 and low / most - self.half_a_digit <= number <= (
                    high / least + self.half_a_digit):
                return True
        return False

    def __str__(self) -> str:
        where = f"{self.file.relative_to(ROOT)}:{self.line}"
        whose = f" of {', '.join(self.names)}" if self.names else ""
        return f"{where}: {self.text} {self.unit}{whose} is not in {', '.join(self.sources)}"


def _bounds(text: str) -> tuple[float, float]:
    """What a number that is written so may have been before it was rounded."""
    half = 0.5 * 10.0 ** -len(text.partition(".")[2])
    number = float(text.replace(",", ""))
    return number - half, number + half


# --- results ----------------------------------------------------------------------------------


def source_path(name: str) -> Path:
    """The file that a comment or a link names; ValueError where there is none."""
    path = PEERS if name == "peers.json" else RESULTS / name
    if not path.is_file():
        raise ValueError(f"there is no {name} in docs/results")
    return path


@cache
def values(source: str, unit: str, names: tuple[str, ...], spread: bool) -> tuple[float, ...]:
    """All values of a file's rows in a unit ("": in any), of some subjects or of all.

    spread: percentiles and extremes too.
    """
    report = json.loads(source_path(source).read_text(encoding="utf-8"))
    rows = report["rows"]
    if names:
        rows = [row for row in rows if _may_be_of(row.get("name", ""), names)]
    found = list(_numbers(rows, ""))
    if not names:
        found += _numbers({"ceilings": report.get("ceilings") or {}}, "")
        found += _numbers({"work": report.get("work") or {}}, "")
    return tuple(number * scale for name, number in found
                 if spread or not SPREAD_FIELD.search(name)
                 for kind, scale in scales(name) if unit in ("", kind))


def _may_be_of(subject: str, names: Sequence[str]) -> bool:
    """Whether a row is one of these subjects', or of one that has no such name ("fused")."""
    name = re.match(r"m\d(?=_)|.*", subject)[0]
    return name in names or not (re.match(r"m\d_", subject) or name in NAMES.values())


def _numbers(value: object, name: str) -> Iterator[tuple[str, float]]:
    """Every number of a nested value with the name of its field."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)


def scales(name: str) -> tuple[tuple[str, float], ...]:
    """The units in which a field may be written, and what to multiply it with."""
    if name in ("us", "us_per_call"):
        return ("us", 1.0), ("µs", 1.0), ("ms", 1e-3)
    if name.endswith("bytes_per_s"):
        return ("GB/s", 1e-9), ("TB/s", 1e-12)
    if name.endswith("flops_per_s"):
        return (("TFLOP/s", 1e-12),)
    if name.endswith("tokens_per_s"):
        return (("tokens/s", 1.0),)
    if name.endswith("_per_s"):
        return (("", 1.0),)
    if name.endswith("_s") or name.startswith("seconds"):
        return ("s", 1.0), ("ms", 1e3), ("us", 1e6), ("µs", 1e6)
    if name.endswith("share") or name == "kv_utilization":
        return ("%", 100.0), ("", 1.0)
    if name.endswith("bytes"):
        return ("MiB", 2.0**-20), ("GiB", 2.0**-30), ("GB", 1e-9), ("MB", 1e-6)
    return (("", 1.0),)


# --- documents --------------------------------------------------------------------------------


@dataclass
class Block:
    """A table or a paragraph: its lines with their numbers, and the comment before it."""

    lines: list[tuple[int, str]]
    sources: tuple[str, ...] = ()
    computed: str | None = None  # the whole block is
    allowed: tuple[str, ...] = ()  # numbers that the text computes

    @property
    def is_table(self) -> bool:
        return self.lines[0][1].lstrip().startswith("|")


@dataclass
class Document:
    """What a file says: figures with sources, tables without."""

    figures: list[Figure] = field(default_factory=list)
    unsourced: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)  # allowed, but not there


def documents() -> list[Path]:
    """Every file whose figures are held to the results."""
    patterns = ("README.md", "docs/*.md", "dev/milestone_*.md", "learn/*.md", "m*_*/README.md")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def read(file: Path, text: str | None = None) -> Document:
    """Find the figures of a document."""
    text = file.read_text(encoding="utf-8") if text is None else text
    document = Document()
    for block in blocks(text):
        if block.computed is not None:
            continue
        if block.is_table:
            _read_table(file, block, document)
        elif block.sources:
            _read_prose(file, block, document)
    return document


def blocks(text: str) -> Iterator[Block]:
    """Tables and paragraphs; code is left out."""
    comment: re.Match[str] | None = None
    lines: list[tuple[int, str]] = []
    in_code = False

    def finish() -> Iterator[Block]:
        nonlocal comment, lines
        if lines:
            block = Block(lines)
            if comment is not None and comment[1] == "computed":
                block.computed = comment[2]
            elif comment is not None:
                block.sources = () if comment[2] == "linked" else tuple(comment[2].split())
                block.allowed = tuple(re.findall(r"\d[\d,.]*\d|\d", comment[3] or ""))
            yield block
            comment, lines = None, []

    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
            yield from finish()
        elif in_code:
            continue
        elif match := COMMENT.match(line):
            yield from finish()
            comment = match
        elif not line.strip():
            yield from finish()
        else:
            is_row = line.lstrip().startswith("|")
            if lines and is_row != lines[-1][1].lstrip().startswith("|"):
                yield from finish()
            lines.append((number, line))
    yield from finish()


def _read_prose(file: Path, block: Block, document: Document) -> None:
    written = set()
    spread = SPREAD.search(" ".join(line for _, line in block.lines)) is not None
    for number, line in block.lines:
        for text, unit in _figures_of(line):
            written.add(text)
            if unit and text not in block.allowed:
                unit = "" if unit in ("x", "times") else unit
                document.figures.append(
                    Figure(file, number, text, unit, (), block.sources, spread)
                )
    _note_stale(file, block, written, document)


def _note_stale(file: Path, block: Block, written: set[str], document: Document) -> None:
    for text in block.allowed:
        if text not in written:
            where = f"{file.relative_to(ROOT)}:{block.lines[0][0]}"
            document.stale.append(f"{where}: the comment allows {text}, which is not there")


def _read_table(file: Path, block: Block, document: Document) -> None:
    rows = [(number, [cell.strip() for cell in line.strip().strip("|").split("|")], line)
            for number, line in block.lines]
    header = rows[0][1]
    sources, written = block.sources, set()
    unsourced: int | None = None  # the first line with a measured figure from nowhere
    for number, cells, line in rows[2:]:
        linked = tuple(Path(url).name for url in LINK.findall(line) if _is_source(url))
        if not block.sources:
            if linked:
                sources = linked
            elif cells[0] and "the same" not in line:
                sources = ()
        figures = _figures_of_row(file, number, header, cells, sources, block.allowed)
        if not sources:
            if unsourced is None and any(figure.unit in MEASURED for figure in figures):
                unsourced = number
            continue
        written |= {text for cell in cells for text, _ in _figures_of(cell)}
        document.figures += figures
    _note_stale(file, block, written, document)
    if unsourced is not None:
        document.unsourced.append(f"{file.relative_to(ROOT)}:{unsourced}: where from? In a table "
                                  f"{' | '.join(header)}")


def _is_source(url: str) -> bool:
    is_result = "results/" in url and url.endswith(".json")
    return is_result or url.endswith("compare/peers.json")


def _figures_of_row(
    file: Path, line: int, header: Sequence[str], cells: Sequence[str], sources: tuple[str, ...],
    allowed: tuple[str, ...],
) -> list[Figure]:
    who = _subject(cells[0], anywhere=True)
    others = tuple(text for cell in cells[1:] for text, unit in _figures_of(cell) if unit != "x")
    figures = []
    for place, cell in enumerate(cells[1:], start=1):
        head = header[place] if place < len(header) else ""
        who = _subject(cell) or who
        if head.strip("* ") in (*NAMES, *_subject(head)):
            names = _subject(head)
        else:  # "m1 TPOT" over a row of transformers
            names = who if set(who) & set(NAMES.values()) else _subject(head) or who
        is_ratio = re.search(r"\b(ratio|factor|times)\b|^m\d / ", head) is not None
        spread = SPREAD.search(f"{head} {cells[0]} {cells[1]}") is not None
        for text, unit in _figures_of(cell):
            if text in allowed:
                continue
            if is_ratio or unit in ("x", "times"):
                rest = list(others)
                if unit != "x":  # then it is one of them
                    rest.remove(text)
                ratio_of = tuple(rest) or ("0",)
                figures.append(Figure(file, line, text, "", (), sources, False, ratio_of))
            else:
                unit = unit or _unit_of(head) or _unit_of(cells[0])
                figures.append(Figure(file, line, text, unit, names, sources, spread))
    return figures


def _subject(text: str, anywhere: bool = False) -> tuple[str, ...]:
    """Whose rows a heading or a cell asks for: it begins with the name, or has one anywhere."""
    text = re.sub(r"[*`]", "", LINK.sub(lambda m: m[0][1 : m[0].index("]")], text)).strip()
    found = re.search(rf"\b(m\d|{'|'.join(NAMES)})\b", text)
    if found is None or not (anywhere or found.start() == 0):
        return ()
    return (NAMES.get(found[1], found[1]),)


def _unit_of(text: str) -> str:
    """The unit that a heading or a label gives the numbers beside it: the last one it names."""
    text = re.sub(rf"\d ?({UNITS})(?![\w/])", " ", text)  # of a number in the heading itself
    found = re.findall(rf"(?<![\w/'’])({UNITS})(?![\w/])", text)
    return found[-1] if found and found[-1] not in ("x", "times") else ""


def _figures_of(text: str) -> Iterator[tuple[str, str]]:
    """Numbers and their units, without what stands in links, code and names."""
    text = re.sub(r"`[^`]*`|\{\{.*", " ", LINK.sub(" ", text)).replace("**", "")
    shared = re.findall(rf"\d ?({UNITS})$", text.strip())
    for match in NUMBER.finditer(text):
        unit = match[2] or ""
        if not unit and shared and re.search(r"\d( / |, | to )\d", text):
            unit = shared[-1]  # "38, 59, 82 ms"
        yield match[1], unit

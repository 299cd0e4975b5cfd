"""``docs/technical_comparison.md``: every figure from committed results, every gap named.

A row names the files it is from, so that the test of the documents' figures finds them there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.bench.runner import REPOSITORY
from dev.compare.sections import NONE, Line, Section, is_ours, sections, show, show_cell
from dev.compare.sources import PEERS, Entry, Sources

ALIKE = 1.01
"""Factors below are no loss."""


def write_document(sources: Sources, path: Path, chart: Path | None = None) -> None:
    """Write the whole document; links are relative to its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(sources, path.parent, chart), encoding="utf-8")


def document(sources: Sources, folder: Path, chart: Path | None = None) -> str:
    """The text of the document."""
    parts = [_head(sources, folder, chart)]
    all_sections = sections(sources)
    for section in all_sections:
        parts.append(f"## {section.title}\n\n{section.text}\n\n{_table(section, folder)}")
    parts.append(_losses(all_sections, folder))
    return "\n\n".join(parts) + "\n"


def _table(section: Section, folder: Path) -> str:
    rows = [["", *section.columns.values(), "from"]]
    for line in section.lines:
        entries = [line.find(column) for column in section.columns]
        rows.append([line.label, *(show_cell(line, column) for column in section.columns),
                     _links([entry for entry in entries if entry], folder)])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    rule = ["---", *(["---:"] * (len(head) - 2)), "---"]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def _links(entries: Sequence[Entry], folder: Path) -> str:
    files = dict.fromkeys(entry.file for entry in entries)
    if not files:
        return NONE
    return ", ".join(f"[{_short(file)}]({_relative(file, folder)})" for file in files)


def _short(file: Path) -> str:
    return "peers" if file == PEERS else file.stem.removeprefix("h200-")


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()


@dataclass(frozen=True)
class Loss:
    """Somebody who is slower than somebody else, or wastes more."""

    label: str
    who: str
    ours: Any
    whom: str
    theirs: Any
    factor: float
    style: str
    entries: Sequence[Entry]


def losses(all_sections: Sequence[Section]) -> list[Loss]:
    """Our newest figure of each line against everyone else's better one; then every milestone
    against the one before it."""
    found = []
    for section in all_sections:
        for line in section.lines:
            found += _behind_others(section, line)
    for section in all_sections:
        for line in section.lines:
            found += _behind_itself(section, line)
    return found


def _behind_others(section: Section, line: Line) -> list[Loss]:
    ours = [c for c in section.columns if is_ours(c) and line.value(c) is not None]
    others = [c for c in section.columns if not is_ours(c) and line.value(c) is not None]
    return [loss for whom in others for loss in _loss(section, line, ours[-1:], whom)]


def _behind_itself(section: Section, line: Line) -> list[Loss]:
    ours = [c for c in section.columns if is_ours(c) and line.value(c) is not None]
    return [loss for whom, who in itertools.pairwise(ours)
            for loss in _loss(section, line, [who], whom)]


def _loss(section: Section, line: Line, who: Sequence[str], whom: str) -> list[Loss]:
    if not who:
        return []
    ours, theirs = line.value(who[0]), line.value(whom)
    if isinstance(ours, list) or isinstance(theirs, list):
        return []  # ranges stand in the table
    factor = ours / theirs if line.less_is_better else theirs / ours
    if factor < ALIKE:
        return []
    entries = [entry for entry in (line.find(who[0]), line.find(whom)) if entry]
    return [Loss(line.label, section.columns[who[0]], ours, section.columns[whom], theirs, factor,
                 line.style, entries)]


def _losses(all_sections: Sequence[Section], folder: Path) -> str:
    rows = [["", "who", "figure", "behind whom", "figure", "factor", "from"]]
    for one in losses(all_sections):
        rows.append([one.label, one.who, show(one.ours, one.style), one.whom,
                     show(one.theirs, one.style), f"{one.factor:.2f}x",
                     _links(one.entries, folder)])
    return f"## What is lost\n\n{_LOST}\n\n{_markdown(rows)}"


def _head(sources: Sources, folder: Path, chart: Path | None) -> str:
    peers = sources.peers
    where = peers["environment"]
    others = ";\n  ".join(f"{about['label']} {about['version']} with {about['setup']}"
                       for about in peers["subjects"].values())
    commits = dict.fromkeys(
        entry.environment["commit"][:7] for entry in sources.entries
        if entry.is_ours and entry.environment.get("commit")
    )
    picture = ""
    if chart is not None:
        picture = (f"\n\n![The milestones, vLLM and nano-vllm on one card: the tables below as "
                   f"bars]({_relative(chart, folder)})")
    return _HEAD.format(
        gpu=where["gpu"], torch=where["torch"], triton=where["triton"], date=where["date"],
        others=others, commits=", ".join(commits), peers=_relative(PEERS, folder), picture=picture,
        results=_relative(REPOSITORY / "docs" / "results" / "README.md", folder),
    )


_HEAD = """<!-- Written by python -m dev.compare report: edit dev/compare/sections.py instead. -->
# Technical comparison

What each milestone reaches, beside [vLLM](https://github.com/vllm-project/vllm) and
[nano-vllm](https://github.com/GeeeekExplorer/nano-vllm) on the same card: one {gpu}, torch
{torch}, Triton {triton}, Qwen3-0.6B's shapes with random weights in bfloat16 unless named.

- Others, measured {date} ([figures]({peers})):
  {others}.
- Ours: commits {commits};
  machine, versions and command are in each file ([what they are]({results})).
- Hosts differ from report to report, and what Python launches differs with them, by a half and
  more: figures that link one report compare best.
- Where a measurement was repeated, the newest file counts. "not yet" is not yet measured on this
  card, "–" is nothing to measure or not asked of it.{picture}"""

_LOST = """All lines of the tables above in which our newest milestone is behind somebody, and in
which a milestone is behind the one before it. Differences below 1 % are left out; single latencies
differ by some per cent from run to run."""

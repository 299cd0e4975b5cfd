"""Figures in the documents are those of the committed results; results say where they are from."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
from doc_figures import PEERS, RESULTS, documents, read, source_path
from support import ROOT

FILES = documents()
REPORTS = sorted(RESULTS.glob("*.json"))
HELD = [figure for file in FILES for figure in read(file).figures]


def names(files: list[Path]) -> list[str]:
    return [file.relative_to(ROOT).as_posix() for file in files]


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_figures_are_in_the_results_they_name(file):
    document = read(file)
    assert [str(figure) for figure in document.figures if not figure.is_found()] == []
    assert document.stale == []


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_tables_of_times_say_where_they_are_from(file):
    assert read(file).unsourced == []


def test_there_is_something_to_hold():
    assert len(HELD) > 300
    assert {"README.md", "docs/technical_comparison.md"} <= set(names([f.file for f in HELD]))


def test_other_numbers_would_be_refused():
    """Of all figures, most that are off by seven of their last digits are in no result."""
    plain = [figure for figure in HELD if not figure.ratio_of]
    last_digit = [2 * figure.half_a_digit for figure in plain]
    refused = sum(not figure.is_found(figure.number + 7 * digit)
                  for figure, digit in zip(plain, last_digit, strict=True))
    assert refused / len(plain) > 0.9


@pytest.mark.parametrize("file", REPORTS, ids=names(REPORTS))
def test_a_result_says_where_it_is_from(file):
    report = json.loads(file.read_text(encoding="utf-8"))
    where = report["environment"]
    assert report["command"].startswith("python -m ")
    assert re.fullmatch(r"[0-9a-f]{40}", where["commit"])
    assert where["gpu"] or where["cpu"]
    assert where["torch"] and where["python"] and where["date"]
    assert report["rows"]
    assert "uncommitted_changes" in where


@pytest.mark.parametrize("file", REPORTS, ids=names(REPORTS))
def test_results_are_listed(file):
    assert f"({file.name})" in (RESULTS / "README.md").read_text(encoding="utf-8")


def test_no_result_is_listed_that_is_not_there():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\(([\w-]+\.json)\)", text):
        source_path(name)


def test_the_figures_of_others_say_where_they_are_from():
    peers = json.loads(PEERS.read_text(encoding="utf-8"))
    assert {"gpu", "torch", "triton", "date"} <= set(peers["environment"])
    assert {row["name"] for row in peers["rows"]} == set(peers["subjects"])
    assert all({"version", "setup"} <= set(about) for about in peers["subjects"].values())


def test_gaps_that_wait_for_a_measurement_are_told():
    """Not a fault, but something to know of."""
    files = [*FILES, *ROOT.glob("learn/*.py")]
    gaps = {file: file.read_text(encoding="utf-8").count("{{FIGURE") for file in files}
    for file, count in gaps.items():
        if count:
            warnings.warn(f"{file.relative_to(ROOT)} waits for {count} figures", stacklevel=1)


# --- the reader itself ------------------------------------------------------------------------

SMALL = ROOT / "docs" / "small.md"  # need not exist


def faults(text: str) -> list[str]:
    document = read(SMALL, text)
    found = [figure.text for figure in document.figures if not figure.is_found()]
    return found + document.unsourced + document.stale


FROM = "[a](results/h200-latency-m3.json), [b](results/h200-latency-m4.json)"
LINKED = f"""| work | m3 | m4 | ratio | from |
| --- | ---: | ---: | ---: | --- |
| batch 1, ms | {{m3}} | {{m4}} | {{ratio}} | {FROM} |
"""


@pytest.mark.parametrize(
    ("m3", "m4", "ratio", "refused"),
    [
        ("11.3", "0.92", "12.2", []),
        ("11.4", "0.92", "12.3", ["11.4"]),
        ("0.92", "0.92", "1", ["0.92"]),  # m4's, not m3's
        ("11.3", "0.923", "12.2", []),
        ("11.3", "0.924", "12.2", ["0.924"]),
        ("11.3", "0.92", "13.5", ["13.5"]),
        ("11.3 ms", "923 us", "12.2", []),
        ("11.3 us", "0.92", "12.2", ["11.3"]),
    ],
)
def test_a_row_is_held_to_what_it_links(m3, m4, ratio, refused):
    if m3 == "0.92":
        ratio = "–"
    text = LINKED.format(m3=m3, m4=m4, ratio=ratio)
    if "us" in m4:
        text = text.replace("12.2", "–")
    if "us" in m3:
        text = text.replace("12.2", "–")
    assert faults(text) == refused


def test_a_comment_holds_for_the_table_behind_it():
    table = "<!-- figures: {file} -->\n| | m4 |\n| --- | --- |\n| TPOT, ms | {figure} |\n"
    assert faults(table.format(file="h200-latency-m4.json", figure="0.92")) == []
    assert faults(table.format(file="h200-latency-m4.json", figure="0.95")) == ["0.95"]
    assert faults(table.format(file="h200-latency-m4.json | computed: 0.95", figure="0.95")) == []
    assert len(faults(table.format(file="h200-latency-m4.json | computed: 7", figure="0.92"))) == 1
    with pytest.raises(ValueError, match=r"no nothing\.json"):
        faults(table.format(file="nothing.json", figure="0.92"))


def test_a_table_of_times_without_a_source_is_refused():
    table = "| | m4 |\n| --- | --- |\n| TPOT | 0.92 ms |\n"
    assert len(faults(table)) == 1
    assert faults(f"<!-- computed: bytes by bandwidth -->\n{table}") == []
    assert faults(f"```\n{table}```\n") == []


def test_a_paragraph_is_held_by_its_units():
    text = "<!-- figures: h200-latency-m4.json -->\nBatch 64 takes {} ms, 3 of them.\n"
    assert faults(text.format("1.55")) == []
    assert faults(text.format("1.65")) == ["1.65"]


def test_rows_go_on_with_the_files_above_them():
    text = LINKED.format(m3="11.3", m4="0.92", ratio="–")
    assert faults(text + "| the same, 64 | 12.3 | 1.55 | | |\n") == []
    assert faults(text + "| | 12.3 | 1.58 | | |\n") == ["1.58"]
    assert faults(text + "| counted otherwise | 99.9 | 1.58 | | |\n") == []

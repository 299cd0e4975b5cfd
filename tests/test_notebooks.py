"""The notebooks beside the notes run as they are, and every exercise has its solution.

They are Python files in jupytext's percent format. What they claim they assert themselves, so
running one as a script is the test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

NOTEBOOKS = sorted((ROOT / "learn").glob("*.py"))
# What a notebook may take on one core. A slow machine is no fault of the notebook, so the clock
# fails nothing: the limit below is there for one that hangs.
BUDGET = 60  # seconds
LIMIT = 4 * BUDGET

CELL = re.compile(r"^# %%(?P<markdown> \[markdown\])?.*$", re.MULTILINE)


def cells(notebook: Path) -> list[tuple[bool, str]]:
    """(whether it is text, its lines) of every cell."""
    source = notebook.read_text(encoding="utf-8")
    marks = [*CELL.finditer(source)]
    ends = [mark.start() for mark in marks[1:]] + [len(source)]
    return [
        (bool(mark["markdown"]), source[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_it_runs_from_top_to_bottom(self, notebook, tmp_path):
        """Its asserts hold, and it shows something."""
        environment = {
            **os.environ, "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(tmp_path),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(notebook)], cwd=tmp_path, env=environment, timeout=LIMIT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout

    def test_text_is_commented_and_code_is_not(self, notebook):
        """What jupytext needs to tell them apart."""
        for is_text, lines in cells(notebook):
            assert lines, "an empty cell"
            if is_text:
                assert all(line.startswith("#") for line in lines.splitlines() if line)
            else:
                compile(lines, str(notebook), "exec")

    def test_every_exercise_has_a_solution_behind_it(self, notebook):
        exercises = [
            (place, found[1])
            for place, (is_text, lines) in enumerate(cells(notebook))
            if is_text and (found := re.search(r"\*\*Exercise (\d+)\.\*\*", lines))
        ]
        assert [number for _, number in exercises] == [
            str(place + 1) for place in range(len(exercises))
        ]
        for place, number in exercises:
            is_text, lines = cells(notebook)[place + 1]
            assert not is_text
            assert lines.startswith(f"# Solution {number}.")

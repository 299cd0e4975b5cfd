"""Committed results and the figures of others: one question, the newest answer.

    sources = Sources.read([Path("docs/results")])
    sources.find("m4", "tpot", num_requests=64)       # an Entry: row, file
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.bench.report import Report, Row
from dev.bench.runner import config_class, find_milestone

PEERS = Path(__file__).with_name("peers.json")
MODEL, DTYPE = "random:qwen3-0.6b", "bfloat16"
INPUT_LEN, OUTPUT_LEN = 128, 129
"""Of the batches whose TPOT is compared."""
_CHANGED_BY_HAND = ("attention_backend", "ops", "enforce_eager", "overlap", "prefix_index",
                    "target_itl_ms")


@dataclass(frozen=True)
class Entry:
    """A row and where it is from: the file, its environment, the work, the engine's options."""

    row: Row
    file: Path
    environment: Mapping[str, Any]
    work: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """``m4`` of a milestone, otherwise the subject's name."""
        name = self.row["name"]
        return name.split("_")[0] if self.is_ours else name

    @property
    def is_ours(self) -> bool:
        """Whether a milestone made it."""
        return self.file != PEERS

    @property
    def is_beside_4_bits(self) -> bool:
        """Whether it is of a part that compares 4 bits with more."""
        return self.row.get("part", "").startswith("four-bits")

    @property
    def model(self) -> str:
        """What was run."""
        return self.row.get("model") or self.options.get("model") or MODEL


@dataclass(frozen=True)
class Sources:
    """Rows of the results, oldest first, and what the peers' file says."""

    entries: Sequence[Entry]
    peers: Report
    kernels: Sequence[Entry]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Sources:
        """Read files, and the ``h200-*.json`` of folders.

        Raises:
            ValueError: a file is no report, or there is none.
        """
        files = [file for path in paths
                 for file in (sorted(path.glob("h200-*.json")) if path.is_dir() else [path])]
        if not files:
            raise ValueError(f"no results in {', '.join(map(str, paths))}: name files, or a "
                             "folder with h200-*.json")
        reports = [(file, _read(file)) for file in files]
        reports.sort(key=lambda pair: pair[1]["environment"]["date"])
        peers = _read(PEERS)
        entries = [entry for file, report in reports for entry in _entries(file, report)]
        kernels = [entry for entry in entries if "us" in entry.row]
        return cls([*_entries(PEERS, peers), *entries], peers, kernels)

    def find(
        self, name: str, measure: str, model: str = MODEL,
        work: Mapping[str, Any] | None = None, *, beside_4_bits: bool = False, **wanted: Any,
    ) -> Entry | None:
        """The newest row of a milestone (``m4``) or peer with these fields.

        work: what else our work must have been like; that of the peers was.
        beside_4_bits: ours from the parts that compare 4 bits with more; other rows do not count
            then, and theirs do not otherwise.

        Peers' rows with 4-bit weights are found by ``weights="gptq"``, ours by the model's name.
        """
        wanted.setdefault("weights", None)
        found = None
        for entry in self.entries:
            about = {**entry.work, **entry.row}
            asked = {**wanted, **work} if work and entry.is_ours else wanted
            if (entry.name == name and entry.row["measure"] == measure and entry.model == model
                    and (not entry.is_ours or beside_4_bits == entry.is_beside_4_bits)
                    and _is_usual(entry)
                    and all(about.get(field) == value for field, value in asked.items())):
                found = entry
        return found

    def kernel(self, name: str, measure: str, case: str) -> Entry | None:
        """The newest time of a kernel."""
        found = None
        for entry in self.kernels:
            row = entry.row
            if (row["name"], row["measure"], row["case"]) == (name, measure, case) and row["us"]:
                found = entry
        return found


def _read(file: Path) -> Report:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        report["rows"], report["environment"]["date"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no report of dev.bench or dev.compare: {error}") from None
    return report


def _entries(file: Path, report: Report) -> Iterator[Entry]:
    for row in report["rows"]:
        about = report
        if report["kind"] == "compare":
            if report["scale"] != 1:
                raise ValueError(f"{file} was scaled by {report['scale']:g}: a trial, no result")
            about = report["parts"][row["part"]]
        options = about.get("options", {}).get(row["name"], {})
        yield Entry(row, file, report["environment"], about.get("work", {}), options)


def _is_usual(entry: Entry) -> bool:
    """Measured as an engine runs by itself, in the lengths that are compared."""
    row, options = entry.row, entry.options
    lengths = row.get("input_len"), row.get("output_len")
    if entry.is_ours and row["measure"] == "tpot" and lengths != (INPUT_LEN, OUTPUT_LEN):
        return False
    if not options:
        return True
    if options.get("dtype") != DTYPE:
        return False
    fields = {f.name: f for f in dataclasses.fields(config_class(find_milestone(row["name"])))}
    return all(options[name] == fields[name].default
               for name in _CHANGED_BY_HAND if name in options and name in fields)

"""What a suite is, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dev.bench.kernels.setting import Setting
from dev.bench.kernels.timing import Call, seconds_by_call, seconds_by_graph
from dev.bench.report import Row
from dev.bench.roofline import Ceilings, Cost

Inputs = Sequence[Any]
"""A suite's own inputs, for one call each."""


@dataclass(frozen=True)
class Subject:
    """Someone to be measured.

    calls: prepares what is prepared once a step and returns one call for each of the inputs.
    graph: whether the calls can be captured; False for one that waits for the device.
    compared: whether its result is what that of the first subject is.
    """

    name: str
    calls: Callable[[Inputs], list[Call]]
    graph: bool = True
    compared: bool = True


class Case(Protocol):
    """One size of one operation; ``str`` gives the text it was read from."""

    @property
    def measure(self) -> str:
        """What is measured: the name of the operation."""


class Suite(Protocol):
    """Cases and who is measured on them."""

    name: ClassVar[str]
    default_cases: ClassVar[dict[str, tuple[str, ...]]]  # by type of device

    def parse(self, text: str) -> Case:
        """Read a case; ValueError where it is none."""

    def cost(self, case: Case) -> Cost:
        """Bytes that must be moved and operations that must be made, at least."""

    def inputs(self, case: Case) -> Inputs:
        """Inputs for several calls; ValueError where one does not fit into memory."""

    def subjects(self, case: Case) -> Iterable[Subject]:
        """Who can do this case here."""


def measure(
    suite: Suite, cases: Sequence[Case], setting: Setting, progress: Callable[[str], None]
) -> Iterator[Row]:
    """A row for each case and subject. One that fails says why in its row: others go on."""
    for case in cases:
        inputs, cost = suite.inputs(case), suite.cost(case)
        first: Tensor | None = None
        for subject in suite.subjects(case):
            progress(f"{case.measure} {case}: {subject.name}")
            row = {"name": subject.name, "measure": case.measure, "case": str(case),
                   "us": None, "us_per_call": None, "bytes": cost.bytes, "flops": cost.flops}
            try:
                calls = subject.calls(inputs)
                result = _flat(calls[0]()) if subject.compared else None
                row |= _timed(calls, subject, setting)
            except Exception as error:  # out of memory, not supported, not compiled
                row["error"] = str(error).strip().partition("\n")[0]
            else:
                if result is not None:
                    first = result if first is None else first
                    row["difference"] = _distance(result, first)
            calls = result = None
            if setting.on_gpu:
                torch.cuda.empty_cache()
            yield row


def add_rates(rows: Sequence[Row], ceilings: Ceilings | None) -> None:
    """Put bytes and operations a second beside the times, and their shares of the ceilings."""
    for row in rows:
        if row["us"] is None:
            continue
        seconds = row["us"] / 1e6
        row["bytes_per_s"], row["flops_per_s"] = row["bytes"] / seconds, row["flops"] / seconds
        if ceilings is not None:
            row["read_share"] = row["bytes_per_s"] / ceilings.read_bytes_per_s
            row["flops_share"] = row["flops_per_s"] / ceilings.flops_per_s
            row["bound"] = Cost(row["bytes"], row["flops"]).bound(ceilings)


def _timed(calls: list[Call], subject: Subject, setting: Setting) -> Row:
    alone = seconds_by_call(calls, setting.device)
    replayed = seconds_by_graph(calls) if setting.on_gpu and subject.graph else alone
    return {"us": replayed * 1e6, "us_per_call": alone * 1e6}


def _flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.flatten().float() for part in parts])


def _distance(result: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected."""
    if result.shape != expected.shape:
        raise RuntimeError(
            f"subjects of one case must return the same: {list(result.shape)} numbers, not "
            f"{list(expected.shape)}"
        )
    return float((result - expected).norm() / expected.norm().clamp_min(1e-30))

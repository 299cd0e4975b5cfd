"""Passes, warm-ups and repetitions: what every measurement is made of.

Subjects take turns, pass by pass, so that a machine that slows down for a while slows all of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from common.environment import peak_memory_bytes, reset_peak_memory
from common.metrics import percentiles
from dev.bench.roofline import Cost
from dev.bench.runner import Run, Subject
from dev.bench.workloads import BenchRequest, Lengths, check_fits, random_requests

Row = dict[str, Any]
Loader = Callable[[], Subject]
Progress = Callable[[str], None]
"""Told what is being done."""

_CPU_WARMUP = 2


@dataclass(frozen=True)
class Pass:
    """Requests that are timed as one; here they are submitted together."""

    label: str
    num_requests: int
    input_len: Lengths
    output_len: Lengths
    seed: int = 0
    temperature: float = 0.0

    def requests(self, vocab_size: int, run: int) -> list[BenchRequest]:
        """The same lengths in every run, with fresh prompts."""
        return random_requests(
            self.num_requests,
            self.input_len,
            self.output_len,
            vocab_size=vocab_size,
            seed=self.seed,
            run=run,
        )

    def run(self, subject: Subject, requests: Sequence[BenchRequest]) -> Run:
        """Have requests of this pass served; the first few of them are a warm-up."""
        return subject.run(requests, self.temperature)

    def lengths(self) -> list[tuple[int, int]]:
        """Prompt and output length of each request."""
        return [(r.input_len, r.output_len) for r in self.requests(vocab_size=1, run=0)]


@dataclass
class Timing:
    """What one subject made of one pass, time after time."""

    of: Pass
    runs: list[Run]
    peak_memory_bytes: int | None

    @property
    def seconds(self) -> list[float]:
        return [run.seconds for run in self.runs]

    @property
    def median_run(self) -> Run:
        """The run of median duration (of an even number, the faster one of the middle)."""
        return sorted(self.runs, key=lambda run: run.seconds)[(len(self.runs) - 1) // 2]


@dataclass(frozen=True)
class Schedule:
    """How often everything is done.

    warmup: requests of each pass to serve before it is timed; None: all on a GPU, two on the CPU.
    """

    repeat: int
    warmup: int | None = None


class Work(Protocol):
    """Something to measure; each kind of measurement has one."""

    kind: str
    batch_size: int | None  # most sequences at once; None: as the engine likes
    max_num_seqs: int | None  # the engine's option, unless it is given

    def describe(self) -> Mapping[str, Any]:
        """Flat and plain, for the report."""

    def passes(self) -> list[Pass]:
        """What is run."""

    def rows(self, subject: Subject, timings: Sequence[Timing]) -> list[Row]:
        """What the report says of one subject, given a timing for each pass."""


def measure(
    work: Work, loaders: Iterable[Loader], schedule: Schedule, progress: Progress
) -> list[Row]:
    """Run every pass of the work ``repeat`` times with every subject; returns the report's rows.

    A subject is loaded after the first round of the one before it, so that the peak memory of the
    first is its own; nothing is said about that of the others.

    Raises:
        ValueError: a subject cannot be loaded, or the work does not fit it.
    """
    passes = work.passes()
    measured: list[tuple[Subject, list[Timing]]] = []
    for load in loaders:
        progress("loading")
        subject = load()
        # What stands from here on need not be looked at whenever garbage is collected.
        gc.collect()
        gc.freeze()
        for one in passes:
            requests = one.requests(subject.model_config.vocab_size, run=0)
            check_fits(requests, subject.max_model_len, subject.name)
        timings = [_first_run(subject, one, schedule.warmup, progress) for one in passes]
        if measured:
            for timing in timings:
                timing.peak_memory_bytes = None
        measured.append((subject, timings))
    for run in range(2, schedule.repeat + 1):
        for i in range(len(passes)):
            for subject, timings in measured:
                progress(f"{subject.name}: {passes[i].label} ({run} of {schedule.repeat})")
                timings[i].runs.append(_timed_run(subject, passes[i], run))
    gc.unfreeze()
    return [row for subject, timings in measured for row in work.rows(subject, timings)]


def _first_run(subject: Subject, one: Pass, warmup: int | None, progress: Progress) -> Timing:
    requests = one.requests(subject.model_config.vocab_size, run=0)
    if warmup is None:
        warmup = len(requests) if subject.device.type == "cuda" else _CPU_WARMUP
    if warmup:
        progress(f"{subject.name}: {one.label} (warming up)")
        one.run(subject, requests[:warmup])
    progress(f"{subject.name}: {one.label}")
    reset_peak_memory(subject.device)
    run = _timed_run(subject, one, run=1)
    return Timing(one, [run], peak_memory_bytes(subject.device))


def _timed_run(subject: Subject, one: Pass, run: int) -> Run:
    requests = one.requests(subject.model_config.vocab_size, run)
    gc.collect()  # not while the clock runs
    return one.run(subject, requests)


def percentile_fields(name: str, seconds: Sequence[float]) -> Row:
    """``{name}_p50_s`` and so on; empty where there is nothing to say."""
    return {f"{name}_{point}_s": value for point, value in percentiles(seconds).items()}


def cost_fields(name: str, cost: Cost) -> Row:
    """Bytes and FLOPs of a row; ``report.add_roofline`` makes times of them."""
    return {f"{name}_bytes": cost.bytes, f"{name}_flops": cost.flops}

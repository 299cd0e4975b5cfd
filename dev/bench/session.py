"""A measurement from beginning to end: one milestone in this process, several in fresh ones."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from common.environment import describe_environment
from common.trace import Trace
from dev.bench.measure import Loader, Progress, Schedule, Work, measure
from dev.bench.report import SCHEMA, Report, add_roofline
from dev.bench.roofline import Ceilings, measure_ceilings
from dev.bench.runner import EngineSubject, config_class, open_checkpoint
from dev.bench.workloads import check_fits


@dataclass(frozen=True)
class Task:
    """One milestone and what to do with it. Plain data: it is sent to another process."""

    milestone: str
    options: Mapping[str, Any]
    work: Work
    schedule: Schedule
    against_hf: bool = False
    threads: int | None = None
    ceilings: Ceilings | str = "measure"  # or "skip"
    trace: Path | None = None  # where to write down what the engine does at each step


def run_tasks(tasks: Sequence[Task], command: str) -> Report:
    """Run all and put their rows into one report.

    Several get a process each, so that neither memory nor caches nor compiled kernels of one help
    or hurt the next; the ceilings the first measures hold for all.

    Raises:
        ValueError: the work or an option makes no sense for a milestone; nothing has run then,
            unless only the size of its cache stands in the way.
    """
    for task in tasks:
        check(task)
    if len(tasks) == 1:
        report = run_task(tasks[0])
    else:
        report = _in_fresh_process(tasks[0])
        for task in tasks[1:]:
            if report["ceilings"] is not None:
                task = replace(task, ceilings=Ceilings(**report["ceilings"]))
            other = _in_fresh_process(task)
            report["rows"] += other["rows"]
            report["options"] |= other["options"]
    return {"schema": SCHEMA, "kind": tasks[0].work.kind, "command": command, **report}


def check(task: Task) -> None:
    """ValueError for what can be known to be wrong before any weight is loaded."""
    config = config_class(task.milestone).from_options(**task.options)
    model = open_checkpoint(task.milestone, config.model, config.seed).config
    config.resolve_dtype(model)
    max_model_len = config.resolve_max_model_len(model)
    for one in task.work.passes():
        check_fits(one.requests(model.vocab_size, run=0), max_model_len, task.milestone)


def _in_fresh_process(task: Task) -> Report:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(run_task, task).result()


def run_task(task: Task) -> Report:
    """Measure one milestone, and what it is held against, in this process.

    Returns:
        The report without its head: work, environment, ceilings, options, rows.
    """
    if task.threads:
        torch.set_num_threads(task.threads)
    load_average = os.getloadavg()[0]  # of others: before this process adds to it
    report, device, dtype = _measure(task, _say)
    # The engine is gone by now, and on a GPU its cache has made room.
    gc.collect()
    torch.cuda.empty_cache()
    ceilings = task.ceilings
    if ceilings == "measure":
        _say("measuring the ceilings")
        ceilings = measure_ceilings(device, dtype)
    report["environment"] = {**describe_environment(device), "load_average": load_average}
    report["ceilings"] = None
    if isinstance(ceilings, Ceilings):
        report["ceilings"] = asdict(ceilings)
        add_roofline(report["rows"], ceilings)
    return report


def _say(text: str) -> None:
    """Progress, for who looks on. A line, no animation: that would run beside what is timed."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(escape(text), style="dim")


def _measure(task: Task, progress: Progress) -> tuple[Report, torch.device, torch.dtype]:
    with ExitStack() as files:
        # Opened before the model is loaded: a place that cannot be written to is known at once.
        trace = None if task.trace is None else files.enter_context(Trace(task.trace))
        return _measure_engine(task, progress, trace)


def _measure_engine(
    task: Task, say: Progress, trace: Trace | None
) -> tuple[Report, torch.device, torch.dtype]:
    def progress(text: str) -> None:
        say(text)
        if trace is not None and trace.is_attached:
            trace.mark(text)

    progress(f"{task.milestone}: loading")
    engine = EngineSubject(task.milestone, task.options)
    if trace is not None:
        trace.attach(engine.engine)
    loaders: list[Loader] = [lambda: engine]
    if task.against_hf:
        from dev.bench.hf import TransformersSubject  # transformers takes seconds to import

        loaders.append(lambda: TransformersSubject.beside(engine, task.work.batch_size))
    rows = measure(task.work, loaders, task.schedule, progress)
    report = {
        "work": dict(task.work.describe()),
        "options": {task.milestone: engine.describe()},
        "rows": rows,
    }
    return report, engine.device, engine.dtype

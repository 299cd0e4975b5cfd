"""What tracing costs: passes with and without a trace take turns in one process."""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from common.cli import add_engine_options, engine_options
from common.trace import Trace
from dev.bench.arguments import count, lengths
from dev.bench.runner import EngineSubject, config_class, find_milestone
from dev.bench.workloads import check_fits, random_requests


class TimedTrace(Trace):
    """Counts the seconds that the engine spends in it, beside what it does."""

    seconds = 0.0

    def added(self, *arguments: Any) -> None:
        self._time(super().added, *arguments)

    def finished(self, *arguments: Any) -> None:
        self._time(super().finished, *arguments)

    def step(self, *arguments: Any, **options: Any) -> None:
        self._time(super().step, *arguments, **options)

    def _time(self, method: Callable[..., None], *arguments: Any, **options: Any) -> None:
        start = time.perf_counter()
        method(*arguments, **options)
        self.seconds += time.perf_counter() - start


def add_options(parser: argparse.ArgumentParser, milestone: str) -> None:
    """The work to measure it on, and the options of the milestone's engine."""
    add = parser.add_argument
    add("--milestone", default=milestone, metavar="mN_x", help=f"(default: {milestone})")
    add("--num-requests", type=count, default=4, metavar="N", help="(default: 4)")
    add("--input-len", type=lengths, default="64", metavar="A:B", help="(default: 64)")
    add("--output-len", type=lengths, default="32", metavar="A:B", help="(default: 32)")
    add("--rounds", type=count, default=5, metavar="N", help="of one pass each (default: 5)")
    add_engine_options(parser, [config_class(milestone)])


def measure(args: argparse.Namespace, console: Console) -> None:
    """Print milliseconds a step without and with a trace, and their ratio.

    Raises:
        ValueError: the work does not fit the engine.
    """
    milestone = find_milestone(args.milestone)
    subject = EngineSubject(milestone, engine_options(args, config_class(milestone)))
    times: dict[bool, list[float]] = {False: [], True: []}
    inside: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds + 1):
            for is_traced in (False, True) if number % 2 else (True, False):
                file = Path(folder) / "trace.jsonl" if is_traced else None
                # Prompts that no pass has seen, or a prefix index would have them.
                whole, in_trace = _run(subject, args, 2 * number + is_traced, file)
                if number:  # the first round is a warm-up
                    times[is_traced].append(whole)
                if file is not None:
                    inside.append(in_trace)
                    num_bytes = file.stat().st_size
    console.print(f"{milestone}, {args.num_requests} requests, ms a step", highlight=False)
    # On a machine with other work the fastest pass tells more than the median does.
    for name, of in (("median", statistics.median), ("fastest", min)):
        without, traced = of(times[False]), of(times[True])
        console.print(
            f"{name:>8} of {args.rounds}: {without:.3f}, traced {traced:.3f}, "
            f"ratio {traced / without:.3f}",
            highlight=False,
        )
    # This holds on any machine: what other work does to a pass, it does to both.
    share = statistics.median(inside) / (statistics.median(times[True]) - statistics.median(inside))
    console.print(
        f"  in the trace itself: {1e3 * statistics.median(inside):.0f} us a step, {share:.2%} of "
        "the rest",
        highlight=False,
    )
    console.print(f"the file of a pass has {num_bytes:,} bytes", highlight=False)


def _run(
    subject: EngineSubject, args: argparse.Namespace, number: int, file: Path | None
) -> tuple[float, float]:
    """Milliseconds a step of one pass, and those in the trace; other numbers: other prompts."""
    requests = random_requests(
        args.num_requests,
        args.input_len,
        args.output_len,
        vocab_size=subject.model_config.vocab_size,
        seed=0,
        run=number,
    )
    check_fits(requests, subject.max_model_len, subject.name)
    gc.collect()
    in_trace = 0.0
    if file is None:
        run = subject.run(requests, temperature=0.0)
    else:
        with TimedTrace(file) as trace:
            trace.attach(subject.engine)
            run = subject.run(requests, temperature=0.0)
            in_trace = trace.seconds
    num_steps = run.counters["num_steps"]
    return 1e3 * run.seconds / num_steps, 1e3 * in_trace / num_steps

"""Start-up: from the start of the process to the first tokens of a prompt.

    python -m dev.bench startup --milestone m3 --milestone m4 --model random:qwen3-0.6b

Every run is a process of its own: once with an empty Triton cache (``cold``: every kernel is
compiled), once more with the cache the first run has filled (``warm``). Before them a process that
only imports brings the libraries into the file cache, so that the two differ in the kernels alone.
What other things leave behind (CUDA C++ kernels in FOLOVLLM_CACHE, checkpoints) is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.cli import add_engine_options, engine_options
from common.environment import REPOSITORY, describe_environment
from dev.bench.arguments import count, writable_file
from dev.bench.latency import LatencyWork
from dev.bench.measure import Schedule
from dev.bench.report import SCHEMA, Report, Row, write_json
from dev.bench.runner import config_class, find_milestone
from dev.bench.session import Task, check

HELP = "from the start of the process to the first tokens, kernels compiled or not"
DEFAULT_MILESTONE = "m3_paged"
_LONGEST_S = 1800.0  # of a process, before it is given up


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of ``python -m dev.bench startup``; ValueError: an unknown milestone."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--milestone", action="append")
    chosen = first.parse_known_args(argv)[0].milestone or [DEFAULT_MILESTONE]
    milestones = list(dict.fromkeys(find_milestone(name) for name in chosen))

    parser = argparse.ArgumentParser(
        prog="python -m dev.bench startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("the measurement").add_argument
    add("--milestone", action="append", metavar="mN_x",
        help=f"repeatable (default: {DEFAULT_MILESTONE})")
    add("--input-len", type=count, default=512, metavar="T", help="of the prompt (default: 512)")
    add("--output-len", type=count, default=16, metavar="T", help="of the output (default: 16)")
    add("--json", type=writable_file, metavar="FILE", help="write the report there")
    add("--quiet", action="store_true", help="no table")
    add_engine_options(parser, [config_class(milestone) for milestone in milestones])
    args = parser.parse_args(argv)
    args.milestone = milestones
    return args


def main(argv: Sequence[str], command: str = "python -m dev.bench startup") -> Report:
    """Measure; returns the report, whose rows are two for each milestone.

    Raises:
        ValueError: an option makes no sense for a milestone; nothing has run then.
        RuntimeError: a process failed; the message ends with the last line of its errors.
    """
    args = parse(argv)
    jobs = [_job(args, milestone) for milestone in args.milestone]
    rows: list[Row] = []
    options: dict[str, Any] = {}
    with Console(stderr=True).status("") as status:
        for job in jobs:
            milestone, results = job["milestone"], measure(
                job, lambda text: status.update(escape(text))
            )
            rows += [_row(job, case, result) for case, result in results.items()]
            options[milestone] = results["warm"]["options"]
    report: Report = {
        "schema": SCHEMA,
        "kind": "startup",
        "command": shlex.join([*command.split(), *argv]),
        "work": {"input_len": args.input_len, "output_len": args.output_len},
        "options": options,
        "rows": rows,
        "environment": describe_environment(torch.device(results["warm"]["device"])),
        "ceilings": None,
    }
    if args.json:
        write_json(report, args.json)
    if not args.quiet:
        show(report, Console())
    return report


def measure(job: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """What the processes say, ``cold`` and ``warm``, with the time they were ``spawned``."""
    progress(f"{job['milestone']}: importing")
    with tempfile.TemporaryDirectory(prefix="folovllm-startup-") as folder:
        _spawn({**job, "imports_only": True}, folder)
        results = {}
        for case in ("cold", "warm"):
            progress(f"{job['milestone']}: {case} start")
            before = _num_kernels(folder)
            results[case] = _spawn(job, folder)
            results[case]["num_kernels_compiled"] = _num_kernels(folder) - before
    return results


def _job(args: argparse.Namespace, milestone: str) -> dict[str, Any]:
    """What a process is to do; ValueError where it cannot."""
    options = engine_options(args, config_class(milestone))
    seed = args.engine_seed or 0
    work = LatencyWork((1,), args.input_len, args.output_len, (), seed)
    check(Task(milestone, options, work, Schedule(repeat=1)))
    return {
        "milestone": milestone,
        "options": options,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "seed": seed,
        "imports_only": False,
    }


def _spawn(job: Mapping[str, Any], triton_cache: str) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": triton_cache}
    command = [sys.executable, "-m", "dev.bench.startup_child", json.dumps(job)]
    spawned = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_LONGEST_S
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{job['milestone']} was not there after {_LONGEST_S:.0f} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{job['milestone']} did not start ({done.returncode}): {reason}")
    result = json.loads(done.stdout.splitlines()[-1])
    result["times"]["spawned"] = spawned
    return result


def _num_kernels(folder: str) -> int:
    """Compiled kernels in a Triton cache."""
    return sum(1 for _ in Path(folder).rglob("*.cubin"))


def _row(job: Mapping[str, Any], case: str, result: Mapping[str, Any]) -> Row:
    at = result["times"]
    return {
        "name": job["milestone"],
        "measure": "startup",
        "case": case,
        "input_len": job["input_len"],
        "output_len": job["output_len"],
        "first_token_s": at["first_token"] - at["spawned"],
        "last_token_s": at["last_token"] - at["spawned"],
        "interpreter_s": at["started"] - at["spawned"],
        "imports_s": at["imported"] - at["started"],
        "engine_s": at["constructed"] - at["imported"],
        "prefill_s": at["first_token"] - at["constructed"],
        "decode_s": at["last_token"] - at["first_token"],
        "num_kernels_compiled": result["num_kernels_compiled"],
        "num_graphs_captured": result["stats"]["num_graphs_captured"],
        "capture_time_s": result["stats"]["capture_time_s"],
    }


_LINES = (
    ("to the first token", "first_token_s"),
    ("to the last token", "last_token_s"),
    ("  interpreter", "interpreter_s"),
    ("  imports", "imports_s"),
    ("  engine", "engine_s"),
    ("  prefill", "prefill_s"),
    ("  decode", "decode_s"),
    ("    capturing graphs", "capture_time_s"),
)
_COUNTS = (("kernels compiled", "num_kernels_compiled"), ("graphs captured", "num_graphs_captured"))


def show(report: Report, console: Console) -> None:
    """Print a column for each start."""
    model = next(iter(report["options"].values()))["model"]
    where = report["environment"]["gpu"] or report["environment"]["cpu"]
    work = report["work"]
    console.print(
        f"[bold]startup[/bold] of {escape(model)} on {where}\n"
        f"prompt of {work['input_len']}, {work['output_len']} output tokens, from process start",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column("", no_wrap=True)
    for row in report["rows"]:
        table.add_column(f"{row['name']} {row['case']}", justify="right")
    for label, field in _LINES:
        table.add_row(label, *(f"{row[field]:,.2f} s" for row in report["rows"]))
    for label, field in _COUNTS:
        table.add_row(label, *(f"{row[field]:,}" for row in report["rows"]))
    console.print(table)

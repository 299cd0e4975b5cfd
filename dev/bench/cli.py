"""The command line of the bench.

    python -m dev.bench throughput --milestone m3_paged --against hf --num-requests 32
    python -m dev.bench latency --milestone m2_batching --batch-size 1,8,64 --json latency.json
    python -m dev.bench serve --milestone m4_flash --request-rate 8 --goodput ttft:200
    python -m dev.bench mixed --milestone m4_flash --model random:qwen3-0.6b
    python -m dev.bench prefix --milestone m5_chunked --milestone m6_prefix --workload multi-turn
    python -m dev.bench startup --milestone m3_paged --model random:qwen3-0.6b
    python -m dev.bench kernels --suite decode --case 64x4096
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from common.cli import add_engine_options, engine_options
from dev.bench import kernels, latency, mixed, prefix, serve, startup, throughput
from dev.bench.arguments import ceilings, count, count_from_zero, writable_file
from dev.bench.measure import Schedule
from dev.bench.report import show, write_json
from dev.bench.runner import config_class, find_milestone
from dev.bench.session import Task, run_tasks

EXIT_OK, EXIT_USAGE, EXIT_INTERRUPTED = 0, 2, 130
DEFAULT_MILESTONE = "m3_paged"

KINDS = {
    "throughput": throughput,
    "latency": latency,
    "serve": serve,
    "mixed": mixed,
    "prefix": prefix,
}
# Transformers cannot take requests while others run, and a wait for arrivals has no roofline.
SERVING = ("serve", "mixed", "prefix")
# No requests to time: each has a command line and a report of its own.
COMMANDS = {"startup": startup, "kernels": kernels}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: wrong usage, or nothing to measure)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv and argv[0] in COMMANDS:
            COMMANDS[argv[0]].main(argv[1:])
            return EXIT_OK
        args = parse(argv)
        report = run_tasks(tasks(args), shlex.join(["python", "-m", "dev.bench", *argv]))
        if args.json:
            write_json(report, args.json)
    except (ValueError, RuntimeError, OSError) as error:
        message = f"error: {error}"
        Console(stderr=True).print(message, style="red", markup=False, highlight=False)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if not args.quiet:
        show(report, Console())
    return EXIT_OK


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """All options; those of the engines are the fields of the milestones' ``EngineConfig``.

    Raises:
        ValueError: an unknown milestone. argparse itself ends the program on other misuse.
    """
    # Which options there are depends on the milestones, so these are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--milestone", action="append")
    chosen = first.parse_known_args(argv)[0].milestone or [DEFAULT_MILESTONE]
    milestones = list(dict.fromkeys(find_milestone(name) for name in chosen))

    parser = argparse.ArgumentParser(
        prog="python -m dev.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = "|".join([*KINDS, *COMMANDS])
    kinds = parser.add_subparsers(dest="kind", required=True, metavar=names)
    for name, module in COMMANDS.items():
        kinds.add_parser(name, help=module.HELP)  # for the list; `main` has served it before
    for kind, module in KINDS.items():
        own = kinds.add_parser(kind, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_options(own)
        _add_run_options(own, is_serving=kind in SERVING)
        add_engine_options(own, [config_class(milestone) for milestone in milestones])
    args = parser.parse_args(argv)
    args.milestone = milestones
    return args


def _add_run_options(parser: argparse.ArgumentParser, is_serving: bool) -> None:
    add = parser.add_argument_group("the measurement").add_argument
    add("--milestone", action="append", metavar="mN_x",
        help="repeatable: several run in fresh processes, one after the other "
        f"(default: {DEFAULT_MILESTONE})")
    add("--repeat", type=count, metavar="N",
        help="runs, of which the median counts (default: 1 for throughput and serve, 3 for "
        "the others)")
    add("--warmup", type=count_from_zero, metavar="N",
        help="requests served before the clock runs (default: all on a GPU, 2 on the CPU)")
    add("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")
    if is_serving:
        parser.set_defaults(against=None, ceilings="skip")
    else:
        add("--against", choices=["hf"], help="transformers on the same work in the same process")
        add("--ceilings", type=ceilings, default="measure", metavar="measure|skip|GB/S,TFLOP/S",
            help="read bandwidth and matmul speed for the roofline (default: measure)")
    add("--json", type=writable_file, metavar="FILE", help="write the report there")
    add("--quiet", action="store_true", help="no table")
    add("--trace", type=writable_file, metavar="FILE",
        help="write down what the engine does at each step; python -m dev.trace view FILE shows it "
        "(of several milestones each gets its own file: FILE with its name before the ending)")


def tasks(args: argparse.Namespace) -> list[Task]:
    """What each milestone has to do; transformers run beside the first."""
    work = KINDS[args.kind].from_args(args)
    schedule = Schedule(args.repeat or work.default_repeat, args.warmup)
    result = []
    for milestone in args.milestone:
        options = engine_options(args, config_class(milestone))
        if work.max_num_seqs:
            options.setdefault("max_num_seqs", work.max_num_seqs)
        against_hf = args.against == "hf" and not result
        trace = args.trace
        if trace is not None and len(args.milestone) > 1:
            trace = trace.with_name(f"{trace.stem}.{milestone}{trace.suffix}")
        result.append(
            Task(milestone, options, work, schedule, against_hf, args.threads, args.ceilings, trace)
        )
    return result

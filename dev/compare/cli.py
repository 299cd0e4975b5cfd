"""The command line of the comparison.

    python -m dev.compare                                    # --quick: a minute on two CPU cores
    python -m dev.compare --milestone m3 --milestone m4 --only latency
    python -m dev.compare --preset h200 --json results.json --html page.html
    python -m dev.compare --preset h200 --json results.json --resume      # what is missing in it
    python -m dev.compare show --from results.json --html page.html
    python -m dev.compare report --from docs/results --markdown doc.md --chart ladder.svg
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from common.cli import add_engine_options, engine_options
from common.engine_config import BaseEngineConfig
from common.environment import describe_environment
from dev.bench.arguments import ceilings, count, positive, writable_file
from dev.bench.report import Report, write_json
from dev.bench.runner import config_class, find_milestone, milestone_names
from dev.compare.claims import NOT_HELD
from dev.compare.parts import PRESETS
from dev.compare.run import KIND, Plan, new_report, run
from dev.compare.terminal import show

EXIT_OK, EXIT_NOT_HELD, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: every claim that was checked is held; 1: one is not; 2: wrong usage, or nothing measured.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"show": show_command, "report": report_command}
    try:
        if argv and argv[0] in commands:
            return commands[argv[0]](argv[1:])
        return measure(argv)
    except (ValueError, RuntimeError, OSError) as error:
        message = f"error: {error}"
        Console(stderr=True).print(message, style="red", markup=False, highlight=False)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def measure(argv: Sequence[str]) -> int:
    """Run a preset and show what came out."""
    args = parse(argv)
    plan = plan_of(args)
    report = new_report(plan, shlex.join(["python", "-m", "dev.compare", *argv]))
    if args.resume:
        report = resumed(report, args.json)
    console = Console(stderr=True)

    def save(report: Report) -> None:
        if args.json:
            write_json(report, args.json)

    run(plan, report, save, lambda text: console.print(escape(text), style="dim", soft_wrap=True))
    return present(report, args.html, quiet=args.quiet)


def show_command(argv: Sequence[str]) -> int:
    """Show a report that was written before."""
    parser = argparse.ArgumentParser(
        prog="python -m dev.compare show", description=show_command.__doc__, allow_abbrev=False
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="FILE",
                        help="what --json has written")
    parser.add_argument("--html", type=writable_file, metavar="FILE", help="write the page there")
    parser.add_argument("--quiet", action="store_true", help="no table")
    args = parser.parse_args(argv)
    return present(read_report(args.source), args.html, quiet=args.quiet)


def report_command(argv: Sequence[str]) -> int:
    """Write the technical comparison and the ladder chart from committed results."""
    from dev.compare.document import write_document  # matplotlib is slow to import
    from dev.compare.ladder import write_ladder
    from dev.compare.sources import Sources

    parser = argparse.ArgumentParser(
        prog="python -m dev.compare report", description=report_command.__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--from", dest="sources", type=Path, action="append", required=True, metavar="FILE",
        help="a report of dev.bench or dev.compare, or a folder: its h200-*.json; repeatable")
    add("--markdown", type=writable_file, metavar="FILE", help="write the document there")
    add("--chart", type=writable_file, metavar="FILE", help="write the chart there (SVG)")
    args = parser.parse_args(argv)
    if not args.markdown and not args.chart:
        raise ValueError("say what to write: --markdown FILE, --chart FILE, or both")
    sources = Sources.read(args.sources)
    if args.markdown:
        write_document(sources, args.markdown, args.chart)
    if args.chart:
        write_ladder(sources, args.chart)
    return EXIT_OK


def present(report: Report, html: Path | None, *, quiet: bool) -> int:
    """Show a report; returns the exit code."""
    if html:
        from dev.compare.page import write_page  # matplotlib is slow to import

        write_page(report, html)
    if not quiet:
        show(report, Console())
    is_broken = any(claim["verdict"] == NOT_HELD for claim in report["claims"])
    return EXIT_NOT_HELD if is_broken else EXIT_OK


def read_report(path: Path) -> Report:
    """A report of this command; ValueError where the file is something else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise ValueError(f"{path} is not a report of dev.compare: give a file that --json wrote")
    if not report["rows"]:
        raise ValueError(f"{path} has no figures: run it again with --resume")
    return report


def resumed(report: Report, path: Path | None) -> Report:
    """The report in a file, to go on with; ValueError where it is of other work."""
    if path is None:
        raise ValueError("--resume goes on with the file of --json: name it")
    if not path.exists():
        return report
    old = json.loads(path.read_text(encoding="utf-8"))
    for name in ("kind", "schema", "preset", "scale", "model"):
        if old.get(name) != report[name]:
            raise ValueError(f"{path} is of another run: its {name} is {old.get(name)!r}, not "
                             f"{report[name]!r}; leave --resume away, or write elsewhere")
    if old["environment"] is not None:
        now = describe_environment(torch.device("cpu"))
        for name in ("commit", "cpu", "torch"):
            if old["environment"][name] != now[name]:
                raise ValueError(f"{path} is of another {name} ({old['environment'][name]}): rows "
                                 "of both would not compare; leave --resume away")
    new = report["parts"]
    for name, part in old["parts"].items():
        if name in new and new[name]["work"] != part["work"]:
            raise ValueError(f"{path} is of another run: its part {name} is other work")
    names = sorted({*old["milestones"], *report["milestones"]})
    # In the order of the preset, with what the file has beyond this run behind.
    parts = {name: old["parts"].get(name, part) for name, part in new.items()}
    return {**old, "command": report["command"], "milestones": names,
            "parts": {**parts, **{k: v for k, v in old["parts"].items() if k not in parts}}}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """All options; those of the engines are the fields of the milestones' ``EngineConfig``.

    Raises:
        ValueError: an unknown milestone. argparse itself ends the program on other misuse.
    """
    # Which options there are depends on the milestones, so these are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--milestone", action="append")
    chosen = first.parse_known_args(argv)[0].milestone
    names = chosen or [name for name in milestone_names() if name >= "m1"]
    milestones = sorted({find_milestone(name) for name in names})

    parser = argparse.ArgumentParser(
        prog="python -m dev.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("the comparison").add_argument
    add("--quick", dest="preset", action="store_const", const="quick",
        help="small work for two CPU cores; the default without a GPU")
    add("--preset", choices=PRESETS, help="h200: the run whose results the documents show")
    add("--milestone", action="append", metavar="mN_x",
        help="repeatable (default: all from m1 on)")
    add("--only", action="append", metavar="PART", help="repeatable: these parts alone")
    add("--scale", type=positive, default=1.0, metavar="F",
        help="multiplies lengths, and numbers of requests below a quarter (default: 1)")
    add("--limit", type=positive, metavar="S",
        help="no part begins after so many seconds (default: the preset's)")
    add("--resume", action="store_true", help="measure only what the file of --json has not")
    add("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")
    add("--ceilings", type=ceilings, default="measure", metavar="measure|skip|GB/S,TFLOP/S",
        help="read bandwidth and matmul speed for the roofline (default: measure)")
    add("--json", type=writable_file, metavar="FILE", help="write the report there, part by part")
    add("--html", type=writable_file, metavar="FILE", help="write a page with plots there")
    add("--quiet", action="store_true", help="no table")
    configs: list[type[BaseEngineConfig]] = [config_class(name) for name in milestones]
    add_engine_options(parser, configs)
    parser.set_defaults(preset=None)
    args = parser.parse_args(argv)
    args.milestone = milestones
    args.preset = args.preset or ("h200" if torch.cuda.is_available() else "quick")
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    """What was asked for; ValueError: an unknown part."""
    preset = PRESETS[args.preset]
    parts = preset.parts(args.scale)
    names = [part.name for part in parts]
    for name in args.only or []:
        if name not in names:
            raise ValueError(f"there is no part {name!r} in {preset.name}: it has "
                             f"{', '.join(names)}")
    if args.only:
        parts = [part for part in parts if part.name in args.only]
    options = {}
    for milestone in args.milestone:
        options |= engine_options(args, config_class(milestone))
    return Plan(preset, args.milestone, parts, options, args.scale, args.threads, args.ceilings,
                args.limit)

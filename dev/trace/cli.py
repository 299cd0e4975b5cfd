"""The command line: view, summary, export, screenshot, cost."""

from __future__ import annotations

import argparse
import json
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dev.bench.runner import find_milestone, milestone_names
from dev.trace import cost
from dev.trace.page_file import page
from dev.trace.perfetto import trace_events
from dev.trace.reader import Trace, read_trace
from dev.trace.screenshot import take_screenshot
from dev.trace.summary import show

EXIT_OK, EXIT_USAGE = 0, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: wrong usage, or a file that is no trace)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    console = Console(stderr=True)
    try:
        args = _parser(_milestone(argv)).parse_args(argv)
        args.run(args, console)
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return EXIT_USAGE
    return EXIT_OK


def _milestone(argv: Sequence[str]) -> str:
    """Whose engine is measured: it says which options there are. ValueError if there is none."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--milestone", default=milestone_names()[-1])
    return find_milestone(first.parse_known_args(argv)[0].milestone)


def _parser(milestone: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dev.trace",
        description=sys.modules["dev.trace"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="view|summary|export|screenshot|cost")

    view = commands.add_parser("view", help="write a page to watch a trace, or two side by side")
    view.set_defaults(run=_view)
    _add_files(view)
    view.add_argument("--output", type=Path, metavar="FILE",
        help="where the page goes (default: beside the trace, with the ending .html)")
    view.add_argument("--open", action=argparse.BooleanOptionalAction, default=None,
        help="show it in the browser (default: if this is a terminal)")

    summary = commands.add_parser("summary", help="print what a run did, and each request")
    summary.set_defaults(run=_summary)
    _add_files(summary)

    export = commands.add_parser("export", help="write a trace for another program")
    export.set_defaults(run=_export)
    export.add_argument("file", type=Path, help="a trace")
    export.add_argument("--perfetto", type=Path, metavar="FILE", required=True,
        help="Chrome trace events, for ui.perfetto.dev and chrome://tracing")

    screenshot = commands.add_parser("screenshot", help="picture of the page (needs Chromium)")
    screenshot.set_defaults(run=_screenshot)
    _add_files(screenshot)
    add = screenshot.add_argument
    add("--output", type=Path, metavar="FILE", required=True, help="a .png file")
    add("--frame", type=int, default=0, metavar="N", help="what step to show (default: 0)")
    add("--size", type=_size, default=(1280, 800), metavar="WxH", help="(default: 1280x800)")
    add("--dark", action="store_true", help="in dark colours")

    measured = commands.add_parser("cost", help="measure what tracing costs", allow_abbrev=False)
    measured.set_defaults(run=cost.measure)
    cost.add_options(measured, milestone)
    return parser


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"give width and height, like 1280x800, not {text!r}")
    return int(width), int(height)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a trace")
    parser.add_argument("other", type=Path, nargs="?", help="another one, to stand beside it")


def _read(args: argparse.Namespace, console: Console) -> list[Trace]:
    traces = [read_trace(path) for path in (args.file, args.other) if path is not None]
    for trace in traces:
        for note in trace.notes:
            console.print(f"{trace.path}: {note}", style="yellow", markup=False, highlight=False)
    return traces


def _summary(args: argparse.Namespace, console: Console) -> None:
    for trace in _read(args, console):
        show(trace, Console())


def _export(args: argparse.Namespace, console: Console) -> None:
    trace = read_trace(args.file)
    args.perfetto.write_text(json.dumps(trace_events(trace)), encoding="utf-8")
    print(args.perfetto)


def _screenshot(args: argparse.Namespace, console: Console) -> None:
    take_screenshot(
        page(_read(args, console)),
        args.output,
        size=args.size,
        frame=args.frame,
        is_dark=args.dark,
    )
    print(args.output)


def _view(args: argparse.Namespace, console: Console) -> None:
    text = page(_read(args, console))
    output = args.output or args.file.with_suffix(".html")
    output.write_text(text, encoding="utf-8")
    print(output)
    if sys.stdout.isatty() if args.open is None else args.open:
        webbrowser.open(output.resolve().as_uri())

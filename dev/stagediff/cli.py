"""The command line: ``python -m dev.stagediff``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import dev.stagediff
from dev.stagediff.highlight import DARK, LIGHT, Palette
from dev.stagediff.html import write_page
from dev.stagediff.reading import Reading, read
from dev.stagediff.sizes import step_sizes
from dev.stagediff.stages import REPOSITORY, Stage, find_stage, find_stages
from dev.stagediff.terminal import Printer, show_files, show_steps

EXIT_OK, EXIT_USAGE, EXIT_INTERRUPTED = 0, 2, 130


def main(argv: Sequence[str] | None = None, root: Path = REPOSITORY) -> int:
    """Run the command line; returns the exit code (2: wrong usage)."""
    args = build_parser().parse_args(argv)
    colour = {"always": True, "never": False, "auto": None}[args.color]
    console = Console(
        force_terminal=colour, no_color=colour is False or None, highlight=False,
        width=None if sys.stdout.isatty() else max(Console().width, 120),
    )  # fmt: skip
    try:
        _run(args, console, root)
    except (ValueError, OSError) as error:
        message = f"error: {error}"
        Console(stderr=True).print(message, style="red", markup=False, highlight=False)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        prog="python -m dev.stagediff",
        description=dev.stagediff.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="mN [mN] [FILE ...]",
        help="two milestones, the older one first; one alone is compared with the one before it. "
        "Files behind them limit what is shown")
    add("--stat", action="store_true",
        help="sizes instead of lines; without milestones, those of every step")
    add("--html", type=Path, metavar="FILE", help="write one page there, for any browser")
    add("--full", action="store_true",
        help="files that are new or gone as a whole, not as an outline (a file named is shown so)")
    add("--context", type=_count, default=3, metavar="N",
        help="unchanged lines shown around a change (default: 3)")
    add("--theme", choices=["auto", "light", "dark"], default="auto",
        help="the terminal's background (default: auto, which asks COLORFGBG and believes in dark)")
    add("--color", choices=["auto", "always", "never"], default="auto",
        help="always is for `| less -R` (default: auto, colours on a terminal)")
    return parser


def _run(args: argparse.Namespace, console: Console, root: Path) -> None:
    stages = find_stages(root)
    if args.stat and not args.names:
        if args.html:
            raise ValueError("--html shows two milestones: name them")
        show_steps(console, step_sizes(stages, root))
        return
    reading, is_limited = choose(args.names, stages, root)
    if args.html:
        write_page(args.html, reading, args.context, args.full or is_limited, root)
        console.print(f"{args.html}: {reading.old.name} → {reading.new.name}", markup=False)
    elif args.stat:
        show_files(console, reading)
    else:
        is_full = args.full or is_limited
        Printer(console, reading, _palette(args.theme), args.context, is_full).show()


def choose(names: Sequence[str], stages: Sequence[Stage], root: Path) -> tuple[Reading, bool]:
    """The reading that the command line names, and whether it is limited to some files.

    Raises:
        ValueError: no milestone, an unknown one, the wrong order, an unknown file.
    """
    known = ", ".join(stage.name for stage in stages)
    if not names:
        raise ValueError(f"name two milestones, as in `m3 m4`; there are: {known}")
    first, rest = find_stage(names[0], stages), list(names[1:])
    if rest and not Path(rest[0]).suffix:  # every file has one
        old, new = first, find_stage(rest.pop(0), stages)
    elif first is stages[0]:
        raise ValueError(f"{first.name} is the first milestone: name another one to compare it to")
    else:
        old, new = stages[stages.index(first) - 1], first
    reading = read(old, new, stages, root)
    return (reading.only(rest), True) if rest else (reading, False)


def _palette(theme: str) -> Palette:
    if theme == "auto":
        # "foreground;background", as some terminals tell; 7 and 15 are white.
        theme = "light" if os.environ.get("COLORFGBG", "").endswith((";7", ";15")) else "dark"
    return LIGHT if theme == "light" else DARK


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"give a whole number from 0 on, not {text!r}")
    return int(text)

"""``python -m mN_x.run``: the same command line in every milestone.

Sampling options are written down here; the engine's options are generated from the fields of the
milestone's ``EngineConfig``. Results go to stdout, everything else (progress, errors, statistics)
to stderr, so that output can be piped.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from common.engine_config import BaseEngineConfig
from common.llm import Engine
from common.prompts import PromptLine, read_prompts
from common.sampling_params import SamplingParams
from common.session import Printer, Session
from common.trace import Trace

EXIT_OK, EXIT_SOME_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

Demonstration = Callable[[Engine, SamplingParams, Console], None]


def main(
    engine_class: type[Engine],
    config_class: type[BaseEngineConfig],
    demonstrate: Demonstration,
    description: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Run the command line; returns the exit code.

    0: all prompts were served; 1: some could not be, the others were; 2: wrong usage, or the
    engine could not be set up; 130: interrupted, what was done has been printed.
    """
    args = build_parser(config_class, description).parse_args(argv)
    with ExitStack() as files:
        return _main(engine_class, config_class, demonstrate, args, files)


def _main(
    engine_class: type[Engine],
    config_class: type[BaseEngineConfig],
    demonstrate: Demonstration,
    args: argparse.Namespace,
    files: ExitStack,
) -> int:
    console = Console(stderr=True)
    output, trace = None, None
    try:
        params = sampling_params(args)
        lines = gather_prompts(args)
        # Opened before the model is loaded: a place that cannot be written to is known at once.
        if args.output is not None:
            output = files.enter_context(args.output.open("w", encoding="utf-8"))
        if args.trace is not None:
            trace = files.enter_context(Trace(args.trace))
        config = config_class.from_options(**engine_options(args, config_class))
        with console.status(f"Loading {config.model} ..."):
            engine = engine_class(config)
    except (ValueError, RuntimeError, OSError) as error:
        return _refuse(error, console)
    if trace is not None:
        trace.attach(engine)
    if not lines:
        try:
            demonstrate(engine, params, Console())
        except ValueError as error:  # its prompts don't fit what the engine was limited to
            return _refuse(error, console)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        return EXIT_OK
    printer = Printer(lines, stream=args.stream, as_json=args.json, output=output)
    session = Session(engine, lines, params, chat=args.chat, printer=printer)
    interrupted = session.run(console)
    printer.finish(engine.stats())
    if args.stats:
        print_stats(engine.stats(), console)
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_SOME_FAILED if printer.num_failed else EXIT_OK


def _refuse(error: Exception, console: Console) -> int:
    console.print(f"error: {error}", style="red", markup=False, highlight=False)
    return EXIT_USAGE


def build_parser(
    config_class: type[BaseEngineConfig], description: str
) -> argparse.ArgumentParser:
    """All options of one milestone."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {config_class.__module__.split('.')[0]}.run",
        description=description,
        epilog="Without --prompt and --prompts-file a short demonstration runs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("what to generate")
    add = group.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable")
    add("--prompts-file", type=Path, metavar="FILE", help="text (a prompt a line) or .jsonl")
    add("--chat", action=argparse.BooleanOptionalAction, default=None,
        help="apply the chat template to text prompts (default: if the model has one)")
    group = parser.add_argument_group("what to show")
    add = group.add_argument
    add("--output", type=Path, metavar="FILE", help="write results as JSONL, each as it finishes")
    add("--stream", action="store_true", help="print text as it is generated")
    add("--json", action="store_true", help="print one JSON object with outputs and stats")
    add("--stats", action="store_true", help="print the engine's counters at the end")
    add("--trace", type=Path, metavar="FILE",
        help="write down what the engine does at each step; python -m dev.trace view FILE shows it")
    group = parser.add_argument_group("sampling")
    for name, kind, help in _SAMPLING_OPTIONS:
        flag = "--" + name.replace("_", "-")
        group.add_argument(
            flag, type=kind, metavar=_METAVARS[kind], default=_default(name), help=_help(help, name)
        )
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop string; repeatable")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end token")
    add_engine_options(parser, [config_class])
    return parser


# The name of the SamplingParams field, its type, what it does. --seed is the engine's: one seed for
# weights and sampling alike keeps a command reproducible.
_SAMPLING_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "most tokens to generate"),
    ("min_tokens", int, "fewest tokens to generate"),
    ("temperature", float, "0 takes the likeliest token"),
    ("top_k", int, "sample from the k likeliest tokens; 0: from all"),
    ("top_p", float, "sample from the likeliest tokens that make up this probability"),
    ("min_p", float, "drop tokens less likely than this share of the likeliest"),
    ("repetition_penalty", float, "above 1: tokens seen before become less likely"),
    ("presence_penalty", float, "subtracted from logits of tokens generated before"),
    ("frequency_penalty", float, "the same for every time they were generated"),
    ("n", int, "samples for each prompt"),
    ("logprobs", int, "report log-probabilities of this many likeliest tokens (with --json)"),
)
_METAVARS = {int: "N", float: "X", str: "NAME"}
# What a person at a terminal expects, where it differs from the library's defaults.
_CLI_DEFAULTS = {"max_tokens": 128, "temperature": 0.0}


def _default(name: str) -> Any:
    return _CLI_DEFAULTS.get(name, SamplingParams.__dataclass_fields__[name].default)


def _help(text: str, name: str) -> str:
    default = _default(name)
    return text if default is None else f"{text} (default: {default})"


def add_engine_options(
    parser: argparse.ArgumentParser, config_classes: Sequence[type[BaseEngineConfig]]
) -> None:
    """An option for every field that one of the configurations has, None unless it is given."""
    group = parser.add_argument_group("engine")
    fields: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for config_class in config_classes:
        hints = typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            fields.setdefault(field.name, (field, hints[field.name]))
    for name, (field, hint) in fields.items():
        text = field.metadata.get("help", "").replace("%", "%%")
        if field.default is not None and field.default != "auto":
            text += f" (default: {field.default})"
        options: dict[str, Any] = {"dest": f"engine_{name}", "help": text}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind, choices = _plain_type(hint), field.metadata.get("choices")
            metavar = None if choices else _METAVARS[kind]
            options |= {"type": kind, "choices": choices, "metavar": metavar}
        group.add_argument("--" + name.replace("_", "-"), **options)


def engine_options(
    args: argparse.Namespace, config_class: type[BaseEngineConfig]
) -> dict[str, Any]:
    """What was given of the options that a configuration has, by field."""
    names = [field.name for field in dataclasses.fields(config_class)]
    given = {name: getattr(args, f"engine_{name}", None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _plain_type(hint: Any) -> Any:
    """``int`` of ``int | None``: what argparse should make of the option's text."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The command line's sampling options; ValueError if one is out of range."""
    options = {name: getattr(args, name) for name, _, _ in _SAMPLING_OPTIONS}
    return SamplingParams(**options, stop=args.stop, ignore_eos=args.ignore_eos)


def gather_prompts(args: argparse.Namespace) -> list[PromptLine]:
    """Prompts of the command line, then those of the file."""
    lines = [PromptLine(f"--prompt {i}", text) for i, text in enumerate(args.prompt, start=1)]
    return lines + (read_prompts(args.prompts_file) if args.prompts_file else [])


def print_stats(stats: dict[str, Any], console: Console) -> None:
    """The engine's counters as a table."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in stats.items():
        if value is None or value == {}:
            continue
        if isinstance(value, dict):
            shown = ", ".join(f"{key}: {count:,}" for key, count in value.items())
        else:
            shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
        table.add_row(name.replace("_", " "), shown)
    console.print(table)


def run(*arguments: Any, **options: Any) -> None:
    """``main`` as a program: leaves the interpreter with the exit code."""
    sys.exit(main(*arguments, **options))

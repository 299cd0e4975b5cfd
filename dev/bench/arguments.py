"""Reading the bench's options: numbers, ranges, and the fields of the engines' configurations."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dev.bench.roofline import Ceilings
from dev.bench.runner import config_class
from dev.bench.workloads import Lengths


def count(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a whole number of at least 1, not {text!r}")
    return int(text)


def count_from_zero(text: str) -> int:
    """A number that may be 0."""
    return 0 if text == "0" else count(text)


def counts(text: str) -> tuple[int, ...]:
    """Several of them, separated by commas."""
    return tuple(count(part.strip()) for part in text.split(","))


def lengths(text: str) -> Lengths:
    """A range of lengths, or one length."""
    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def writable_file(text: str) -> Path:
    """Where a report can go: known before the work begins, not after."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file in it")
    return path


def ceilings(text: str) -> Ceilings | str:
    """``measure``, ``skip``, or read bandwidth in GB/s and matmul speed in TFLOP/s."""
    if text in ("measure", "skip"):
        return text
    try:
        read_gb, tflops = (float(part) for part in text.split(","))
        if min(read_gb, tflops) <= 0:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"give measure, skip, or GB/s and TFLOP/s (like 4300,686), not {text!r}"
        ) from None
    return Ceilings(read_gb * 1e9, tflops * 1e12, "given")


def add_engine_options(parser: argparse.ArgumentParser, milestones: Sequence[str]) -> None:
    """Every field that one of the milestones has, as ``engine_*`` of the namespace."""
    group = parser.add_argument_group("the engine")
    fields: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for milestone in milestones:
        config = config_class(milestone)
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            fields.setdefault(field.name, (field, hints[field.name]))
    for name, (field, hint) in fields.items():
        options: dict[str, Any] = {"help": field.metadata.get("help", "").replace("%", "%%")}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": _plain_type(hint), "choices": field.metadata.get("choices")}
            options["metavar"] = None if options["choices"] else name.upper()
        group.add_argument(f"--{name.replace('_', '-')}", dest=f"engine_{name}", **options)


def engine_options(args: argparse.Namespace, milestone: str) -> dict[str, Any]:
    """What was given of the options that this milestone has."""
    names = [field.name for field in dataclasses.fields(config_class(milestone))]
    given = {name: getattr(args, f"engine_{name}") for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _plain_type(hint: Any) -> Any:
    """``int`` of ``int | None``: what argparse should make of the option's text."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return hint

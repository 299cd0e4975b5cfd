"""Reading the bench's own options: numbers, ranges, files, ceilings."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from dev.bench.roofline import Ceilings
from dev.bench.workloads import Lengths

LIMITED = ("ttft", "tpot", "itl", "e2e")
"""Times of a request that can have a limit."""


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


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"give a number above 0, not {text!r}")
    return number


def rates(text: str) -> tuple[float, ...]:
    """Requests per second, one or several separated by commas; ``inf``: all at once."""
    parts = (part.strip() for part in text.split(","))
    return tuple(math.inf if part == "inf" else positive(part) for part in parts)


def limit(text: str) -> tuple[str, float]:
    """``ttft:200``: the name of a time and how many milliseconds it may take; gives seconds."""
    name, _, milliseconds = text.partition(":")
    if name not in LIMITED:
        raise argparse.ArgumentTypeError(
            f"a limit names {', '.join(LIMITED)} and milliseconds (ttft:200), got {text!r}"
        )
    return name, positive(milliseconds) / 1e3


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

"""Perplexity of quantized models beside the one they were made from.

    python -m m7_gptq.evaluate --model smollm2-135m-instruct --model out --json quality.json
    python -m m7_gptq.evaluate --sweep --bits 3,4 --group-size 32,64 --method nearest,gptq
    python -m m7_gptq.evaluate --sweep --method gptq --calibration builtin --calibration code.py \\
        --text builtin --text other.py

Models are scored in full precision of their dequantized weights, so that figures are about the
weights and not about a kernel's rounding. A sweep quantizes the model itself, in every combination
of bits, group size, method and calibration text, and keeps nothing but the figures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from common.checkpoint import DEFAULT_MODEL, Checkpoint
from common.cli import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from common.engine_config import BaseEngineConfig
from common.environment import describe_environment
from common.tokenizer import Tokenizer

from .calibration import BUILTIN, EVALUATION, read_text, token_windows
from .checkpoint_load import open_checkpoint
from .gptq import QuantizeConfig
from .perplexity import EvaluationText
from .quality_report import SCHEMA, Report, describe_text, plot, show, write_json
from .quantize_model import GPTQ, NEAREST
from .sweep import METHODS, Compute, Point, Row, grid, score, sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: wrong usage; 130: interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    console = Console(stderr=True)
    report: Report = {}
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        rows, report = prepare(args, console)
        report["command"] = shlex.join(["python", "-m", "m7_gptq.evaluate", *argv])
        for row in rows:
            report["rows"].append(row)
            if args.json:  # what is measured is not lost to what comes after
                write_json(report, args.json)
        if args.plot:
            plot(report, args.plot)
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return EXIT_USAGE
    except KeyboardInterrupt:
        if report.get("rows"):
            show(report, Console())
        return EXIT_INTERRUPTED
    show(report, Console())
    return EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m m7_gptq.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what is scored").add_argument
    add("--model", action="append", metavar="NAME",
        help="a model, quantized or not; repeatable, the first is what the others are held "
        f"against (default: {DEFAULT_MODEL})")
    add("--text", action="append", metavar="builtin|FILE",
        help="what they predict; repeatable (default: builtin, the half of the standard library's "
        "help that calibration does not see)")
    add("--context", type=int, default=512, metavar="N", help="tokens of a window (default: 512)")
    add("--stride", type=int, metavar="N",
        help="a window begins every N tokens (default: the context, windows do not overlap)")
    add("--max-windows", type=int, metavar="N", help="score the first N windows only")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    add("--batch-size", type=int, default=8, metavar="N", help="windows at a time (default: 8)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add("--seed", type=int, default=0, metavar="N",
        help="draws calibration windows, and the weights of random: models (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the report there, row by row")
    add("--plot", type=Path, metavar="FILE.svg",
        help="draw perplexity over the size of the weights")
    group = parser.add_argument_group("a sweep")
    add = group.add_argument
    add("--sweep", action="store_true", help="quantize the model in many ways and score them all")
    add("--method", default=f"{NEAREST},{GPTQ}", metavar="NAME,…",
        help=f"of {', '.join(METHODS)} (default: {NEAREST},{GPTQ})")
    add("--bits", default="2,3,4,8", metavar="N,…", help="(default: 2,3,4,8)")
    add("--group-size", default="32,64,-1", metavar="N,…",
        help="sizes that divide every layer; -1 is one group (default: 32,64,-1)")
    add("--sym", action=argparse.BooleanOptionalAction, default=True,
        help="zero points in the middle of the range, or fitted to each group (default: --sym)")
    add("--desc-act", action=argparse.BooleanOptionalAction, default=False,
        help="round columns in order of their activations (default: --no-desc-act)")
    add("--calibration", action="append", metavar="builtin|FILE",
        help="text that GPTQ looks at; repeatable (default: builtin)")
    add("--num-samples", type=int, default=128, metavar="N",
        help="windows of it (default: 128, or all there are)")
    add("--seq-len", type=int, default=512, metavar="N", help="tokens of each (default: 512)")
    return parser


def prepare(args: argparse.Namespace, console: Console) -> tuple[Iterator[Row], Report]:
    """Read everything that can be wrong; the rows are measured when they are asked for."""
    names = args.model or [DEFAULT_MODEL]
    if args.sweep and len(names) > 1:
        raise ValueError("a sweep takes one --model")
    if args.batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {args.batch_size}")
    engine = BaseEngineConfig(model=names[0], device=args.device, dtype=args.dtype, seed=args.seed)
    checkpoints = [open_checkpoint(name, seed=args.seed) for name in names]
    compute = Compute(
        engine.resolve_device(), engine.resolve_dtype(checkpoints[0].config), args.batch_size
    )
    tokenizer = _shared_tokenizer(checkpoints)
    texts = {
        _label(source): EvaluationText.of(
            tokenizer,
            read_text(source, EVALUATION),
            context=args.context,
            stride=args.stride,
            max_windows=args.max_windows,
        )
        for source in args.text or [BUILTIN]
    }
    report: Report = {
        "schema": SCHEMA,
        "kind": "perplexity",
        "command": "",
        "environment": describe_environment(compute.device),
        "model": names[0],
        "texts": {name: describe_text(text, name) for name, text in texts.items()},
        "compute": {
            "device": str(compute.device),
            "dtype": str(compute.dtype).removeprefix("torch."),
            "batch_size": compute.batch_size,
        },
        "rows": [],
    }

    def say(text: str) -> None:
        if console.is_terminal:
            console.print(escape(text), style="dim")

    if not args.sweep:
        rows = (
            row
            for name, checkpoint in zip(names, checkpoints, strict=True)
            for row in score(checkpoint, texts, compute, say, {"name": name})
        )
        return rows, report
    base = QuantizeConfig(group_size=-1, sym=args.sym, desc_act=args.desc_act)
    points, samples = _points(args, base, tokenizer)
    report["calibration"] = {
        name: {"num_samples": len(windows), "seq_len": windows.shape[1], "seed": args.seed}
        for name, windows in samples.items()
    }
    return sweep(checkpoints[0], points, samples, texts, compute, say), report


def _points(
    args: argparse.Namespace, base: QuantizeConfig, tokenizer: Tokenizer
) -> tuple[list[Point], dict[str, torch.Tensor]]:
    """The grid, and the calibration windows by the name of their text."""
    samples = {
        _label(source): token_windows(
            tokenizer, read_text(source), count=args.num_samples, length=args.seq_len,
            seed=args.seed,
        )
        for source in args.calibration or [BUILTIN]
    }  # fmt: skip
    methods = [name.strip() for name in args.method.split(",")]
    bits, sizes = _numbers(args.bits, "--bits"), _numbers(args.group_size, "--group-size")
    return grid(methods, bits, sizes, base, list(samples)), samples


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes whole numbers between commas, not {text!r}") from None


def _label(source: str) -> str:
    return source if source == BUILTIN else Path(source).name


def _shared_tokenizer(checkpoints: Sequence[Checkpoint]) -> Tokenizer:
    """Perplexities compare only where all models cut the text into the same tokens."""
    first = checkpoints[0].tokenizer
    if first is None:
        raise ValueError(f"{checkpoints[0].name} has no tokenizer to cut a text with")
    probe = "The 3 quick brown foxes, über 12.5 m:\n\tdef f(x): return x"
    for other in checkpoints[1:]:
        tokenizer = other.tokenizer
        if tokenizer is not None and tokenizer.encode(probe) != first.encode(probe):
            raise ValueError(
                f"{other.name} has another tokenizer than {checkpoints[0].name}: their "
                "perplexities can't be compared"
            )
    return first


if __name__ == "__main__":
    sys.exit(main())

"""Quantize a model and write it as auto-gptq and gptqmodel do.

    python -m m7_gptq.quantize --output out --group-size 64
    python -m m7_gptq.quantize --model Qwen/Qwen3-0.6B --bits 4 --group-size 128 --desc-act \\
        --calibration text.txt --output qwen3-4bit

The output appears when it is complete. What is done of an interrupted run is kept beside it, and
the same command goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.checkpoint import DEFAULT_MODEL, Checkpoint
from common.cli import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from common.engine_config import BaseEngineConfig
from common.environment import peak_memory_bytes

from .calibration import BUILTIN, read_text, token_windows
from .checkpoint_format import QuantizedCheckpoint
from .checkpoint_load import open_checkpoint
from .checkpoint_save import refuse_existing
from .gptq import QuantizeConfig
from .packing import FORMATS, SUPPORTED_BITS
from .quantize_model import GPTQ, NEAREST, STAGES, StageError, check_fits, quantize_model
from .sweep import describe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: wrong usage; 130: interrupted)."""
    args = build_parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        source, errors, seconds = run(args, console)
        report(args, source, errors, seconds, Console())
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return EXIT_USAGE
    except KeyboardInterrupt:
        console.print(
            f"interrupted; {args.output} was not written. The same command goes on with the layers "
            f"that are done (kept in {args.output.parent}, under .{args.output.name}-…)",
            markup=False, highlight=False,
        )  # fmt: skip
        return EXIT_INTERRUPTED
    return EXIT_OK


_HELP = {
    "bits": f"bits of a weight: {', '.join(map(str, SUPPORTED_BITS))}",
    "group_size": "inputs that share a scale and a zero point; must divide every layer's inputs; "
    "-1 is one group",
    "sym": "zero points in the middle of the range; --no-sym fits them to each group",
    "desc_act": "round the columns with the largest activations first (act-order)",
    "static_groups": "fix all scales first; with --desc-act, groups stay runs of neighbours",
    "damp_percent": "part of its mean that is added to the Hessian's diagonal",
    "block_size": "columns after which errors are passed on to all later ones; for speed only",
    "true_sequential": "calibrate projections on what earlier quantized ones of their layer give",
}


def build_parser() -> argparse.ArgumentParser:
    """The fields of `QuantizeConfig`, and where weights, text and output are."""
    parser = argparse.ArgumentParser(
        prog="python -m m7_gptq.quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("from where, to where").add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME",
        help=f"a folder, a .gguf file, a hub id, or random:… (default: {DEFAULT_MODEL})")
    add("--output", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    add("--format", choices=FORMATS,
        help="version of the format (default: gptq; gptq_v2 with --no-sym, which it can say)")
    add = parser.add_argument_group("how weights are rounded").add_argument
    add("--method", choices=(GPTQ, NEAREST), default=GPTQ,
        help=f"{NEAREST} looks at no activations (default: {GPTQ})")
    for field in dataclasses.fields(QuantizeConfig):
        flag = "--" + field.name.replace("_", "-")
        text = f"{_HELP[field.name]} (default: %(default)s)"
        if isinstance(field.default, bool):
            add(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            metavar = "N" if isinstance(field.default, int) else "X"
            add(flag, type=type(field.default), default=field.default, metavar=metavar, help=text)
    add = parser.add_argument_group("what it is calibrated on").add_argument
    add("--calibration", default=BUILTIN, metavar="builtin|FILE",
        help="text; builtin is half of the standard library's help on Python (default: builtin)")
    add("--num-samples", type=int, default=128, metavar="N",
        help="windows of it, drawn at random (default: 128, or all there are)")
    add("--seq-len", type=int, default=512, metavar="N", help="tokens of each (default: 512)")
    add("--batch-size", type=int, default=8, metavar="N", help="windows at a time (default: 8)")
    add("--seed", type=int, default=0, metavar="N",
        help="draws the windows, and the weights of random: models (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto",
        help="of activations: auto, float32, bfloat16 or float16; auto is float32 on the CPU, and "
        "on a GPU what the checkpoint says")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    return parser


def run(
    args: argparse.Namespace, console: Console
) -> tuple[Checkpoint, list[StageError], float]:
    """Quantize as the options say; everything that can be known to be wrong is refused first."""
    names = [field.name for field in dataclasses.fields(QuantizeConfig)]
    config = QuantizeConfig(**{name: getattr(args, name) for name in names})
    engine = BaseEngineConfig(model=args.model, device=args.device, dtype=args.dtype)
    device = engine.resolve_device()
    if args.batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {args.batch_size}")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    refuse_existing(args.output)
    source = open_checkpoint(args.model, seed=args.seed)
    check_fits(source, config)
    samples = torch.empty(0, args.seq_len, dtype=torch.int64)
    if args.method == GPTQ:
        samples = _samples(args, source, console)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("quantizing layers", total=source.config.num_layers)
        errors = quantize_model(
            source,
            samples,
            config,
            args.output,
            method=args.method,
            checkpoint_format=args.format,
            dtype=engine.resolve_dtype(source.config),
            device=device,
            batch_size=args.batch_size,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    return source, errors, time.perf_counter() - start


def _samples(args: argparse.Namespace, source: Checkpoint, console: Console) -> torch.Tensor:
    if source.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer to cut a text with")
    if args.seq_len > source.config.max_model_len:
        raise ValueError(
            f"seq-len {args.seq_len} is more than the {source.config.max_model_len} positions "
            "this model was made for"
        )
    samples = token_windows(
        source.tokenizer, read_text(args.calibration),
        count=args.num_samples, length=args.seq_len, seed=args.seed,
    )  # fmt: skip
    if len(samples) < args.num_samples:
        console.print(
            f"The text has {len(samples)} windows of {args.seq_len} tokens, not "
            f"{args.num_samples}: all of them are used.",
            markup=False, highlight=False,
        )  # fmt: skip
    return samples


def report(
    args: argparse.Namespace,
    source: Checkpoint,
    errors: Sequence[StageError],
    seconds: float,
    console: Console,
) -> None:
    """What each layer lost, and what the linear layers take now."""
    if errors:
        console.print(error_table(errors))
        damped = [error for error in errors if error.damping > args.damp_percent]
        for error in damped:
            console.print(f"{error.name}: its Hessian needed a damp_percent of {error.damping:g}")
    before, after = describe(source), describe(QuantizedCheckpoint("it", args.output))
    peak = peak_memory_bytes(BaseEngineConfig(device=args.device).resolve_device())
    smaller = 1 - after["bits_per_weight"] / 16
    console.print(
        f"Linear layers: {before['linear_bytes'] / 1e6:,.4g} MB ({before['stored_as']}) → "
        f"{after['linear_bytes'] / 1e6:,.4g} MB, {after['bits_per_weight']:.2f} bits a weight: "
        f"{smaller:.1%} smaller than in 16 bits.\n"
        f"{args.output} was written in {seconds:,.1f} s, {peak / 2**20:,.0f} MiB at the peak.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def error_table(errors: Sequence[StageError]) -> Table:
    """A line for each layer: squared error of each projection in per cent of its output's square.

    Two figures: what GPTQ left, and what rounding to nearest would have.
    """
    table = Table(
        box=None, padding=(0, 3, 0, 0), title_justify="left", title_style="",
        title="Squared error of the outputs, % of their square: ours / rounded to nearest",
    )  # fmt: skip
    table.add_column("layer", justify="right")
    for stage in STAGES:
        table.add_column(stage, justify="right", no_wrap=True)
    for start in range(0, len(errors), len(STAGES)):
        cells = []
        for error in errors[start : start + len(STAGES)]:
            whole = error.output or 1.0
            cells.append(f"{error.ours / whole:.3%} / {error.nearest / whole:.3%}")
        table.add_row(str(start // len(STAGES)), *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())

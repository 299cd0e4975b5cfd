"""The command line of ``python -m dev.bench kernels`` and its report."""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.engine_config import DTYPES, BaseEngineConfig
from common.environment import REPOSITORY, describe_environment
from dev.bench.arguments import ceilings, count, writable_file
from dev.bench.kernels.decode import DecodeSuite, RaggedSuite
from dev.bench.kernels.int4 import Int4Suite
from dev.bench.kernels.layer_ops import OpsSuite
from dev.bench.kernels.matmul import MatmulSuite
from dev.bench.kernels.peers import libraries
from dev.bench.kernels.prefill import PrefillSuite
from dev.bench.kernels.sampling import SamplingSuite
from dev.bench.kernels.setting import Setting
from dev.bench.kernels.suite import Case, Suite, add_rates, measure
from dev.bench.report import SCHEMA, Report, Row, write_json
from dev.bench.roofline import Ceilings, measure_ceilings
from dev.bench.runner import find_milestone

SUITES = ("decode", "prefill", "ragged", "ops", "matmul", "int4", "sampling")
DEFAULT_MILESTONES = ("m3_paged", "m4_flash")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m dev.bench kernels``."""
    add = parser.add_argument
    add("--suite", action="append", choices=[*SUITES],
        help="repeatable (default: all of them, with --case decode)")
    add("--case", action="append", metavar="CASE",
        help="repeatable: cases of the suites (see above) instead of theirs")
    add("--milestone", action="append", metavar="mN_x",
        help=f"repeatable: whose attention (default: {', '.join(DEFAULT_MILESTONES)})")
    add("--backend", action="append", choices=["torch", "triton", "cuda"],
        help="repeatable, of m3's decode and of int4 (default: triton and cuda on a GPU, torch "
             "elsewhere); torch is always there for int4")
    add("--num-heads", type=count, default=16, help="query heads (default: 16)")
    add("--num-kv-heads", type=count, default=8, help="key/value heads (default: 8)")
    add("--head-dim", type=count, default=128, help="(default: 128)")
    add("--block-size", type=count, default=16, help="(default: 16)")
    add("--hidden-size", type=count, default=1024, help="for ops (default: 1024)")
    add("--intermediate-size", type=count, default=3072, help="for ops (default: 3072)")
    add("--vocab-size", type=count, default=151_936, help="for sampling (default: 151936)")
    add("--dtype", choices=sorted(DTYPES), default=None, help="(default: bfloat16 on a GPU)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--flash-attn-3", type=Path, metavar="FILE",
        help="also time FlashAttention-3: the library _vllm_fa3_C.abi3.so of a vLLM wheel")
    add("--ceilings", type=ceilings, default="measure", metavar="measure|skip|GB/S,TFLOP/S",
        help="read bandwidth and matmul speed that shares are of (default: measure)")
    add("--json", type=writable_file, metavar="FILE", help="write the report there")
    add("--quiet", action="store_true", help="no table")


def main(argv: Sequence[str], command: str = "python -m dev.bench kernels") -> Report:
    """Measure; returns the report, whose rows are one per case and subject.

    Raises:
        ValueError: a case is none of its suite, a backend does not run here, or shapes make no
            sense. What fails while it runs is noted in its row.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dev.bench kernels",
        description=importlib.import_module("dev.bench.kernels").__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    args = parser.parse_args(argv)
    device = BaseEngineConfig(device=args.device).resolve_device()
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    if args.num_heads % args.num_kv_heads:
        raise ValueError("--num-heads must be a multiple of --num-kv-heads")
    setting = Setting(
        args.num_heads, args.num_kv_heads, args.head_dim, args.block_size, args.hidden_size,
        args.intermediate_size, args.vocab_size, dtype, device,
    )  # fmt: skip
    milestones = _milestones(args.milestone)
    torch.manual_seed(0)
    with Console(stderr=True).status("") as status, torch.inference_mode():
        plan = _plan(args, setting, milestones)
        rows = [
            row
            for suite, cases in plan
            for row in measure(suite, cases, setting, lambda text: status.update(escape(text)))
        ]
        del plan
        setting.__dict__.pop("pool", None)  # the ceilings need the room
        torch.cuda.empty_cache()
        reached = args.ceilings
        if reached == "measure":
            status.update("measuring the ceilings")
            reached = measure_ceilings(device, dtype)
    reached = reached if isinstance(reached, Ceilings) else None
    add_rates(rows, reached)
    report: Report = {
        "schema": SCHEMA,
        "kind": "kernels",
        "command": shlex.join([*command.split(), *argv]),
        "work": {key: str(value) for key, value in asdict(setting).items()},
        "environment": describe_environment(device),
        "ceilings": None if reached is None else asdict(reached),
        "options": {name: {"model": "kernels", "dtype": str(dtype)} for name in milestones},
        "rows": rows,
    }
    if args.json:
        write_json(report, args.json)
    if not args.quiet:
        show(report, Console())
    return report


def _milestones(names: Sequence[str] | None) -> list[str]:
    """Full names; ValueError for one without kernels."""
    chosen = [find_milestone(name) for name in names or DEFAULT_MILESTONES]
    for name in chosen:
        if not (REPOSITORY / name / "kernels").is_dir():
            raise ValueError(f"{name} has no kernels of its own: choose a later milestone")
    return list(dict.fromkeys(chosen))


def _plan(
    args: argparse.Namespace, setting: Setting, milestones: Sequence[str]
) -> list[tuple[Suite, list[Case]]]:
    """Suites and their cases; ValueError for what makes no sense, before anything is measured."""
    peers = list(libraries(args.flash_attn_3))
    decoders = setting, milestones, args.backend or (), peers
    make: dict[str, Callable[[], Suite]] = {
        "decode": lambda: DecodeSuite(*decoders),
        "prefill": lambda: PrefillSuite(setting, milestones, peers),
        "ragged": lambda: RaggedSuite(*decoders),
        "ops": lambda: OpsSuite(setting),
        "matmul": lambda: MatmulSuite(setting),
        "int4": lambda: Int4Suite(setting, args.backend or ()),
        "sampling": lambda: SamplingSuite(setting),
    }
    plan = []
    for name in dict.fromkeys(args.suite or (["decode"] if args.case else SUITES)):
        suite = make[name]()
        texts = args.case or suite.default_cases[setting.device.type]
        plan.append((suite, [suite.parse(text) for text in texts]))
    return plan


def show(report: Report, console: Console) -> None:
    """A table for each operation, and what went wrong."""
    where = report["environment"]["gpu"] or "the CPU"
    for name in dict.fromkeys(row["measure"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["measure"] == name]
        console.print(f"[bold]{name}[/bold] on {where}", highlight=False)
        console.print(_table(rows))
        for row in rows:
            if "error" in row:
                line = f"{row['case']}, {row['name']}: {row['error']}"
                console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def _table(rows: Sequence[Row]) -> Table:
    """A line for each case and subject; speed is against the first subject of the case."""
    shown = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("case", "kernel"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("us", "alone us", "GB/s", "TFLOP/s", "of ceiling", "speed"):
        shown.add_column(heading, justify="right", no_wrap=True)
    first_of: dict[str, Row] = {}
    for row in rows:
        if row["us"] is None:
            shown.add_row(row["case"], row["name"], "failed")
            continue
        first = first_of.setdefault(row["case"], row)
        share = "–"
        if "bound" in row:
            share = f"{max(row['read_share'], row['flops_share']):.0%} {row['bound']}"
        shown.add_row(
            row["case"] if row is first else "",
            row["name"],
            f"{row['us']:,.1f}",
            f"{row['us_per_call']:,.1f}",
            f"{row['bytes_per_s'] / 1e9:,.0f}",
            f"{row['flops_per_s'] / 1e12:,.1f}" if row["flops"] else "–",
            share,
            f"{first['us'] / row['us']:.2f}x",
        )
    return shown

"""Kernels alone: decode attention over a paged cache, and writing into it.

    python -m dev.bench kernels --case 1x4096 --case 64x4096 --backend triton --backend cuda

A case is BxS: B sequences of S cached tokens; BxA:C spreads lengths evenly from A to C. A call
has its own queries and its own blocks, scattered over a pool far larger than any cache memory, so
that every byte comes from memory. On a GPU a graph of such calls is replayed (``us``), and calls
are launched one by one from Python (``us_per_call``: what the host adds when nothing hides it).
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.engine_config import DTYPES, BaseEngineConfig
from dev.bench.arguments import count, writable_file
from dev.bench.environment import describe_environment
from dev.bench.report import SCHEMA, Report, Row, write_json
from dev.bench.roofline import measure_ceilings
from dev.bench.workloads import Lengths

HELP = "attention kernels alone, in us and GB/s"
DEFAULT_CASES = ("1x4096", "8x4096", "64x1024", "256x1024", "64x4096", "8x32768", "256x100:2000")
_POOL_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}  # of the pool of blocks, keys and values
_REPEATS = 15

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """B sequences with cached contexts of the given lengths."""

    batch: int
    context: Lengths

    @classmethod
    def parse(cls, text: str) -> Case:
        batch, _, context = text.partition("x")
        try:
            return cls(int(batch), Lengths.parse(context))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"give BxS, like 64x4096, or BxA:B, not {text!r}"
            ) from None

    @property
    def label(self) -> str:
        return f"{self.batch}x{self.context}"

    def lens(self, device: torch.device) -> Tensor:
        """Context lengths ``[B]`` int32, in shuffled order."""
        low, high = self.context.low, self.context.high
        spread = torch.linspace(low, high, self.batch).round().int()
        order = torch.randperm(self.batch, generator=torch.Generator().manual_seed(0))
        return spread[order].to(device)


@dataclass(frozen=True)
class Shape:
    """What all cases have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class Pool:
    """A paged cache with random contents, and calls that read different parts of it."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        num_bytes = _POOL_BYTES[shape.device.type]
        self.num_blocks = num_bytes // (shape.kv_bytes_per_token * shape.block_size)
        size = (self.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self.keys, self.values = (
            torch.randn(size, dtype=shape.dtype, device=shape.device) for _ in range(2)
        )

    def calls(self, attention: Attention, case: Case) -> list[Callable[[], Tensor]]:
        """Calls with a batch each, on blocks of their own as far as the pool goes.

        Raises:
            ValueError: the pool is too small for a single batch.
        """
        shape, lens = self.shape, case.lens(self.shape.device)
        width = -(-case.context.high // shape.block_size)
        num_calls = min(64, self.num_blocks // (case.batch * width))
        if num_calls == 0:
            raise ValueError(f"case {case.label} needs more memory than the bench takes for it")
        blocks = torch.randperm(self.num_blocks, device=shape.device).int()
        tables = blocks[: num_calls * case.batch * width].view(num_calls, case.batch, width)
        query = torch.randn(
            (case.batch, shape.num_heads, shape.head_dim), dtype=shape.dtype, device=shape.device
        )
        scale = shape.head_dim**-0.5
        return [
            partial(attention, query.clone(), self.keys, self.values, table, lens, scale)
            for table in tables
        ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m dev.bench kernels``."""
    add = parser.add_argument
    add("--milestone", default="m3_paged", help="whose kernels (default: m3_paged)")
    add("--backend", action="append", choices=["torch", "triton", "cuda"],
        help="repeatable (default: triton and cuda on a GPU, torch elsewhere)")
    add("--case", action="append", type=Case.parse, metavar="BxS",
        help=f"repeatable (default: {' '.join(DEFAULT_CASES)})")
    add("--num-heads", type=count, default=16, help="query heads (default: 16)")
    add("--num-kv-heads", type=count, default=8, help="key/value heads (default: 8)")
    add("--head-dim", type=count, default=128, help="(default: 128)")
    add("--block-size", type=count, default=16, help="(default: 16)")
    add("--dtype", choices=sorted(DTYPES), default=None, help="(default: bfloat16 on a GPU)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--flash-attn-3", type=Path, metavar="FILE",
        help="also time FlashAttention-3: the library _vllm_fa3_C.abi3.so of a vLLM wheel")
    add("--json", type=writable_file, metavar="FILE", help="write the report there")
    add("--quiet", action="store_true", help="no table")


def main(argv: Sequence[str], command: str = "python -m dev.bench kernels") -> Report:
    """Measure; returns the report, whose rows are one per case and backend.

    Raises:
        ValueError: a backend does not run here, or shapes make no sense.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dev.bench kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    args = parser.parse_args(argv)
    device = BaseEngineConfig(device=args.device).resolve_device()
    on_gpu = device.type == "cuda"
    dtype = DTYPES[args.dtype or ("bfloat16" if on_gpu else "float32")]
    if args.num_heads % args.num_kv_heads:
        raise ValueError("--num-heads must be a multiple of --num-kv-heads")
    shape = Shape(
        args.num_heads, args.num_kv_heads, args.head_dim, args.block_size, dtype, device
    )
    pool = Pool(shape)
    cases = args.case or [Case.parse(text) for text in DEFAULT_CASES]
    rows = [
        row
        for name, attention in _subjects(args, device)
        for row in _measure(name, attention, pool, cases)
    ]
    del pool
    ceilings = measure_ceilings(device, dtype)
    for row in rows:
        row["read_share"] = row["bytes_per_s"] / ceilings.read_bytes_per_s
    report: Report = {
        "schema": SCHEMA,
        "kind": "kernels",
        "command": shlex.join([*command.split(), *argv]),
        "work": {key: str(value) for key, value in asdict(shape).items()},
        "environment": describe_environment(device),
        "ceilings": asdict(ceilings),
        "options": {args.milestone: {"model": "kernels", "dtype": str(dtype)}},
        "rows": rows,
    }
    if args.json:
        write_json(report, args.json)
    if not args.quiet:
        Console().print(table(report))
    return report


def _subjects(
    args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, Attention]]:
    """Name and decode attention of everything that is to be timed."""
    kernels = importlib.import_module(f"{args.milestone}.kernels")
    default = ["triton", "cuda"] if device.type == "cuda" else ["torch"]
    for backend in args.backend or default:
        chosen = kernels.get_kernels(backend, device, args.head_dim)
        yield f"{args.milestone} {backend}", chosen.paged_attention
    if args.flash_attn_3:
        yield "FlashAttention-3", flash_attention_3(args.flash_attn_3)


def flash_attention_3(library: Path) -> Attention:
    """FlashAttention-3's paged decode, from the extension library that vLLM's wheel brings.

    Raises:
        ValueError: the file cannot be loaded.
    """
    try:
        torch.ops.load_library(str(library.resolve()))
    except OSError as error:
        raise ValueError(f"cannot load {library}: {error}") from error
    forward = torch.ops._vllm_fa3_C.fwd

    def attention(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lens: Tensor,
                  scale: float) -> Tensor:
        # What is left out: new keys, rotation, descaling and the like; the zero before the end is
        # "split as you see fit".
        longest, unused = tables.shape[1] * keys.shape[1], (None,) * 8
        out, *_ = forward(
            q[:, None], keys, values, *unused, lens, 1, longest, tables, *unused, scale, True,
            -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
        )  # fmt: skip
        return out[:, 0]

    return attention


def _measure(
    name: str, attention: Attention, pool: Pool, cases: Sequence[Case]
) -> Iterator[Row]:
    for case in cases:
        calls = pool.calls(attention, case)
        read = int(case.lens(torch.device("cpu")).sum()) * pool.shape.kv_bytes_per_token
        seconds = _seconds_by_graph(calls) if pool.keys.is_cuda else _seconds_by_call(calls)
        yield {
            "name": name,
            "measure": "paged_attention",
            "case": case.label,
            "us": seconds * 1e6,
            "us_per_call": _seconds_by_call(calls) * 1e6,
            "bytes": read,
            "bytes_per_s": read / seconds,
        }


def _seconds_by_graph(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Median seconds of a call when a graph of all of them is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compile before capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for repeat in range(_REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end) / 1e3 / len(kept))
    return median(times)


def _seconds_by_call(calls: Sequence[Callable[[], Any]]) -> float:
    """Median seconds of a call launched by itself, the device idle before."""
    on_gpu = torch.cuda.is_available()
    times = []
    for call in (*calls[:3], *(calls * _REPEATS)[:50]):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[3:])


def table(report: Report) -> Table:
    """One line per case and subject."""
    shown = Table(title=f"paged decode attention on {report['environment']['gpu'] or 'the CPU'}")
    for heading in ("case", "kernel", "us", "GB/s", "of read ceiling", "us, one call alone"):
        shown.add_column(heading, justify="left" if heading in ("case", "kernel") else "right")
    order = {case: place for place, case in enumerate(dict.fromkeys(
        row["case"] for row in report["rows"]))}
    for row in sorted(report["rows"], key=lambda row: order[row["case"]]):
        shown.add_row(
            row["case"], row["name"], f"{row['us']:,.1f}", f"{row['bytes_per_s'] / 1e9:,.0f}",
            f"{row['read_share']:.0%}", f"{row['us_per_call']:,.1f}",
        )
    return shown

"""Throughput: many requests of random lengths, all there at the start.

    python -m dev.bench throughput --milestone m3_paged --num-requests 256 --seed 0
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dev.bench.arguments import count, lengths
from dev.bench.measure import Pass, Row, Timing, cost_fields, percentile_fields
from dev.bench.roofline import steps_cost, work_cost
from dev.bench.runner import Run, Subject
from dev.bench.workloads import Lengths

HF_BATCH_SIZE = 8
HELP = "many requests of random lengths, all at once: tokens/s"

_COUNTERS = (
    "num_steps",
    "num_graph_steps",
    "num_graphs_captured",
    "capture_time_s",
    "num_preemptions",
    "num_running_peak",
    "num_running_mean",
    "kv_utilization",
    "kv_slots_total",
    "kv_slots_used_peak",
    "kv_slots_allocated_peak",
)


@dataclass(frozen=True)
class ThroughputWork:
    """N requests; their lengths are drawn from the seed, uniformly."""

    num_requests: int
    input_len: Lengths
    output_len: Lengths
    temperature: float
    seed: int
    batch_size: int | None = None  # most sequences at once; None: as the engine likes
    default_repeat: ClassVar[int] = 1
    kind: ClassVar[str] = "throughput"

    @property
    def max_num_seqs(self) -> int | None:
        """What the engine's option of that name should be, unless it is given."""
        return self.batch_size

    def describe(self) -> Mapping[str, Any]:
        described = {
            "requests": self.num_requests,
            "input_len": str(self.input_len),
            "output_len": str(self.output_len),
            "temperature": self.temperature,
            "seed": self.seed,
        }
        return described if self.batch_size is None else described | {"at_once": self.batch_size}

    def passes(self) -> list[Pass]:
        label = f"{self.num_requests} requests"
        return [
            Pass(label, self.num_requests, self.input_len, self.output_len, self.seed,
                 self.temperature)
        ]

    def rows(self, subject: Subject, timings: Sequence[Timing]) -> list[Row]:
        (timing,) = timings
        run, pairs = timing.median_run, timing.of.lengths()
        prompt_tokens, output_tokens = (sum(column) for column in zip(*pairs, strict=True))
        config, dtype_bytes = subject.model_config, subject.dtype.itemsize
        work = work_cost(config, dtype_bytes, pairs, saved_bytes=subject.saved_bytes)
        row: Row = {
            "name": subject.name,
            "measure": "throughput",
            "num_requests": len(pairs),
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "seconds": run.seconds,
            "seconds_min": min(timing.seconds),
            "seconds_max": max(timing.seconds),
            "output_tokens_per_s": output_tokens / run.seconds,
            "total_tokens_per_s": (prompt_tokens + output_tokens) / run.seconds,
            "requests_per_s": len(pairs) / run.seconds,
            "load_s": subject.load_s,
            "peak_memory_bytes": timing.peak_memory_bytes,
            **request_times(run),
            **counted(run),
            **cost_fields("work", work),
        }
        if run.counters:
            has_cache = run.counters["kv_slots_total"] > 0
            cost = steps_cost(
                config,
                dtype_bytes,
                pairs if has_cache else [],
                num_steps=run.counters["num_steps"],
                flops=run.counters["flops"],
                saved_bytes=subject.saved_bytes,
            )
            row |= cost_fields("steps", cost)
        return [row]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that describe the work."""
    add = parser.add_argument_group("the work").add_argument
    add("--num-requests", type=count, default=256, metavar="N", help="(default: 256)")
    add("--input-len", type=lengths, default=Lengths(100, 1024), metavar="A:B",
        help="prompt lengths, uniformly random (default: 100:1024)")
    add("--output-len", type=lengths, default=Lengths(100, 1024), metavar="A:B",
        help="output lengths, uniformly random; end tokens are ignored (default: 100:1024)")
    add("--temperature", type=float, default=0.6, help="(default: 0.6)")
    add("--batch-size", type=count, metavar="B",
        help="most sequences at once, of the engine (its --max-num-seqs) and in a batch of hf "
        f"(default with --against hf: {HF_BATCH_SIZE})")


def from_args(args: argparse.Namespace) -> ThroughputWork:
    """The work that was asked for."""
    batch_size = args.batch_size or (HF_BATCH_SIZE if args.against else None)
    return ThroughputWork(
        args.num_requests, args.input_len, args.output_len, args.temperature,
        args.engine_seed or 0, batch_size,
    )


def request_times(run: Run) -> Row:
    """Percentiles over the requests, and of all gaps between tokens."""
    metrics = run.metrics
    return {
        **percentile_fields("ttft", [m.ttft for m in metrics if m.ttft is not None]),
        **percentile_fields("tpot", [m.tpot for m in metrics if m.tpot is not None]),
        **percentile_fields("itl", [gap for m in metrics for gap in m.itl]),
    }


def counted(run: Run) -> Row:
    """What the engine counted; nothing for one that does not count."""
    counters = run.counters
    if not counters:
        return {}
    return {
        **{name: counters.get(name) for name in _COUNTERS},
        "padding_share": counters["num_padding_tokens"] / counters["num_forward_tokens"],
        "schedule_share": counters["schedule_time_s"] / counters["step_time_s"],
    }

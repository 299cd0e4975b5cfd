"""Latency: time per output token by batch size, time to first token by prompt length.

    python -m dev.bench latency --milestone m1_basic --batch-size 1,8 --ttft-input-len 512

Time per output token is (time for ``output_len`` tokens - time for 1) / (output_len - 1), greedy,
of requests of one length that are submitted together: prefill and other fixed costs cancel out, and
it can be asked of anyone who generates. Time to first token is that of a prompt alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from common.engine_config import BaseEngineConfig
from dev.bench.arguments import count, counts
from dev.bench.measure import Pass, Row, Timing, cost_fields, percentile_fields
from dev.bench.roofline import decode_step_cost, work_cost
from dev.bench.runner import Subject
from dev.bench.workloads import Lengths

HELP = "time per output token by batch size, time to first token by prompt length"

_COUNTERS = ("num_steps", "num_graph_steps", "num_graphs_captured", "capture_time_s")


@dataclass(frozen=True)
class LatencyWork:
    """Batches of equal requests, and single prompts."""

    batch_sizes: tuple[int, ...]
    input_len: int
    output_len: int
    ttft_input_lens: tuple[int, ...]
    seed: int
    default_repeat: ClassVar[int] = 3
    kind: ClassVar[str] = "latency"

    @property
    def batch_size(self) -> int:
        """Most sequences at once."""
        return max(self.batch_sizes)

    @property
    def max_num_seqs(self) -> int | None:
        """What the engine's option of that name should be, unless it is given."""
        return max(self.batch_size, BaseEngineConfig.max_num_seqs)

    def describe(self) -> Mapping[str, Any]:
        return {
            "batch_sizes": list(self.batch_sizes),
            "input_len": self.input_len,
            "output_len": self.output_len,
            "ttft_input_lens": list(self.ttft_input_lens),
            "temperature": 0.0,
            "seed": self.seed,
        }

    def passes(self) -> list[Pass]:
        """For every batch size one token and all tokens; then the single prompts.

        Each has prompts of its own: a prefix cache has nothing to find.
        """
        shapes = [
            (size, self.input_len, output_len)
            for size in self.batch_sizes
            for output_len in (1, self.output_len)
        ]
        shapes += [(1, input_len, 1) for input_len in self.ttft_input_lens]
        return [self._pass(*shape, self.seed + place) for place, shape in enumerate(shapes)]

    def rows(self, subject: Subject, timings: Sequence[Timing]) -> list[Row]:
        num_batched = 2 * len(self.batch_sizes)
        pairs = zip(timings[0:num_batched:2], timings[1:num_batched:2], strict=True)
        rows = [_tpot_row(subject, one_token, all_tokens) for one_token, all_tokens in pairs]
        return rows + [_ttft_row(subject, timing) for timing in timings[num_batched:]]

    def _pass(self, batch_size: int, input_len: int, output_len: int, seed: int) -> Pass:
        tokens = "1 token" if output_len == 1 else f"{output_len} tokens"
        return Pass(
            f"{batch_size} x {input_len}, {tokens}",
            batch_size,
            Lengths(input_len, input_len),
            Lengths(output_len, output_len),
            seed,
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that describe the work."""
    add = parser.add_argument_group("the work").add_argument
    add("--batch-size", type=counts, default=(1,), metavar="B,B,...",
        help="requests that run together (default: 1)")
    add("--input-len", type=count, default=128, metavar="T",
        help="their prompt length (default: 128)")
    add("--output-len", type=count, default=129, metavar="T",
        help="their output length, at least 2 (default: 129)")
    add("--ttft-input-len", type=counts, default=(512,), metavar="T,T,...",
        help="prompt lengths for the time to first token (default: 512)")


def from_args(args: argparse.Namespace) -> LatencyWork:
    """The work that was asked for; ValueError where it gives no time per token."""
    if args.output_len < 2:
        raise ValueError(
            f"--output-len must be at least 2 to time a token after the first, "
            f"got {args.output_len}"
        )
    return LatencyWork(
        args.batch_size, args.input_len, args.output_len, args.ttft_input_len,
        args.engine_seed or 0,
    )


def _tpot_row(subject: Subject, one_token: Timing, all_tokens: Timing) -> Row:
    batch_size = all_tokens.of.num_requests
    input_len, output_len = all_tokens.of.lengths()[0]

    def per_token(all_seconds: float, one_seconds: float) -> float:
        return (all_seconds - one_seconds) / (output_len - 1)

    one_s, all_s = one_token.seconds, all_tokens.seconds
    seconds = per_token(statistics.median(all_s), statistics.median(one_s))
    each = [per_token(*pair) for pair in zip(all_s, one_s, strict=True)]
    gaps = [gap for run in all_tokens.runs for metrics in run.metrics for gap in metrics.itl]
    cost = decode_step_cost(
        subject.model_config,
        subject.dtype.itemsize,
        batch_size,
        input_len,
        output_len,
        saved_bytes=subject.saved_bytes,
    )
    return {
        "name": subject.name,
        "measure": "tpot",
        "num_requests": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "seconds": seconds,
        "seconds_min": min(each),
        "seconds_max": max(each),
        # A model so small that the clock's noise is larger has no rate.
        "output_tokens_per_s": batch_size / seconds if seconds > 0 else None,
        "load_s": subject.load_s,
        "peak_memory_bytes": all_tokens.peak_memory_bytes,
        **percentile_fields("itl", gaps),
        **_counted(all_tokens),
        **cost_fields("work", cost),
    }


def _counted(timing: Timing) -> Row:
    """Steps of the median run and the engine's graphs; nothing for one that does not count."""
    counters = timing.median_run.counters
    return {name: counters[name] for name in _COUNTERS if name in counters}


def _ttft_row(subject: Subject, timing: Timing) -> Row:
    pairs = timing.of.lengths()
    input_len = pairs[0][0]
    seconds = statistics.median(timing.seconds)
    cost = work_cost(
        subject.model_config, subject.dtype.itemsize, pairs, saved_bytes=subject.saved_bytes
    )
    return {
        "name": subject.name,
        "measure": "ttft",
        "num_requests": 1,
        "input_len": input_len,
        "output_len": 1,
        "seconds": seconds,
        "seconds_min": min(timing.seconds),
        "seconds_max": max(timing.seconds),
        "prompt_tokens_per_s": input_len / seconds,
        "load_s": subject.load_s,
        "peak_memory_bytes": timing.peak_memory_bytes,
        **cost_fields("work", cost),
    }

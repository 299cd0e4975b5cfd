"""Serving: requests come one by one, at random times, and each user's wait counts.

    python -m dev.bench serve --milestone m4 --request-rate 4,8,16 --num-requests 200 \\
        --goodput ttft:200 --goodput itl:50

Arrival times are drawn before the clock starts, and a request's time to first token counts from
the time drawn: an engine (or a front) that cannot take it yet does not get that time for free.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from common.metrics import RequestMetrics
from dev.bench.arguments import LIMITED, count, lengths, limit, positive, rates
from dev.bench.load import FRONTS, ServedRun, chunk_counts, serve
from dev.bench.measure import Pass, Row, Timing, percentile_fields
from dev.bench.runner import EngineSubject
from dev.bench.throughput import counted, request_times
from dev.bench.workloads import BenchRequest, Lengths, arrival_times

HELP = "requests that come at random times: latency percentiles, goodput"


@dataclass(frozen=True)
class ServePass(Pass):
    """Requests that come at a rate."""

    rate: float = float("inf")
    burstiness: float = 1.0
    front: str = FRONTS[0]

    def requests(self, vocab_size: int, run: int) -> list[BenchRequest]:
        """The same lengths and times in every run, with fresh prompts."""
        requests = super().requests(vocab_size, run)
        times = arrival_times(len(requests), self.rate, self.burstiness, self.seed)
        return [
            replace(request, arrival_s=time)
            for request, time in zip(requests, times, strict=True)
        ]

    def run(self, subject: EngineSubject, requests: Sequence[BenchRequest]) -> ServedRun:
        return serve(subject, requests, self.temperature, self.front)


@dataclass(frozen=True)
class ServeWork:
    """N requests of random lengths, at one rate after the other."""

    num_requests: int
    input_len: Lengths
    output_len: Lengths
    rates: tuple[float, ...]  # requests per second
    burstiness: float
    limits: Mapping[str, float]  # a time of ``LIMITED``: seconds
    temperature: float
    seed: int
    front: str
    batch_size: ClassVar[int | None] = None
    max_num_seqs: ClassVar[int | None] = None
    default_repeat: ClassVar[int] = 1
    kind: ClassVar[str] = "serve"

    def describe(self) -> Mapping[str, Any]:
        limits = {f"{name}_limit_s": seconds for name, seconds in self.limits.items()}
        return {
            "requests": self.num_requests,
            "input_len": str(self.input_len),
            "output_len": str(self.output_len),
            "request_rate": ", ".join(f"{rate:g}" for rate in self.rates),
            "burstiness": self.burstiness,
            "front": self.front,
            "temperature": self.temperature,
            "seed": self.seed,
            **limits,
        }

    def passes(self) -> list[Pass]:
        return [
            ServePass(f"{self.num_requests} requests, {rate:g} a second", self.num_requests,
                      self.input_len, self.output_len, self.seed, self.temperature, rate,
                      self.burstiness, self.front)
            for rate in self.rates
        ]

    def rows(self, subject: EngineSubject, timings: Sequence[Timing]) -> list[Row]:
        return [
            self._row(subject, rate, timing)
            for rate, timing in zip(self.rates, timings, strict=True)
        ]

    def _row(self, subject: EngineSubject, rate: float, timing: Timing) -> Row:
        run, pairs = timing.median_run, timing.of.lengths()
        prompt_tokens, output_tokens = (sum(column) for column in zip(*pairs, strict=True))
        finished = [m for m in run.metrics if m.finished_time is not None]
        return {
            "name": subject.name,
            "measure": "serve",
            "num_requests": len(pairs),
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "request_rate": None if rate == float("inf") else rate,
            "seconds": run.seconds,
            "seconds_min": min(timing.seconds),
            "seconds_max": max(timing.seconds),
            "output_tokens_per_s": output_tokens / run.seconds,
            "total_tokens_per_s": (prompt_tokens + output_tokens) / run.seconds,
            "requests_per_s": len(pairs) / run.seconds,
            "load_s": subject.load_s,
            "peak_memory_bytes": timing.peak_memory_bytes,
            **request_times(run),
            **percentile_fields("e2e", [m.finished_time - m.arrival_time for m in finished]),
            **self._goodput(run),
            **_queue_depth(run),
            "late_max_s": max(run.late_s),
            **counted(run),
            **chunk_counts(run),
        }

    def _goodput(self, run: ServedRun) -> Row:
        if not self.limits:
            return {}
        num_good = sum(within(metrics, self.limits) for metrics in run.metrics)
        return {
            "goodput_share": num_good / len(run.metrics),
            "goodput_requests_per_s": num_good / run.seconds,
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that describe the work."""
    add = parser.add_argument_group("the work").add_argument
    add("--num-requests", type=count, default=256, metavar="N", help="(default: 256)")
    add("--input-len", type=lengths, default=Lengths(100, 1024), metavar="A:B",
        help="prompt lengths, uniformly random (default: 100:1024)")
    add("--output-len", type=lengths, default=Lengths(100, 1024), metavar="A:B",
        help="output lengths, uniformly random; end tokens are ignored (default: 100:1024)")
    add("--request-rate", type=rates, default=(float("inf"),), metavar="R,R,...",
        help="requests per second, each rate measured by itself; inf: all at once (default: inf)")
    add("--burstiness", type=positive, default=1.0, metavar="B",
        help="shape of the gaps' gamma distribution; 1: Poisson arrivals, less: bursts, more: "
        "evenly (default: 1)")
    add("--goodput", type=limit, action="append", default=[], metavar="TIME:MS",
        help=f"repeatable: how long {', '.join(LIMITED)} of a good request may take; itl: each gap")
    add("--temperature", type=float, default=0.6, help="(default: 0.6)")
    add_front_option(add)


def add_front_option(add: Any) -> None:
    """Who stands between users and engine."""
    add("--front", choices=FRONTS, default=FRONTS[0],
        help="async: a coroutine for each user; sync: a loop around the engine's steps "
        f"(default: {FRONTS[0]})")


def from_args(args: argparse.Namespace) -> ServeWork:
    """The work that was asked for."""
    return ServeWork(
        args.num_requests, args.input_len, args.output_len, args.request_rate, args.burstiness,
        dict(args.goodput), args.temperature, args.engine_seed or 0, args.front,
    )


def within(metrics: RequestMetrics, limits: Mapping[str, float]) -> bool:
    """Whether a request kept all limits; what it has not (the gaps of one token) it keeps."""
    longest = {
        "ttft": metrics.ttft or 0.0,
        "tpot": metrics.tpot or 0.0,
        "itl": max(metrics.itl, default=0.0),
        "e2e": (metrics.finished_time or 0.0) - metrics.arrival_time,
    }
    return all(longest[name] <= seconds for name, seconds in limits.items())


def depth(spans: Iterable[tuple[float, float]], seconds: float) -> tuple[float, int]:
    """How many of these spans of time overlap: the mean over so many seconds, and the peak."""
    spans = list(spans)
    # Of what happens at the same time an end comes first.
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return sum(end - begin for begin, end in spans) / seconds, peak


def _queue_depth(run: ServedRun) -> Row:
    waiting = [(m.arrival_time, m.first_scheduled_time) for m in run.metrics]
    present = [(m.arrival_time, m.finished_time) for m in run.metrics]
    row: Row = {}
    for name, spans in (("waiting", waiting), ("present", present)):
        row[f"num_{name}_mean"], row[f"num_{name}_peak"] = depth(spans, run.seconds)
    return row

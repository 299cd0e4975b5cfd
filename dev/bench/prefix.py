"""Prompts that begin alike: what a prefix cache saves, beside the most that it could.

    python -m dev.bench prefix --milestone m5 --milestone m6 --model random:qwen3-0.6b
    python -m dev.bench prefix --milestone m5 --milestone m6 --workload hit --workload none

Each workload begins with a cold cache: the tokens of every run are fresh. All who need not wait for
another's answer come at once. ``hit`` is one long prompt at a time in an idle engine, with most of
it cached and with nothing; ``none`` are prompts that have nothing in common.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from common.outputs import RequestOutput
from common.sampling_params import SamplingParams
from dev.bench.arguments import count, positive
from dev.bench.load import FRONTS, ServedRun, Users, chunk_counts, serve_async, serve_sync
from dev.bench.measure import Pass, Row, Timing
from dev.bench.prefix_workloads import WORKLOADS, Sizes, best_hits, prefix_requests
from dev.bench.runner import EngineSubject, counters_between
from dev.bench.serve import add_front_option
from dev.bench.throughput import counted, request_times
from dev.bench.workloads import BenchRequest, Lengths

HELP = "prompts that begin alike: hit rates, what they save, time to first token"
DEFAULT_WORKLOADS = ("shared-system", "few-shot", "multi-turn", "tree-of-thoughts")
_SUMS = ("num_queries", "num_hits", "num_query_tokens", "num_hit_tokens", "num_evicted")
_LEVELS = ("num_blocks", "num_nodes")


@dataclass(frozen=True)
class PrefixRun(ServedRun):
    """``served`` holds prompt and answer of each request, in the order in which they came."""

    served: Sequence[tuple[list[int], list[int]]] = ()


class Followers(Users):
    """Users of whom some wait for another one's answer, and go on from there."""

    def __init__(self, requests: Sequence[BenchRequest], temperature: float) -> None:
        super().__init__(requests, temperature)
        self.served: list[tuple[list[int], list[int]]] = [
            (list(request.prompt_token_ids), []) for request in requests
        ]
        self._first = [i for i, request in enumerate(requests) if request.after is None]
        self._after: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            if request.after is not None:
                self._after.setdefault(request.after, []).append(index)

    def submits(self, index: int, now: float) -> tuple[str, list[int], SamplingParams]:
        request_id, _, params = super().submits(index, now)
        return request_id, self.served[index][0], params

    def sees(self, output: RequestOutput, now: float) -> list[int]:
        super().sees(output, now)
        index = int(output.request_id)
        prompt, answer = self.served[index]
        answer += output.outputs[0].token_ids
        if not output.finished:
            return []
        followers = self._after.get(index, [])
        for follower in followers:
            self.metrics[follower].arrival_time = now
            if num_tokens := self.requests[follower].context_len:
                self.served[follower][0][:0] = (prompt + answer)[:num_tokens]
        return followers

    def in_order(self) -> list[tuple[list[int], list[int]]]:
        """``served``, who came first in front."""
        order = sorted(range(len(self.served)), key=lambda i: self.metrics[i].arrival_time)
        return [self.served[index] for index in order]


@dataclass(frozen=True)
class PrefixPass(Pass):
    """One workload."""

    workload: str = DEFAULT_WORKLOADS[0]
    sizes: Sizes = field(default_factory=Sizes)
    front: str = FRONTS[0]

    def requests(self, vocab_size: int, run: int) -> list[BenchRequest]:
        return prefix_requests(
            self.workload, self.sizes, vocab_size=vocab_size, seed=self.seed, run=run
        )

    def run(self, subject: EngineSubject, requests: Sequence[BenchRequest]) -> PrefixRun:
        engine = subject.engine
        before = engine.stats()
        users = Followers(requests, self.temperature)
        start = time.perf_counter()
        if self.front == "async":
            asyncio.run(serve_async(engine, users))
        else:
            serve_sync(engine, users)
        users.check(subject.name)
        seconds = max(metrics.token_times[-1] for metrics in users.metrics) - start
        after = engine.stats()
        counters = counters_between(before, after) | _prefix_counters(before, after)
        return PrefixRun(seconds, users.metrics, counters, users.late_s, users.in_order())


@dataclass(frozen=True)
class PrefixWork:
    """Some workloads, one after the other."""

    workloads: tuple[str, ...]
    sizes: Sizes
    temperature: float
    seed: int
    front: str
    batch_size: ClassVar[int | None] = None
    max_num_seqs: ClassVar[int | None] = None
    default_repeat: ClassVar[int] = 3
    kind: ClassVar[str] = "prefix"

    def describe(self) -> Mapping[str, Any]:
        return {
            "workloads": ", ".join(self.workloads),
            **vars(self.sizes),
            "front": self.front,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def passes(self) -> list[Pass]:
        passes: list[Pass] = []
        for workload in self.workloads:
            requests = prefix_requests(workload, self.sizes, vocab_size=1)
            any_length = Lengths(1, max(request.input_len for request in requests))
            passes.append(
                PrefixPass(workload, len(requests), any_length, any_length, self.seed,
                           self.temperature, workload, self.sizes, self.front)
            )
        return passes

    def rows(self, subject: EngineSubject, timings: Sequence[Timing]) -> list[Row]:
        return [
            self._row(subject, workload, timing)
            for workload, timing in zip(self.workloads, timings, strict=True)
        ]

    def _row(self, subject: EngineSubject, workload: str, timing: Timing) -> Row:
        run, pairs = timing.median_run, timing.of.lengths()
        prompt_tokens, output_tokens = (sum(column) for column in zip(*pairs, strict=True))
        return {
            "name": subject.name,
            "measure": "prefix",
            "workload": workload,
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
            **_idle_times(workload, timing.runs),
            **_hit_rates(subject, run),
            **counted(run),
            **chunk_counts(run),
        }


def _prefix_counters(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, int]:
    """What a run added to the counters of the prefix index, and how large that is at its end."""
    old, new = before["prefix_cache"], after["prefix_cache"]
    if not new:
        return {}
    counters = {f"prefix_{name}": new[name] - old.get(name, 0) for name in _SUMS}
    return counters | {f"prefix_{name}": new[name] for name in _LEVELS}


def _hit_rates(subject: EngineSubject, run: PrefixRun) -> Row:
    """What was found, and what a cache without limits would have found.

    Who was preempted looks again and finds what it had computed itself: the engine counts that too.
    """
    block_size = getattr(subject.engine.config, "block_size", 16)
    best = best_hits(run.served, block_size)
    prompt_tokens = sum(len(prompt) for prompt, _ in run.served)
    row: Row = {
        "best_hit_token_share": best.num_tokens / prompt_tokens,
        "best_hit_request_share": best.num_requests / len(run.served),
    }
    found = {name: run.counters.get(f"prefix_{name}", 0) for name in (*_SUMS, *_LEVELS)}
    row |= {
        "prefix_index": getattr(subject.engine.config, "prefix_index", "off"),
        "tokens_saved": found["num_hit_tokens"],
        "hit_token_share": found["num_hit_tokens"] / max(found["num_query_tokens"], 1),
        "hit_request_share": found["num_hits"] / max(found["num_queries"], 1),
        "num_blocks_evicted": found["num_evicted"],
        "index_blocks": found["num_blocks"],
        "index_nodes": found["num_nodes"],
    }
    if best.num_tokens:
        row["share_of_best"] = row["hit_token_share"] / row["best_hit_token_share"]
    return row


def _idle_times(workload: str, runs: Sequence[PrefixRun]) -> Row:
    """Of ``hit``: the median time of the prompt that is cached and of the one that is not."""
    if workload != "hit":
        return {}
    uncached, cached = (statistics.median(run.metrics[i].ttft for run in runs) for i in (0, 2))
    return {"uncached_ttft_s": uncached, "cached_ttft_s": cached}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that describe the work."""
    add = parser.add_argument_group("the work").add_argument
    add("--workload", action="append", choices=WORKLOADS,
        help=f"repeatable (default: {', '.join(DEFAULT_WORKLOADS)})")
    helps = {
        "users": "requests of shared-system, few-shot and none, all at once",
        "system_len": "the system prompt they share",
        "few_shot_len": "the examples that those of few-shot share",
        "few_shot_question_len": "and what follows these",
        "conversations": "multi-turn: how many at a time",
        "turns": "turns of each",
        "question_len": "what each user adds: shared-system, multi-turn, none",
        "output_len": "each answer; of few-shot an eighth of it",
        "problem_len": "tree-of-thoughts: what all begin with",
        "depth": "thoughts behind each other",
        "fan_out": "thoughts beside each other",
        "thought_len": "the length of a thought",
        "hit_len": "hit: the prompt",
        "cached_len": "so much of it is cached",
    }
    for size in fields(Sizes):
        kind = "T" if size.name.endswith("_len") else "N"
        add(f"--{size.name.replace('_', '-')}", type=count, default=size.default, metavar=kind,
            help=f"{helps[size.name]} (default: {size.default})")
    add("--scale", type=positive, default=1.0, metavar="F",
        help="multiplies all lengths, for smaller machines (default: 1)")
    add("--temperature", type=float, default=0.0, help="(default: 0)")
    add_front_option(add)


def from_args(args: argparse.Namespace) -> PrefixWork:
    """The work that was asked for; ValueError where it makes no sense."""
    if args.cached_len >= args.hit_len:
        raise ValueError(
            f"--cached-len must be less than --hit-len ({args.hit_len}), got {args.cached_len}"
        )
    workloads = tuple(dict.fromkeys(args.workload or DEFAULT_WORKLOADS))
    given = {size.name: getattr(args, size.name) for size in fields(Sizes)}
    return PrefixWork(
        workloads, Sizes(**given).scaled(args.scale), args.temperature, args.engine_seed or 0,
        args.front,
    )

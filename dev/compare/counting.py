"""Work measured without a clock: the same figures on every machine.

    CrowdWork: requests wait for a cache that is too small. How many run in it at once?
    StallWork: prompts arrive while others decode. How many tokens are computed between two of
        theirs?

    CountedPrefix: prompts that begin alike. How many of their tokens are computed?

The first two put one of the engine's counters in place of the time of day, so that what is noted
of each token is after how many steps, or after how many computed tokens, it came.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from common.metrics import percentiles
from dev.bench.load import Hold, ServedRun, Users, serve_sync
from dev.bench.measure import Pass, Row, Timing
from dev.bench.mixed import MixedPass, find_window
from dev.bench.prefix import PrefixWork
from dev.bench.runner import EngineSubject, counters_between
from dev.bench.throughput import counted
from dev.bench.workloads import BenchRequest, Lengths


def serve_counted(
    subject: EngineSubject,
    requests: Sequence[BenchRequest],
    counter: str,
    hold: Hold | None = None,
) -> ServedRun:
    """Serve requests greedily; ``metrics`` and ``seconds`` are in units of a counter of the engine.

    Raises:
        RuntimeError: a request did not get all its tokens.
    """
    engine = subject.engine
    before = engine.stats()
    users = Users(requests, 0.0, hold)
    serve_sync(engine, users, clock=lambda: engine.stats()[counter])
    users.check(subject.name)
    after = engine.stats()
    return ServedRun(
        after[counter] - before[counter], users.metrics, counters_between(before, after),
        users.late_s,
    )


@dataclass(frozen=True)
class CrowdPass(Pass):
    """All requests at once; a token's time is the number of its step."""

    def run(self, subject: EngineSubject, requests: Sequence[BenchRequest]) -> ServedRun:
        return serve_counted(subject, requests, "num_steps")


@dataclass(frozen=True)
class CrowdWork:
    """N requests for a KV cache that cannot hold them all."""

    num_requests: int
    input_len: Lengths
    output_len: Lengths
    seed: int = 0
    batch_size: ClassVar[int | None] = None
    max_num_seqs: ClassVar[int | None] = None
    kind: ClassVar[str] = "crowd"

    def describe(self) -> Mapping[str, Any]:
        return {
            "requests": self.num_requests,
            "input_len": str(self.input_len),
            "output_len": str(self.output_len),
            "temperature": 0.0,
            "seed": self.seed,
        }

    def passes(self) -> list[Pass]:
        return [
            CrowdPass(f"{self.num_requests} requests in a small cache", self.num_requests,
                      self.input_len, self.output_len, self.seed)
        ]

    def rows(self, subject: EngineSubject, timings: Sequence[Timing]) -> list[Row]:
        (timing,) = timings
        run = timing.median_run
        return [
            {
                "name": subject.name,
                "measure": "crowd",
                "num_requests": timing.of.num_requests,
                "at_once": served_at_once(run),
                **counted(run),
            }
        ]


def served_at_once(run: ServedRun) -> float:
    """How many requests get a token in a step: the median over the steps after which somebody
    still waits for a first one, which is then not spoilt by steps that only compute prompts."""
    last_admitted = max(metrics.token_times[0] for metrics in run.metrics)
    tokens_of_step = Counter(step for metrics in run.metrics for step in metrics.token_times)
    crowded = [n for step, n in tokens_of_step.items() if step < last_admitted]
    return statistics.median(crowded or tokens_of_step.values())


@dataclass(frozen=True)
class StallPass(MixedPass):
    """Decodes run and prompts arrive; a token's time is how many had been computed before it."""

    def run(self, subject: EngineSubject, requests: Sequence[BenchRequest]) -> ServedRun:
        hold = Hold(self.num_requests, self.warmup_tokens)
        return serve_counted(subject, requests, "num_forward_tokens", hold)


@dataclass(frozen=True)
class StallWork:
    """D decodes and P prompts, as the bench's ``mixed``."""

    num_decodes: int
    decode_len: int
    output_len: int
    num_prompts: int
    prompt_len: int
    warmup_tokens: int = 8
    tail_tokens: int = 4
    seed: int = 0
    kind: ClassVar[str] = "stall"

    @property
    def batch_size(self) -> int:
        """Most sequences at once."""
        return self.num_decodes + self.num_prompts

    @property
    def max_num_seqs(self) -> int:
        """What the engine's option of that name should be, unless it is given."""
        return self.batch_size

    def describe(self) -> Mapping[str, Any]:
        return {
            "decodes": self.num_decodes,
            "decode_input_len": self.decode_len,
            "decode_output_len": self.output_len,
            "prompts": self.num_prompts,
            "prompt_len": self.prompt_len,
            "warmup_tokens": self.warmup_tokens,
            "tail_tokens": self.tail_tokens,
            "temperature": 0.0,
            "seed": self.seed,
        }

    def passes(self) -> list[Pass]:
        return [
            StallPass(
                f"{self.num_decodes} decodes, {self.num_prompts} x {self.prompt_len} arrive",
                self.num_decodes,
                Lengths(self.decode_len, self.decode_len),
                Lengths(self.output_len, self.output_len),
                self.seed,
                num_prompts=self.num_prompts,
                prompt_len=self.prompt_len,
                prompt_output_len=1,
                warmup_tokens=self.warmup_tokens,
            )
        ]

    def rows(self, subject: EngineSubject, timings: Sequence[Timing]) -> list[Row]:
        (timing,) = timings
        run = timing.median_run
        decodes, prompts = run.metrics[: self.num_decodes], run.metrics[self.num_decodes :]
        window = find_window(
            subject.name, decodes, prompts, self.warmup_tokens, self.tail_tokens
        )
        gaps = percentiles(window.gaps)
        return [
            {
                "name": subject.name,
                "measure": "stall",
                "num_requests": self.batch_size,
                **{f"gap_{point}_tokens": value for point, value in gaps.items()},
                **counted(run),
            }
        ]


@dataclass(frozen=True)
class CountedPrefix(PrefixWork):
    """The bench's ``prefix``, and what is computed of the prompts."""

    def rows(self, subject: EngineSubject, timings: Sequence[Timing]) -> list[Row]:
        rows = super().rows(subject, timings)
        for row in rows:
            # Of the workload "hit" only its last prompt, which is the one that can be found.
            num_tokens = self.sizes.hit_len if row["workload"] == "hit" else row["prompt_tokens"]
            row["computed_tokens"] = num_tokens - row["tokens_saved"]
        return rows

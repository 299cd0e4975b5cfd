"""What is measured: presets, each a list of parts.

A part is one kind of work that several milestones do alike. ``quick`` fits two CPU cores, ``h200``
one large GPU; ``scale`` makes either smaller, to try out a run before it is paid for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dev.bench.latency import LatencyWork
from dev.bench.measure import Row, Schedule, Timing, Work
from dev.bench.mixed import MixedWork
from dev.bench.prefix_workloads import Sizes
from dev.bench.runner import EngineSubject, config_class
from dev.bench.throughput import ThroughputWork
from dev.bench.workloads import Lengths
from dev.compare.counting import CountedPrefix, CrowdWork, StallWork

DEFAULT_MODEL = "smollm2-135m-instruct"
# What only counts tokens, steps and slots needs no model that knows anything.
COUNTING_MODEL = "random:tiny-llama"
QUANTIZED = "-gptq"
"""Behind a preset's name: its shape with random weights of 4 bits."""
EAGER_WARMUP = 8
"""Requests that warm up a milestone before m4, which captures no graphs."""


@dataclass(frozen=True)
class Part:
    """One kind of work.

    model: None is the model of the run. quantized_from: this milestone and later ones take its
    4-bit version. first, last: the milestones that do it, by number.
    options: of the engine; those that a milestone does not have are left out for it.
    kv_tokens: size of the KV cache, whatever the milestone calls it.
    budget_s: how long one milestone may take for it.
    """

    name: str
    title: str
    work: Work
    model: str | None = None
    quantized_from: str | None = None
    first: str = "m1"
    last: str = "m9"
    options: Mapping[str, Any] = field(default_factory=dict)
    kv_tokens: int | None = None
    repeat: int = 1
    warmup: int | None = None
    budget_s: float = 300.0

    def takes(self, milestone: str) -> bool:
        """Whether a milestone does this."""
        return self.first <= milestone.split("_")[0] <= self.last

    def engine_options(self, milestone: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` and the part's own, as far as the milestone has them; the part's own win."""
        options = {**given, **self.options}
        if self.model is not None:
            options["model"] = self.model
        if self.quantized_from is not None and milestone >= self.quantized_from:
            options |= {"model": options["model"] + QUANTIZED, "weight_form": "packed"}
        if self.work.max_num_seqs is not None:
            options["max_num_seqs"] = self.work.max_num_seqs
        if self.kv_tokens is not None:
            options["num_kv_tokens"] = self.kv_tokens
            options["num_kv_blocks"] = self.kv_tokens // options.get("block_size", 16)
        names = {option.name for option in fields(config_class(milestone))}
        return {name: value for name, value in options.items() if name in names}

    def schedule(self, milestone: str) -> Schedule:
        """How often a milestone does it."""
        warmup = self.warmup
        if warmup is None and milestone < "m4":
            warmup = EAGER_WARMUP
        return Schedule(self.repeat, warmup)


@dataclass(frozen=True)
class WeighedLatency(LatencyWork):
    """Latency, and what the weights of the linear layers take."""

    def rows(self, subject: EngineSubject, timings: Sequence[Timing]) -> list[Row]:
        size = linear_bytes(subject)
        return [{**row, "linear_bytes": size} for row in super().rows(subject, timings)]


def linear_bytes(subject: EngineSubject) -> int:
    """Bytes that the weights of the layers take as they are multiplied: all matrices but the
    embedding and the head."""
    told = subject.engine.stats().get("linear_bytes")  # from m7 on, where they may be packed
    if told:
        return told["memory"]
    weights = subject.engine.model.layers.parameters()
    return sum(w.numel() * w.element_size() for w in weights if w.dim() > 1)


def quick(scale: float) -> list[Part]:
    """A minute on two CPU cores with the default model: times of small work, and counts."""
    size = _Scale(scale)
    few_slots = size(8192)
    return [
        Part(
            "throughput",
            "requests of different lengths, all there at the start",
            ThroughputWork(size.count(8), size.range(16, 64), size.range(8, 24), 0.6, 0),
            options={"max_model_len": 1024},
            warmup=1,
        ),
        Part(
            "latency",
            "one request alone: a token, and the first token",
            LatencyWork((1,), size(32), size(8) + 1, (size(128),), 0),
            options={"max_model_len": 1024},
            repeat=2,
            warmup=1,
        ),
        Part(
            "memory",
            "more requests than the KV cache holds",
            CrowdWork(size.count(48), size.range(100, 512), size.range(16, 48)),
            model=COUNTING_MODEL,
            first="m2",
            options={"max_model_len": max(2, few_slots // 8)},
            kv_tokens=few_slots,
            warmup=0,
        ),
        Part(
            "stall",
            "long prompts arrive while others decode, counted in tokens",
            StallWork(size.count(8), size(16), 64, size.count(4), size(512)),
            model=COUNTING_MODEL,
            first="m2",
            options={"max_num_batched_tokens": 256},
            warmup=0,
        ),
        Part(
            "prefix",
            "prompts that begin alike, one long prompt whose beginning is cached, and neither",
            CountedPrefix(
                ("shared-system", "hit", "none"),
                Sizes(users=size.count(16), system_len=size(256), question_len=size(32),
                      output_len=size(8), hit_len=size(1024), cached_len=size(992)),
                0.0, 0, "sync",
            ),
            model=COUNTING_MODEL,
            first="m5",
            warmup=0,
        ),
    ]


def h200(scale: float) -> list[Part]:
    """A quarter of an hour on one H200 for m1 to m7, Qwen3-0.6B's shapes."""
    size = _Scale(scale)
    batched = {"max_model_len": max(64, size(2048))}
    return [
        Part(
            "throughput",
            "256 requests of different lengths, all there at the start",
            ThroughputWork(size.count(256), size.range(100, 1024), size.range(100, 1024), 0.6, 0),
            first="m2",
            options=batched,
            budget_s=60,
        ),
        Part(
            "requests",
            "32 short requests, all there at the start",
            ThroughputWork(size.count(32), size.range(100, 512), size.range(32, 128), 0.6, 0),
            options=batched,
            budget_s=50,
        ),
        Part(
            "latency",
            "one request alone: a token, and the first token",
            LatencyWork((1,), size(128), size(128) + 1, (size(512), size(8192)), 0),
            repeat=3,
            budget_s=40,
        ),
        Part(
            "batches",
            "a token for each of several requests",
            LatencyWork((size.count(8), size.count(64), size.count(256)), size(128),
                        size(128) + 1, (), 0),
            first="m2",
            repeat=3,
            budget_s=40,
        ),
        Part(
            "long",
            "the first token of a very long prompt",
            LatencyWork((1,), size(2048), size(128) + 1, (size(2048), size(32_768)), 0),
            first="m4",
            repeat=2,
            budget_s=30,
        ),
        Part(
            "memory",
            "more requests than the KV cache holds",
            CrowdWork(size.count(256), size.range(100, 1024), size.range(100, 1024)),
            model=COUNTING_MODEL,
            first="m2",
            last="m5",
            options=batched,
            kv_tokens=max(256, size(65_536)),
            warmup=0,
            budget_s=40,
        ),
        Part(
            "stall",
            "long prompts arrive while others decode, counted in tokens",
            StallWork(size.count(64), size(16), 64, size.count(4), size(1536)),
            model=COUNTING_MODEL,
            first="m2",
            options={"max_num_batched_tokens": max(256, size(512))},
            warmup=0,
            budget_s=20,
        ),
        Part(
            "mixed",
            "long prompts arrive while others decode",
            MixedWork(size.count(64), size(256), size(928) + 96, size.count(4), size(8192), 16,
                      size(60) + 4, 16, 0.0, 0, "async"),
            first="m4",
            repeat=3,
            budget_s=40,
        ),
        Part(
            "prefix",
            "prompts that begin alike, one long prompt whose beginning is cached, and neither",
            CountedPrefix(("shared-system", "hit", "none"), Sizes().scaled(scale), 0.0, 0,
                          "async"),
            first="m5",
            repeat=3,
            budget_s=40,
        ),
        *(
            Part(
                name,
                f"weights of 4 bits, from m7 on, {shape} shapes; before it bfloat16",
                WeighedLatency((1, size.count(8), size.count(16)), size(128), size(128) + 1,
                               (size(512),), 0),
                model=COUNTING_MODEL if scale < 1 else f"random:{preset}",
                quantized_from="m7",
                first="m6",
                options={"dtype": "bfloat16", **batched},
                repeat=3,
                budget_s=60,
            )
            for name, preset, shape in (
                ("four-bits", "qwen3-0.6b", "Qwen3-0.6B's"),
                ("four-bits-8b", "qwen3-8b", "Qwen3-8B's"),
            )
        ),
    ]


@dataclass(frozen=True)
class Preset:
    """Parts, the model they are measured with, and how long all of it may take."""

    name: str
    parts: Callable[[float], list[Part]]
    model: str
    limit_s: float


PRESETS = {
    "quick": Preset("quick", quick, DEFAULT_MODEL, 1800.0),
    "h200": Preset("h200", h200, "random:qwen3-0.6b", 900.0),
}


@dataclass(frozen=True)
class _Scale:
    """Makes lengths and numbers of requests smaller, none less than 1."""

    factor: float

    def __call__(self, length: int) -> int:
        return max(1, round(length * self.factor))

    def count(self, number: int) -> int:
        """As many requests: fewer only where they would be fewer than a half."""
        return max(min(number, 2), round(number * min(1.0, self.factor * 4)))

    def range(self, low: int, high: int) -> Lengths:
        """A range of lengths, at least 1 to 2."""
        return Lengths(self(low), max(2, self(high)))

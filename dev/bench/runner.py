"""Runs a milestone's engine on a workload and notes what happened.

    subject = EngineSubject("m3_paged", {"model": "random:tiny-llama"})
    run = subject.run(requests, temperature=0.6)
    run.seconds, run.counters["num_steps"]
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from common.checkpoint import Checkpoint
from common.config import ModelConfig
from common.engine_config import BaseEngineConfig
from common.environment import REPOSITORY
from common.metrics import RequestMetrics
from common.sampling_params import RequestOutputKind, SamplingParams
from dev.bench.workloads import BenchRequest

# Counters of ``EngineStats`` that grow: what a run added to them is what belongs to it.
_SUMS = (
    "num_steps",
    "num_preemptions",
    "num_prompt_tokens",
    "num_generated_tokens",
    "num_forward_tokens",
    "num_padding_tokens",
    "num_graph_steps",
    "flops",
    "step_time_s",
    "schedule_time_s",
)
# What describes the engine as a whole; averages and peaks count from its start.
_LEVELS = (
    "num_graphs_captured",
    "capture_time_s",
    "kv_slots_total",
    "kv_slots_used_peak",
    "kv_slots_allocated_peak",
    "kv_utilization",
    "num_running_peak",
    "num_running_mean",
)


@dataclass(frozen=True)
class Run:
    """One pass over a workload. Who does not report a thing leaves it empty."""

    seconds: float
    metrics: Sequence[RequestMetrics] = ()
    counters: Mapping[str, Any] = field(default_factory=dict)


class Subject(Protocol):
    """What can be measured: a milestone's engine, or transformers."""

    name: str
    model_config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    saved_bytes: int  # by which quantized linear layers are smaller than in `dtype`; else 0
    load_s: float

    def run(self, requests: Sequence[BenchRequest], temperature: float) -> Run:
        """Serve all requests, submitted at once. Every one gets exactly its number of tokens."""


def milestone_names() -> list[str]:
    """Every milestone of this checkout, in order."""
    return sorted(path.parent.name for path in REPOSITORY.glob("m[0-9]_*/engine.py"))


def find_milestone(name: str) -> str:
    """The full name of ``m3_paged`` or, shorter, ``m3``; ValueError where there is none."""
    names = milestone_names()
    found = [full for full in names if name == full or full.split("_")[0] == name]
    if not found:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"there is no milestone {name!r}: {hint}")
    return found[0]


def config_class(milestone: str) -> type[BaseEngineConfig]:
    """The ``EngineConfig`` of a milestone."""
    return importlib.import_module(milestone).EngineConfig


def open_checkpoint(milestone: str, model: str, seed: int) -> Checkpoint:
    """A model as a milestone's engine opens it: not every one reads quantized weights."""
    return importlib.import_module(f"{milestone}.engine").open_checkpoint(model, seed=seed)


class EngineSubject:
    """One milestone's engine."""

    def __init__(self, milestone: str, options: Mapping[str, Any]) -> None:
        """Load it; ``options`` are fields of its ``EngineConfig``."""
        start = time.perf_counter()
        module = importlib.import_module(milestone)
        self.name = milestone
        self.engine = module.LLMEngine(module.EngineConfig.from_options(**options))
        self.model_config: ModelConfig = self.engine.model_config
        self.device: torch.device = self.engine.device
        self.dtype: torch.dtype = self.engine.dtype
        self.max_model_len: int = self.engine.max_model_len
        sizes = self.engine.stats()["linear_bytes"]
        self.saved_bytes = sizes["full"] - sizes["stored"] if sizes else 0
        self.load_s = time.perf_counter() - start

    def describe(self) -> dict[str, Any]:
        """All options as the engine understood them."""
        options = dataclasses.asdict(self.engine.config)
        options |= {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        return options | {"max_model_len": self.max_model_len}

    def run(self, requests: Sequence[BenchRequest], temperature: float) -> Run:
        """See ``Subject``. Token ids only: text is not part of what is compared."""
        engine = self.engine
        before = engine.stats()
        finished = []
        start = time.perf_counter()
        for index, request in enumerate(requests):
            params = SamplingParams(
                temperature=temperature,
                max_tokens=request.output_len,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(index), request.prompt_token_ids, params)
        while engine.has_unfinished_requests():
            finished += engine.step()
        seconds = time.perf_counter() - start

        for output in finished:
            index, sample = int(output.request_id), output.outputs[0]
            check_complete(
                self.name, index, len(sample.token_ids), requests[index].output_len,
                sample.stop_reason,
            )
        counters = counters_between(before, engine.stats())
        return Run(seconds, [output.metrics for output in finished], counters)


def check_complete(who: str, index: int, got: int, wanted: int, why: int | str | None) -> None:
    """RuntimeError unless a request got all its tokens: the work would have been less."""
    if got != wanted:
        raise RuntimeError(
            f"{who} gave request {index} {got} of {wanted} tokens ({why}): "
            "the measurement would not count"
        )


def counters_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What a run added to an engine's counters; averages and peaks as they are at its end."""
    counters = {name: after[name] - before[name] for name in _SUMS}
    chunks = after["chunk_reasons"], before["chunk_reasons"]
    counters |= {f"chunks_by_{why}": n - chunks[1].get(why, 0) for why, n in chunks[0].items()}
    return counters | {name: after[name] for name in _LEVELS}

"""A whole step as one launch: from the token ids in to the sampled ids out.

A step of a small model is a few hundred kernels of a few microseconds each, and launching them
from Python takes longer than running them. A CUDA graph records the launches once and replays them
with a single call. What it replays is fixed: kernels, shapes, addresses. So

* there is a graph for each *bucket* of sizes; a batch is padded up to the next one;
* inputs are written to the same memory before every replay;
* everything that may change is data: lengths, tables, rows of the sampler, how work is split.

Decode steps (``decode_graphs``) all come from graphs. Prefill steps (``prefill_graphs``) do if they
are short and of a shape that comes again; a long one keeps the GPU busy by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from common.metrics import EngineStats
from common.sampling import Sampler, SamplerOutput


@dataclass(frozen=True)
class CapturedStep:
    """A graph, and where every replay leaves what it samples."""

    graph: torch.cuda.CUDAGraph
    sampled: SamplerOutput


class StepGraphs:
    """The graphs of one engine by a key that says what they launch.

    All draw their temporary memory from one pool: only one of them runs at a time.
    """

    def __init__(self, sampler: Sampler, stats: EngineStats) -> None:
        self._sampler = sampler
        self._sampler_version = sampler.version
        self._stats = stats
        self._captured: dict[Hashable, CapturedStep] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def get(self, key: Hashable) -> CapturedStep | None:
        """The graph of ``key``, if there is one that is still valid."""
        if self._sampler_version != self._sampler.version:
            # The graphs would read tables of the sampler that have since grown and moved.
            self.clear()
            self._sampler_version = self._sampler.version
        return self._captured.get(key)

    def clear(self) -> None:
        """Forget all graphs."""
        self._captured.clear()
        self._pool = torch.cuda.graph_pool_handle()  # the old one goes with the last of its graphs

    def capture(self, key: Hashable, step: Callable[[], SamplerOutput]) -> CapturedStep:
        """Record what ``step`` launches; nothing is computed yet.

        It must have run before: kernels are compiled and libraries set up by a first run, and that
        cannot be captured.
        """
        start = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                sampled = step()
        except BaseException:
            if not self._captured:  # a pool goes with its last graph, which this would have been
                self._pool = torch.cuda.graph_pool_handle()
            raise
        self._captured[key] = CapturedStep(graph, sampled)
        self._stats.num_graphs_captured += 1
        self._stats.capture_time_s += time.perf_counter() - start
        return self._captured[key]

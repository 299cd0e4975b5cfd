"""The numbers by which serving is judged, per request and for the engine as a whole.

TTFT (time to first token) is what a user waits before anything appears, TPOT (time per output
token) the mean pace after that, ITL (inter-token latency) each single gap. All times are seconds
of ``time.perf_counter()``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class RequestMetrics:
    """When things happened to one request; unset times are None."""

    arrival_time: float = field(default_factory=time.perf_counter)
    first_scheduled_time: float | None = None
    token_times: list[float] = field(default_factory=list)
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def first_token_time(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def last_token_time(self) -> float | None:
        return self.token_times[-1] if self.token_times else None

    @property
    def queue_time(self) -> float | None:
        """Seconds in the waiting queue before the first step that ran it."""
        if self.first_scheduled_time is None:
            return None
        return self.first_scheduled_time - self.arrival_time

    @property
    def ttft(self) -> float | None:
        """Time to first token in seconds."""
        return None if not self.token_times else self.token_times[0] - self.arrival_time

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first, in seconds; None with fewer than two."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    @property
    def itl(self) -> list[float]:
        """Gaps between successive tokens in seconds."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass
class EngineStats:
    """Counters of an engine since it started. Times are sums in seconds, sizes are in tokens."""

    num_steps: int = 0
    num_requests_finished: int = 0  # sequences: n samples count n times, aborted ones too
    num_preemptions: int = 0
    # Useful work: prompt tokens whose K/V were computed (again after a preemption), tokens sampled.
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    # Rows the model computed, and how many of them were padding.
    num_forward_tokens: int = 0
    num_padding_tokens: int = 0
    flops: int = 0
    # CUDA graphs (from m4 on): how many were recorded, the compilation of their kernels included.
    num_graphs_captured: int = 0
    capture_time_s: float = 0.0
    num_graph_steps: int = 0
    # From m5 on, chunks of prompts by what ended them: "prompt" (nothing was left), "budget" (of
    # the step), "chunk" (the size that was given), "itl" (the target), "blocks" (that were free).
    chunk_reasons: dict[str, int] = field(default_factory=dict)
    # From m6 on, the counters of the prefix index (``PrefixStats`` there).
    prefix_cache: dict[str, int] = field(default_factory=dict)
    # From m7 on, where they are quantized, bytes of the linear layers: "stored" in the checkpoint,
    # in "memory", and what they would take "full", in the dtype of the activations.
    linear_bytes: dict[str, int] = field(default_factory=dict)
    step_time_s: float = 0.0
    schedule_time_s: float = 0.0
    # KV slots (one slot holds the keys and values of one token in all layers).
    kv_slots_total: int = 0
    kv_slots_used: int = 0
    kv_slots_allocated: int = 0
    kv_slots_used_peak: int = 0
    kv_slots_allocated_peak: int = 0
    num_running_peak: int = 0
    _running_sum: int = 0
    _num_records: int = 0
    _kv_used_sum: int = 0
    _kv_allocated_sum: int = 0

    def record_kv(self, used: int, allocated: int, num_running: int) -> None:
        """Note the cache's state after a step's allocation; utilization is averaged over steps."""
        self.kv_slots_used = used
        self.kv_slots_allocated = allocated
        self.kv_slots_used_peak = max(self.kv_slots_used_peak, used)
        self.kv_slots_allocated_peak = max(self.kv_slots_allocated_peak, allocated)
        self.num_running_peak = max(self.num_running_peak, num_running)
        self._running_sum += num_running
        self._num_records += 1
        self._kv_used_sum += used
        self._kv_allocated_sum += allocated

    @property
    def kv_utilization(self) -> float | None:
        """Share of the allocated KV slots that hold a token, averaged over all steps."""
        return self._kv_used_sum / self._kv_allocated_sum if self._kv_allocated_sum else None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON and for people; derived ratios included."""
        values = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        values["num_running_mean"] = (
            self._running_sum / self._num_records if self._num_records else None
        )
        values["kv_utilization"] = self.kv_utilization
        values["internal_fragmentation"] = (
            None if self.kv_utilization is None else 1.0 - self.kv_utilization
        )
        values["padding_share"] = (
            self.num_padding_tokens / self.num_forward_tokens if self.num_forward_tokens else None
        )
        values["schedule_share"] = (
            self.schedule_time_s / self.step_time_s if self.step_time_s else None
        )
        found = self.prefix_cache
        for rate, hits, all_of_them in (
            ("prefix_token_hit_rate", "num_hit_tokens", "num_query_tokens"),
            ("prefix_request_hit_rate", "num_hits", "num_queries"),
        ):
            values[rate] = found[hits] / found[all_of_them] if found.get(all_of_them) else None
        return values


def percentiles(
    values: Sequence[float], points: Sequence[float] = (50, 90, 99)
) -> dict[str, float]:
    """Percentiles by name, and the mean and maximum; an empty sequence gives an empty dict."""
    if not values:
        return {}
    array = np.asarray(values, dtype=np.float64)
    result = {f"p{point:g}": float(np.percentile(array, point)) for point in points}
    return {"mean": float(array.mean()), **result, "max": float(array.max())}

"""Users of an engine: requests that come while others run, and what each user sees when.

    run = serve(subject, requests, temperature=0.6, front="async")
    run.metrics[3].ttft, run.late_s[3]

With the front ``async`` each user is a coroutine of ``common.async_llm.AsyncLLM``; ``sync`` is
a plain loop around ``engine.step``. The difference between the two is what the front costs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.async_llm import AsyncLLM
from common.llm import Engine
from common.metrics import RequestMetrics
from common.outputs import RequestOutput
from common.sampling_params import RequestOutputKind, SamplingParams
from dev.bench.runner import EngineSubject, Run, check_complete, counters_between
from dev.bench.workloads import BenchRequest

FRONTS = ("async", "sync")

Clock = Callable[[], float]


@dataclass(frozen=True)
class ServedRun(Run):
    """Times are those the users saw; ``metrics`` are in the order of the requests."""

    late_s: Sequence[float] = ()  # from when a request should have been submitted until it was


@dataclass(frozen=True)
class Hold:
    """Keeps all but the first requests back until each of the first has had so many tokens."""

    num_first: int
    num_tokens: int


class Users:
    """One user for each request: when the request is due, and what has come of it."""

    def __init__(
        self, requests: Sequence[BenchRequest], temperature: float, hold: Hold | None = None
    ) -> None:
        self.requests = requests
        self.params = [
            SamplingParams(
                temperature=temperature,
                max_tokens=request.output_len,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            for request in requests
        ]
        self.metrics: list[RequestMetrics] = []
        self.late_s = [0.0] * len(requests)
        self._stop_reasons: list[int | str | None] = [None] * len(requests)
        num_first = len(requests) if hold is None else hold.num_first
        self._first = range(min(num_first, len(requests)))
        self._held = list(range(len(self._first), len(requests)))
        self._num_tokens_to_wait_for = 0 if hold is None else hold.num_tokens
        self._num_waited_for = len(self._first)

    def begin(self, now: float) -> deque[tuple[float, int]]:
        """Start the clock; returns who comes when, in order, without those that are held."""
        self.metrics = [RequestMetrics(now + request.arrival_s) for request in self.requests]
        return deque(sorted((self.metrics[index].arrival_time, index) for index in self._first))

    def submits(self, index: int, now: float) -> tuple[str, list[int], SamplingParams]:
        """A user submits: request id, prompt and parameters."""
        self.late_s[index] = max(0.0, now - self.metrics[index].arrival_time)
        return str(index), self.requests[index].prompt_token_ids, self.params[index]

    def sees(self, output: RequestOutput, now: float) -> list[int]:
        """A user sees new tokens; returns the users that have been held for this, once."""
        index, sample = int(output.request_id), output.outputs[0]
        metrics = self.metrics[index]
        num_before = len(metrics.token_times)
        metrics.token_times.extend([now] * len(sample.token_ids))
        if output.finished:
            metrics.finished_time = now
            metrics.first_scheduled_time = output.metrics.first_scheduled_time
            self._stop_reasons[index] = sample.stop_reason
        if not self._held or index not in self._first:
            return []
        if num_before < self._num_tokens_to_wait_for <= len(metrics.token_times):
            self._num_waited_for -= 1
        if self._num_waited_for:
            return []
        released, self._held = self._held, []
        for held in released:
            self.metrics[held].arrival_time = now
        return released

    def check(self, who: str) -> None:
        """RuntimeError unless every request got all its tokens."""
        for index, (request, metrics) in enumerate(zip(self.requests, self.metrics, strict=True)):
            check_complete(
                who, index, len(metrics.token_times), request.output_len, self._stop_reasons[index]
            )


def serve(
    subject: EngineSubject,
    requests: Sequence[BenchRequest],
    temperature: float,
    front: str,
    hold: Hold | None = None,
) -> ServedRun:
    """Serve requests as they come; the time is that from the start to the last token.

    Raises:
        RuntimeError: a request did not get all its tokens.
    """
    engine = subject.engine
    before = engine.stats()
    users = Users(requests, temperature, hold)
    start = time.perf_counter()
    if front == "async":
        asyncio.run(serve_async(engine, users))
    else:
        serve_sync(engine, users)
    users.check(subject.name)
    seconds = max(metrics.token_times[-1] for metrics in users.metrics) - start
    counters = counters_between(before, engine.stats())
    return ServedRun(seconds, users.metrics, counters, users.late_s)


def chunk_counts(run: Run) -> dict[str, int]:
    """How many chunks of prompts were as long as they were for which reason, if there were any."""
    return {name: n for name, n in run.counters.items() if name.startswith("chunks_by_")}


def serve_sync(
    engine: Engine,
    users: Users,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """A plain loop: submit who is due, make a step, note what it gave."""
    due = users.begin(clock())
    while due or engine.has_unfinished_requests():
        while due and due[0][0] <= clock():
            engine.add_request(*users.submits(due.popleft()[1], clock()))
        if engine.has_unfinished_requests():
            outputs = engine.step()
            now = clock()
            for output in outputs:
                due.extendleft((now, index) for index in reversed(users.sees(output, now)))
        else:
            sleep(max(0.0, due[0][0] - clock()))


async def serve_async(engine: Engine, users: Users, clock: Clock = time.perf_counter) -> None:
    """A coroutine for each user, who notes tokens as they reach it."""

    async def serve_user(index: int) -> None:
        request_id, prompt, params = users.submits(index, clock())
        async for output in llm.generate(prompt, params, request_id):
            for released in users.sees(output, clock()):
                tasks.create_task(serve_user(released))

    try:
        async with AsyncLLM(engine) as llm, asyncio.TaskGroup() as tasks:
            for due, index in users.begin(clock()):
                if (wait := due - clock()) > 0:
                    await asyncio.sleep(wait)
                tasks.create_task(serve_user(index))
    except ExceptionGroup as errors:  # the first made the others stop
        raise errors.exceptions[0] from None

"""Writes down what an engine does at each step; ``python -m dev.trace`` shows it.

    with Trace("trace.jsonl") as trace:
        trace.attach(llm.engine)
        llm.generate(prompts)

An engine that is traced has a ``Trace`` in its attribute ``trace`` and tells it three things: a
request was added, a step is done, a request has ended. All else is read from what the engine's
rooms show anyway. An engine that is not traced pays one ``is None`` a step.

The file has one JSON object a line and is complete after every line, so a run that crashes leaves
all that was written before. What stays the same is not repeated: block tables and the prefix tree
are differences, a batch that decodes on is one word. ``dev/trace/README.md`` lists the fields.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from common.environment import describe_environment
from common.llm import Engine
from common.metrics import EngineStats
from common.processor import Prompt, is_chat
from common.request import Request
from common.trace_parts import (
    PREFIX_COUNTERS,
    BlockTables,
    ChunkReasons,
    Computed,
    PrefixNodes,
    TracedSequence,
    split,
    was_taken_back,
)

__all__ = ["VERSION", "Computed", "Trace"]

VERSION = 1
_MAX_PROMPT_CHARS = 400
_MAX_PIECES = 1024  # tokens of an output whose text is kept


class Trace:
    """The recorder of one engine.

    Memory is bounded by what is in the engine: unfinished requests, block tables, the prefix tree.

    Args:
        path: the file to write; one that is there is replaced.

    Raises:
        OSError: the file cannot be written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # A write a line. Half a character pair, which UTF-8 has not, is written as JSON writes it.
        self._file = self.path.open(
            "w", encoding="utf-8", errors="backslashreplace", buffering=1
        )
        self._encode = json.JSONEncoder(
            separators=(",", ":"), ensure_ascii=False, default=str
        ).encode
        self._engine: Any = None
        self._scheduler: Any = None
        self._begin = 0.0
        self._num_requests = 0
        self._num_steps = 0
        self._under_way: deque[int] = deque()  # steps whose tokens have not been read
        self._sequences: dict[str, TracedSequence] = {}  # by Request.key
        self._running: dict[int, TracedSequence] = {}  # by index
        self._ended: list[tuple[TracedSequence, float]] = []  # since the last step, and when
        # Of the last step, to see at a glance that the next one does the same again.
        self._decodes: Sequence[Request] = ()
        self._indices: list[int] = []
        self._last_running: list[Request] = []
        self._num_graph_steps = 0

    def attach(self, engine: Engine) -> None:
        """Trace an engine from now on.

        Raises:
            ValueError: it has unfinished requests, of whose beginning the trace would know nothing.
        """
        if self._engine is not None:
            raise ValueError("this trace has an engine: open another one for another file")
        if engine.has_unfinished_requests():
            raise ValueError("the engine has unfinished requests: start the trace before them")
        self._engine, self._begin = engine, time.perf_counter()
        self._scheduler = getattr(engine, "scheduler", None)  # from m2 on
        self._num_graph_steps = engine.stats()["num_graph_steps"]
        self._reasons = ChunkReasons(self._scheduler)
        self._blocks = BlockTables(engine)
        cache = getattr(self._scheduler, "kv_cache", None)
        self._nodes = PrefixNodes(getattr(cache, "index", None))
        header = _header(engine, self._blocks.layout)
        self._nodes.record(header)
        self._write(header)
        engine.trace = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the engine and finish the file."""
        if self._engine is not None:
            self._engine.trace = None
            end: dict[str, Any] = {"end": self._at(time.perf_counter()), "steps": self._num_steps}
            if self._ended:
                end["ended"] = [self._ending(*ended) for ended in self._ended]
            self._write(end)
            self._engine = None
        self._file.close()

    @property
    def is_attached(self) -> bool:
        return self._engine is not None

    def mark(self, text: str) -> None:
        """Note what begins now: a warm-up, a pass of a benchmark."""
        self._write({"mark": text, "at": self._at(time.perf_counter())})

    # --- what the engine calls --------------------------------------------------------------------

    def added(self, prompt: Prompt, requests: Sequence[Request]) -> None:
        """A request was queued, as a sequence for each of its samples."""
        text = _text_of(prompt)
        for request in requests:
            sequence = TracedSequence(self._num_requests, request)
            self._sequences[request.key] = sequence
            self._num_requests += 1
            record = {
                "request": sequence.index,
                "id": request.request_id,
                "sample": request.index,
                "at": self._at(request.metrics.arrival_time),
                "prompt_tokens": request.num_prompt_tokens,
                "max_tokens": request.max_tokens,
            }
            if request.priority:
                record["priority"] = request.priority
            if text is not None:
                record["prompt"] = text
            self._write(record)

    def finished(self, request: Request) -> None:
        """A request has ended, for whatever reason its status says."""
        self._ended.append((self._sequences[request.key], time.perf_counter()))
        tokenizer = self._engine.tokenizer
        if tokenizer is not None and request.sampling_params.detokenize:
            shown = request.output_token_ids[:_MAX_PIECES]
            pieces = [tokenizer.token_text(token_id) for token_id in shown]
            self._write({"output": self._sequences[request.key].index, "pieces": pieces})

    def step(
        self,
        plan: Any,
        stats: EngineStats,
        start: float,
        scheduled: float | None = None,
        launched: float | None = None,
        read: float | None = None,
        num_under_way: int = 0,
    ) -> None:
        """``LLMEngine.step`` has done its work.

        Args:
            plan: the step that was scheduled (``SchedulerOutput``, or ``Computed``); None if only
                the tokens of an earlier one were read.
            stats: the engine's counters, up to date.
            start, scheduled, launched, read: when ``step`` began, the plan was made, the device had
                its work, and tokens were there; None for what this engine cannot tell apart.
            num_under_way: steps that are launched and whose tokens have not been read.
        """
        end = time.perf_counter()
        has_failed = plan is not None and was_taken_back(plan)
        is_new = plan is not None and not has_failed
        num_read = len(self._under_way) + is_new - num_under_way
        if plan is None and not num_read and not self._ended:
            return
        times = [None if at is None else self._at(at) for at in (start, scheduled, launched, end)]
        record: dict[str, Any] = {"step": None, "times": times}
        if has_failed:
            record["failed"] = 1
        if is_new:
            record["step"] = self._num_steps
            self._under_way.append(self._num_steps)
            self._num_steps += 1
        if num_read:
            steps = [self._under_way.popleft() for _ in range(num_read)]
            record["read"] = [*steps, None if read is None else self._at(read)]
        before = [ended for ended in self._ended if ended[1] < start]
        if before:
            record["ended_before"] = [self._ending(*ended) for ended in before]
            self._forget(before)
        self._record_preemptions(record)
        if is_new:
            self._record_batch(record, plan)
            self._blocks.record(
                record, plan, self._decodes, self._sequences, self._last_running
            )
        else:
            self._decodes = ()
        record["running"] = len(self._running)
        ended = self._ended[len(before) :]
        record["waiting"] = len(self._sequences) - len(self._running)
        record["kv"] = [stats.kv_slots_used, stats.kv_slots_allocated]
        if stats.num_graph_steps != self._num_graph_steps:
            self._num_graph_steps = stats.num_graph_steps
            record["graph"] = 1
        self._nodes.record(record)
        if ended:
            record["ended"] = [self._ending(*each) for each in ended]
            self._forget(ended)
        self._ended = []
        self._write(record)

    # --- what is in a step's record ---------------------------------------------------------------

    def _record_preemptions(self, record: dict[str, Any]) -> None:
        """Who was running and is back in the queue."""
        if self._scheduler is None:
            return
        running = list(self._scheduler.running)
        if running == self._last_running:
            return
        self._last_running = running
        keys = {request.key for request in running}
        gone = [s for s in self._running.values() if s.request.key not in keys]
        for sequence in gone:
            request = sequence.request
            # One that has ended may have been preempted before its last token arrived.
            was_preempted = request.metrics.num_preemptions > sequence.num_preemptions
            if was_preempted or not request.is_finished:
                self._leaves(record, sequence)

    def _leaves(self, record: dict[str, Any], sequence: TracedSequence) -> None:
        """Preempted, or taken back together with a step that could not be computed."""
        num_preemptions = sequence.request.metrics.num_preemptions
        why = "preempted" if num_preemptions > sequence.num_preemptions else "requeued"
        record.setdefault(why, []).append(sequence.index)
        sequence.num_preemptions = num_preemptions
        sequence.chunks_end = 0
        sequence.table = []
        self._running.pop(sequence.index, None)

    def _record_batch(self, record: dict[str, Any], plan: Any) -> None:
        """Who computes which tokens: decodes one each, the others a chunk."""
        decodes, chunks = split(plan)
        if decodes:
            if decodes == self._decodes:
                record["decode"] = "same"
            else:
                self._indices = [self._sequences[request.key].index for request in decodes]
                record["decode"] = self._indices
        self._decodes = decodes
        if not chunks:
            return
        reasons = self._reasons.of(chunks)
        record["chunks"] = described = []
        for (request, start, end, samples), reason in zip(chunks, reasons, strict=True):
            sequence = self._sequences[request.key]
            was_preempted = request.metrics.num_preemptions > sequence.num_preemptions
            starts_over = self._scheduler is not None and start < sequence.chunks_end
            if was_preempted or starts_over:
                self._leaves(record, sequence)  # and is back in this very step
            sequence.chunks_end = end
            if sequence.index not in self._running:
                self._running[sequence.index] = sequence
                record.setdefault("admitted", []).append([sequence.index, start])
            described.append([sequence.index, start, end, int(samples), reason])
        for key, samples_of in getattr(plan, "forks", {}).items():
            forked = [self._sequences[sample.key] for sample in samples_of]
            if forked:
                self._running.update((sequence.index, sequence) for sequence in forked)
                indices = [sequence.index for sequence in forked]
                record.setdefault("forks", []).append([self._sequences[key].index, *indices])

    def _ending(self, sequence: TracedSequence, at: float) -> list[Any]:
        request = sequence.request
        num_output = len(request.output_token_ids)
        return [sequence.index, request.status.finish_reason, num_output, self._at(at)]

    def _forget(self, ended: Sequence[tuple[TracedSequence, float]]) -> None:
        for sequence, _ in ended:
            self._running.pop(sequence.index, None)
            # An id may be in use again by now.
            if self._sequences.get(sequence.request.key) is sequence:
                del self._sequences[sequence.request.key]

    def _at(self, seconds: float) -> int:
        """Microseconds since the trace began."""
        return round(1e6 * (seconds - self._begin))

    def _write(self, record: dict[str, Any]) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(self._encode(record) + "\n")
        except OSError as error:  # a full disk: no reason for the engine to stop serving
            warnings.warn(f"the trace ends here: {error}", stacklevel=2)
            self._engine.trace = None
            self._file.close()


def _text_of(prompt: Prompt) -> str | None:
    """What a person would call the prompt: its text, or the last message; None for token ids."""
    if is_chat(prompt):
        prompt = str(prompt[-1].get("content", ""))
    if not isinstance(prompt, str):
        return None
    half = _MAX_PROMPT_CHARS // 2
    return prompt if len(prompt) <= 2 * half else f"{prompt[:half]} … {prompt[-half:]}"


def _header(engine: Any, layout: list[int]) -> dict[str, Any]:
    model, device = engine.model_config, engine.device
    return {
        "folovllm_trace": VERSION,
        "milestone": type(engine).__module__.split(".")[0],
        "model": {
            "name": str(engine.config.model),
            "layers": model.num_layers,
            "hidden": model.hidden_size,
            "heads": model.num_heads,
            "kv_heads": model.num_kv_heads,
            "vocab": model.vocab_size,
        },
        "config": {
            **dataclasses.asdict(engine.config),
            "device": str(device),
            "dtype": str(engine.dtype).removeprefix("torch."),
            "max_model_len": engine.max_model_len,
        },
        "environment": describe_environment(device),
        "layout": layout,
        "prefix_counters": list(PREFIX_COUNTERS),
    }

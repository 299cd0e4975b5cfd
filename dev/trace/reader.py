"""Reads a trace file back: the lines that ``common.trace`` wrote, with the differences filled in.

    trace = read_trace(Path("trace.jsonl"))
    for frame in trace.frames:
        frame.step, frame.decodes, frame.chunks
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common.trace import VERSION

Record = dict[str, Any]


@dataclass
class TracedRequest:
    """One sequence: a request, or one of the ``n`` samples of one."""

    index: int
    id: str
    sample: int
    added_at: int  # microseconds since the trace began, as all times here
    added_frame: int  # it waits from this frame on, unless it is admitted there
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    prompt: str | None = None
    pieces: list[str] | None = None  # the text of each token of its output

    @property
    def name(self) -> str:
        return f"{self.id}.{self.sample}" if self.sample else self.id


class Chunk(NamedTuple):
    """Tokens ``[start, end)`` of one sequence that a step computed."""

    request: int
    start: int
    end: int
    samples: bool  # whether the next token is sampled after the last of them
    reason: str | None  # what ended it, from m5 on: prompt, budget, itl or blocks


class Ending(NamedTuple):
    """A request that has ended, and why (its ``finish_reason``)."""

    request: int
    reason: str
    num_output_tokens: int
    at: int


class TableChange(NamedTuple):
    """A block table is its first ``num_kept`` blocks from before, then these."""

    request: int
    num_kept: int
    blocks: list[int]


@dataclass
class Frame:
    """What one call of ``LLMEngine.step`` did: one line of the file.

    In this order: requests end that were aborted before (``ended_before``), some are preempted or
    admitted, blocks change hands, the step runs, tokens of ``read`` steps arrive, requests end.
    """

    step: int | None  # None: nothing was left to launch, only tokens to read
    start: int
    scheduled: int | None
    launched: int | None
    end: int
    read: list[int]
    read_at: int | None
    decodes: list[int]
    chunks: list[Chunk]
    forks: list[list[int]]  # the sample that has computed the prompt, then those that share it
    admitted: list[tuple[int, int]]  # sequence, and tokens that the cache had of it
    preempted: list[int]
    requeued: list[int]  # taken back with a step that could not be computed
    ended_before: list[Ending]
    ended: list[Ending]
    tables: list[TableChange]
    copies: list[tuple[int, int]]
    running: int
    waiting: int
    kv_used: int
    kv_allocated: int
    is_graph: bool
    is_failed: bool  # a step was planned, found no memory, and was taken back
    layout: tuple[int, int]  # tokens in a block, number of blocks
    prefix: dict[str, int]  # counters of the prefix index; empty without one
    tree: Record | None  # "nodes" that are new or changed, and those that are "gone"

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decodes) + sum(chunk.end - chunk.start for chunk in self.chunks)

    @property
    def num_sampled(self) -> int:
        in_chunks = sum(chunk.samples for chunk in self.chunks)
        return len(self.decodes) + in_chunks + sum(len(fork) - 1 for fork in self.forks)


@dataclass
class Trace:
    """A whole file."""

    path: Path
    header: Record
    requests: list[TracedRequest] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)  # frame that follows, text
    ended_late: list[Ending] = field(default_factory=list)  # after the last step
    first_tree: Record | None = None
    is_complete: bool = False  # whether it was closed in order
    is_cut: bool = False  # whether the last line is half a line

    @property
    def milestone(self) -> str:
        return self.header["milestone"]

    @property
    def notes(self) -> list[str]:
        """What a reader should know about the file."""
        notes = []
        if self.is_cut:
            notes.append("the last line is cut off and was left out")
        if not self.is_complete:
            notes.append("the run did not end in order: this is what was written until then")
        return notes


def read_trace(path: Path) -> Trace:
    """Read and check a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a trace, has another version, or a line makes no sense.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    trace = Trace(path, _header(path, lines[0]))
    reader = _Reader(trace)
    # What follows the last newline is empty, or a line that was being written.
    for number, line in enumerate(lines[1:-1], start=2):
        try:
            reader.take(json.loads(line))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not what a trace says ({error}); write it again"
            ) from error
    trace.is_cut = bool(lines[-1])
    return trace


def _header(path: Path, line: str) -> Record:
    hint = "write one with --trace FILE of a run or of the bench"
    if not line:
        raise ValueError(f"{path} is empty: {hint}")
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or "folovllm_trace" not in header:
        raise ValueError(f"{path} is not a trace, its first line is no header: {hint}")
    if header["folovllm_trace"] != VERSION:
        raise ValueError(
            f"{path} has version {header['folovllm_trace']} of the format and this is version "
            f"{VERSION}: view it with the checkout that wrote it, or write it again"
        )
    return header


class _Reader:
    """Fills in what a line leaves out because it is as before."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._decodes: list[int] = []
        self._layout = tuple(trace.header["layout"])
        self._prefix = self._counters(trace.header.get("prefix"), {})
        trace.first_tree = trace.header.get("tree")

    def take(self, record: Record) -> None:
        trace = self._trace
        if "step" in record and "times" in record:
            trace.frames.append(self._frame(record))
        elif "request" in record:
            if record["request"] != len(trace.requests):
                raise ValueError(f"request {record['request']} is out of order")
            trace.requests.append(
                TracedRequest(
                    record["request"],
                    record["id"],
                    record["sample"],
                    record["at"],
                    len(trace.frames),
                    record["prompt_tokens"],
                    record["max_tokens"],
                    record.get("priority", 0),
                    record.get("prompt"),
                )
            )
        elif "output" in record:
            trace.requests[record["output"]].pieces = record["pieces"]
        elif "mark" in record:
            trace.marks.append((len(trace.frames), record["mark"]))
        elif "end" in record:
            trace.is_complete = True
            trace.ended_late = [Ending(*ending) for ending in record.get("ended", ())]
        else:
            raise ValueError(f"it has {', '.join(record) or 'nothing'}")

    def _frame(self, record: Record) -> Frame:
        start, scheduled, launched, end = record["times"]
        decodes = record.get("decode", [])
        decodes = self._decodes if decodes == "same" else decodes
        self._decodes = decodes
        *read, read_at = record.get("read", [None])
        self._layout = tuple(record.get("layout", self._layout))
        self._prefix = self._counters(record.get("prefix"), self._prefix)
        frame = Frame(
            step=record["step"],
            start=start,
            scheduled=scheduled,
            launched=launched,
            end=end,
            read=read,
            read_at=read_at,
            decodes=decodes,
            chunks=[Chunk(*chunk[:3], bool(chunk[3]), chunk[4]) for chunk in
                    record.get("chunks", ())],
            forks=record.get("forks", []),
            admitted=[tuple(each) for each in record.get("admitted", ())],
            preempted=record.get("preempted", []),
            requeued=record.get("requeued", []),
            ended_before=[Ending(*ending) for ending in record.get("ended_before", ())],
            ended=[Ending(*ending) for ending in record.get("ended", ())],
            tables=[TableChange(*change) for change in record.get("tables", ())],
            copies=[tuple(copy) for copy in record.get("copies", ())],
            running=record["running"],
            waiting=record["waiting"],
            kv_used=record["kv"][0],
            kv_allocated=record["kv"][1],
            is_graph=bool(record.get("graph")),
            is_failed=bool(record.get("failed")),
            layout=self._layout,
            prefix=self._prefix,
            tree=record.get("tree"),
        )
        known = len(self._trace.requests)
        named = [*frame.decodes, *(chunk.request for chunk in frame.chunks)]
        if any(not 0 <= request < known for request in named):
            raise ValueError("it names a request that was not added")
        return frame

    def _counters(self, values: list[int] | None, before: dict[str, int]) -> dict[str, int]:
        if values is None:
            return before
        return dict(zip(self._trace.header["prefix_counters"], values, strict=True))

"""Turns the frames of a trace into the life of each request: what it did from when to when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from dev.trace.reader import Ending, Frame, Trace, TracedRequest


class State(StrEnum):
    """What a sequence is doing in a frame."""

    WAITING = "waiting"
    PREEMPTED = "preempted"  # it waits too, and has lost its cache
    PREFILL = "prefill"  # computes a chunk of its prompt
    RECOMPUTE = "recompute"  # computes again what it had computed before
    DECODE = "decode"
    FORKED = "forked"  # samples its first token from logits that another sample has computed
    IDLE = "idle"  # holds its cache, has nothing computed
    OVERRUN = "overrun"  # was given one step too many: it had ended, and nobody knew yet


@dataclass
class Span:
    """A stretch of frames in one state, the last one included.

    ``start`` and ``end`` are the tokens computed in it, in a decode one a frame.
    """

    state: State
    first: int
    last: int
    start: int = 0
    end: int = 0
    reason: str | None = None  # what ended a chunk


@dataclass
class Life:
    """All that a trace says of one sequence."""

    request: TracedRequest
    spans: list[Span] = field(default_factory=list)
    ending: Ending | None = None
    last_frame: int | None = None  # the one in which it ended
    num_sampled: int = 0  # tokens sampled for it, those that came too late included
    num_computed: int = 0  # tokens computed, again after a preemption
    num_preemptions: int = 0
    hits: list[tuple[int, int]] = field(default_factory=list)  # frame, tokens found in the cache
    _computed: int = 0  # tokens in the cache now

    def add(self, state: State, frame: int, num_tokens: int = 0, reason: str | None = None) -> None:
        """What it did in the next frame; neighbouring frames of one kind become one span."""
        start, self._computed = self._computed, self._computed + num_tokens
        self.num_computed += num_tokens
        last = self.spans[-1] if self.spans else None
        joins = state not in (State.PREFILL, State.RECOMPUTE)
        if last is not None and joins and last.state is state and last.last == frame - 1:
            last.last, last.end = frame, self._computed
        else:
            self.spans.append(Span(state, frame, frame, start, self._computed, reason))

    def move_to(self, num_tokens: int) -> None:
        """The cache holds so many of its tokens from here on."""
        self._computed = num_tokens


def tell(trace: Trace) -> list[Life]:
    """The life of every request, in the order in which they came."""
    lives = [Life(request) for request in trace.requests]
    storyteller = _Storyteller(lives)
    for number, frame in enumerate(trace.frames):
        storyteller.take(number, frame)
    for ending in trace.ended_late:
        storyteller.end(max(len(trace.frames) - 1, 0), ending)
    return lives


class _Storyteller:
    def __init__(self, lives: list[Life]) -> None:
        self._lives = lives
        self._next = 0  # the next request that has not been added
        self._alive: dict[int, Life] = {}
        self._running: set[int] = set()

    def take(self, number: int, frame: Frame) -> None:
        lives, running = self._lives, self._running
        while self._next < len(lives) and lives[self._next].request.added_frame <= number:
            self._alive[self._next] = lives[self._next]
            self._next += 1
        for ending in frame.ended_before:
            self.end(number - 1, ending)
        for index in (*frame.preempted, *frame.requeued):
            running.discard(index)
            lives[index].move_to(0)
        for index in frame.preempted:
            lives[index].num_preemptions += 1
        for index, num_cached in frame.admitted:
            running.add(index)
            if num_cached:
                lives[index].hits.append((number, num_cached))
        for parent, *samples in frame.forks:
            running.update(samples)
            del parent
        # Whose end was read in a frame had no use for a step that was launched in it.
        overruns = self._overruns(frame)
        busy = dict(self._work(frame))
        for index, life in self._alive.items():
            if index in busy:
                state, start, num_tokens, reason = busy[index]
                if start is not None:
                    life.move_to(start)
                state = State.OVERRUN if index in overruns else state
                life.add(state, number, num_tokens, reason)
            elif index in running:
                life.add(State.IDLE, number)
            else:
                waits = State.PREEMPTED if life.num_preemptions else State.WAITING
                life.add(waits, number)
        for parent, *samples in frame.forks:
            for sample in samples:
                lives[sample].move_to(lives[parent].spans[-1].end)
        for index in frame.decodes:
            lives[index].num_sampled += 1
        for chunk in frame.chunks:
            lives[chunk.request].num_sampled += chunk.samples
        for _, *samples in frame.forks:
            for sample in samples:
                lives[sample].num_sampled += 1
        for ending in frame.ended:
            self.end(number, ending)

    def end(self, number: int, ending: Ending) -> None:
        life = self._lives[ending.request]
        life.ending, life.last_frame = ending, max(number, life.request.added_frame)
        self._alive.pop(ending.request, None)
        self._running.discard(ending.request)

    def _work(
        self, frame: Frame
    ) -> Iterator[tuple[int, tuple[State, int | None, int, str | None]]]:
        """Who computes something: state, first token where it is told, tokens, reason."""
        for _, *samples in frame.forks:
            for sample in samples:
                yield sample, (State.FORKED, None, 0, None)
        for index in frame.decodes:
            yield index, (State.DECODE, None, 1, None)
        for chunk in frame.chunks:
            again = self._lives[chunk.request].num_sampled > 0
            state = State.RECOMPUTE if again else State.PREFILL
            yield chunk.request, (state, chunk.start, chunk.end - chunk.start, chunk.reason)

    def _overruns(self, frame: Frame) -> set[int]:
        """Who is in a step though the tokens read after its launch say that it had ended."""
        if frame.step is None or not frame.read or frame.step in frame.read:
            return set()
        return {ending.request for ending in frame.ended}

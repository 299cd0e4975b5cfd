"""When things happened, from the times that the frames of a trace carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dev.trace.reader import Frame, Trace
from dev.trace.story import Life, State


class Interval(NamedTuple):
    """Microseconds since the trace began."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


def host_intervals(frame: Frame) -> dict[str, Interval]:
    """What the host did in a frame, in order; an engine that cannot tell parts apart has fewer."""
    parts: dict[str, Interval] = {}
    at = frame.start
    for name, until in (
        ("plan", frame.scheduled),
        ("launch", frame.launched),
        ("wait", frame.read_at),
        ("process", frame.end),
    ):
        if until is not None and until > at:
            parts[name] = Interval(at, until)
            at = until
    return parts


def device_intervals(trace: Trace) -> list[Interval | None]:
    """When the device was at each frame's step, as far as the host can know; None: no step.

    On a GPU a step is under way from its launch, or from the end of the one before it, until its
    tokens are there. On the CPU to launch a step is to compute it.
    """
    done = readers(trace)
    is_cpu = trace.header["config"]["device"] == "cpu"
    intervals: list[Interval | None] = []
    free_at = 0
    for frame in trace.frames:
        if frame.step is None:
            intervals.append(None)
            continue
        start = frame.start if frame.scheduled is None else frame.scheduled
        if is_cpu and frame.launched is not None:
            end = frame.launched
        else:
            reader = done.get(frame.step, frame)
            end = reader.end if reader.read_at is None else reader.read_at
        start = min(max(start, free_at), end)
        intervals.append(Interval(start, end))
        free_at = end
    return intervals


def first_token_at(trace: Trace, life: Life, done: dict[int, Frame]) -> int | None:
    """When the first token of a request was there; ``done``: the frame that read each step."""
    known = life.request.num_prompt_tokens
    for span in life.spans:
        ends_prompt = span.state in (State.PREFILL, State.RECOMPUTE) and span.end >= known
        if ends_prompt or span.state is State.FORKED:
            step = trace.frames[span.first].step
            reader = done.get(step) if step is not None else None
            return None if reader is None else reader.read_at or reader.end
    return None


def readers(trace: Trace) -> dict[int, Frame]:
    """The frame in which the tokens of each step were read."""
    return {step: frame for frame in trace.frames for step in frame.read}


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share is not above; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0

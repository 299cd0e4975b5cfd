"""A trace as Chrome's trace events, which ui.perfetto.dev and chrome://tracing show.

The format: "Trace Event Format" of the Chromium project. One process holds the engine (a thread
for the host, one for the device, and counters), another one has a thread for each request.
"""

from __future__ import annotations

from typing import Any

from dev.trace.reader import Frame, Trace
from dev.trace.story import Life, tell
from dev.trace.times import device_intervals, host_intervals

_ENGINE, _REQUESTS = 1, 2  # process ids
_HOST, _DEVICE = 1, 2  # thread ids of the engine

Event = dict[str, Any]


def trace_events(trace: Trace) -> dict[str, Any]:
    """The whole file, ready for JSON; times are microseconds, as the format wants them."""
    lives = tell(trace)
    events = _names(trace, lives)
    for frame, on_device in zip(trace.frames, device_intervals(trace), strict=True):
        events += _host(frame)
        if on_device is not None:
            name = f"step {frame.step}"
            events.append(_slice(name, _ENGINE, _DEVICE, *on_device, _about(frame)))
        events += _counters(frame)
    for life in lives:
        events += _life(trace, life)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "milestone": trace.milestone,
            "model": trace.header["model"]["name"],
            "date": trace.header["environment"]["date"],
        },
    }


def _names(trace: Trace, lives: list[Life]) -> list[Event]:
    events = [
        _meta("process_name", _ENGINE, 0, name=f"engine {trace.milestone}"),
        _meta("process_name", _REQUESTS, 0, name="requests"),
        _meta("process_sort_index", _ENGINE, 0, sort_index=0),
        _meta("process_sort_index", _REQUESTS, 0, sort_index=1),
        _meta("thread_name", _ENGINE, _HOST, name="host"),
        _meta("thread_name", _ENGINE, _DEVICE, name="device"),
    ]
    for life in lives:
        request = life.request
        text = f": {request.prompt[:60]}" if request.prompt else ""
        thread = request.index + 1
        events.append(
            _meta("thread_name", _REQUESTS, thread, name=f"request {request.name}{text}")
        )
        events.append(_meta("thread_sort_index", _REQUESTS, thread, sort_index=request.index))
    return events


def _host(frame: Frame) -> list[Event]:
    whole = "read" if frame.step is None else f"step {frame.step}"
    events = [_slice(whole, _ENGINE, _HOST, frame.start, frame.end, _about(frame))]
    for name, (start, end) in host_intervals(frame).items():
        events.append(_slice(name, _ENGINE, _HOST, start, end))
    return events


def _about(frame: Frame) -> dict[str, Any]:
    about = {
        "decodes": len(frame.decodes),
        "chunks": len(frame.chunks),
        "tokens": frame.num_tokens,
        "graph": frame.is_graph,
    }
    if frame.preempted:
        about["preempted"] = frame.preempted
    return about


def _counters(frame: Frame) -> list[Event]:
    values = {
        "sequences": {"running": frame.running, "waiting": frame.waiting},
        "KV slots": {"used": frame.kv_used, "unused": frame.kv_allocated - frame.kv_used},
        "tokens in the step": {"tokens": frame.num_tokens},
    }
    if frame.prefix:
        values["prefix index"] = {
            "held": frame.prefix["num_blocks"] - frame.prefix["num_evictable"],
            "idle": frame.prefix["num_evictable"],
        }
    return [
        {"name": name, "ph": "C", "pid": _ENGINE, "tid": 0, "ts": frame.start, "args": args}
        for name, args in values.items()
    ]


def _life(trace: Trace, life: Life) -> list[Event]:
    thread, frames, events = life.request.index + 1, trace.frames, []
    begin = life.request.added_at
    for span in life.spans:
        start = begin if span is life.spans[0] else frames[span.first].start
        # Up to the next frame, so that there are no gaps where nothing happens.
        following = span.last + 1
        end = frames[following].start if following < len(frames) else frames[span.last].end
        if life.ending is not None and span is life.spans[-1]:
            end = max(life.ending.at, start)
        args: dict[str, Any] = {"steps": span.last - span.first + 1}
        if span.end > span.start:
            args |= {"first_token": span.start, "tokens": span.end - span.start}
        if span.reason is not None:
            args["ended_by"] = span.reason
        events.append(_slice(str(span.state), _REQUESTS, thread, start, max(end, start), args))
    for frame, num_tokens in life.hits:
        name = f"{num_tokens} tokens from the cache"
        at = frames[frame].start
        events.append(
            {"name": name, "ph": "i", "s": "t", "pid": _REQUESTS, "tid": thread, "ts": at}
        )
    return events


def _slice(
    name: str, pid: int, tid: int, start: int, end: int, args: dict[str, Any] | None = None
) -> Event:
    event = {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": end - start}
    return {**event, "args": args} if args else event


def _meta(event: str, pid: int, tid: int, /, **args: Any) -> Event:
    return {"name": event, "ph": "M", "pid": pid, "tid": tid, "args": args}

"""What the page is given: one trace as plain lists, as short as they can be.

Names are of one or two words because a page may hold thousands of frames; ``page/model.js`` is the
only one that reads them.
"""

from __future__ import annotations

from typing import Any

from dev.trace.reader import Frame, Trace
from dev.trace.story import Life, tell
from dev.trace.times import device_intervals

_MAX_PROMPT = 200


def page_data(trace: Trace) -> dict[str, Any]:
    """A trace for the page, ready for JSON."""
    frames = trace.frames
    return {
        "name": trace.milestone,
        "file": trace.path.name,
        "header": {
            key: trace.header[key] for key in ("model", "config", "environment", "layout")
        },
        "counters": trace.header["prefix_counters"],
        "notes": trace.notes,
        "marks": trace.marks,
        "requests": [_request(life) for life in tell(trace)],
        "frames": {
            "step": [frame.step for frame in frames],
            "times": [[f.start, f.scheduled, f.launched, f.end] for f in frames],
            "read": [[frame.read, frame.read_at] for frame in frames],
            "running": [frame.running for frame in frames],
            "waiting": [frame.waiting for frame in frames],
            "kv": [[frame.kv_used, frame.kv_allocated] for frame in frames],
            "tokens": [frame.num_tokens for frame in frames],
            "sampled": [frame.num_sampled for frame in frames],
            "device": device_intervals(trace),
            "failed": [int(frame.is_failed) for frame in frames],
            "graph": [int(frame.is_graph) for frame in frames],
        },
        "firstTree": trace.first_tree,
        "changes": _changes(frames),
    }


def _request(life: Life) -> dict[str, Any]:
    request, ending = life.request, life.ending
    prompt = request.prompt
    if prompt is not None and len(prompt) > _MAX_PROMPT:
        prompt = prompt[:_MAX_PROMPT] + "…"
    return {
        "name": request.name,
        "prompt": prompt,
        "promptTokens": request.num_prompt_tokens,
        "maxTokens": request.max_tokens,
        "priority": request.priority,
        "at": request.added_at,
        "pieces": request.pieces,
        "spans": [[s.state, s.first, s.last, s.start, s.end, s.reason] for s in life.spans],
        "hits": life.hits,
        "end": None if ending is None else [
            life.last_frame, ending.reason, ending.num_output_tokens, ending.at
        ],
    }  # fmt: skip


def _changes(frames: list[Frame]) -> dict[int, dict[str, Any]]:
    """What happens to blocks, tables and tree, by frame; frames without any are left out."""
    changes: dict[int, dict[str, Any]] = {}
    layout, prefix = None, {}
    for number, frame in enumerate(frames):
        change: dict[str, Any] = {
            "gone": [*(ending.request for ending in frame.ended_before), *frame.preempted,
                     *frame.requeued],
            "preempted": frame.preempted,
            "tables": frame.tables,
            "copies": frame.copies,
            "left": [ending.request for ending in frame.ended],
            "tree": frame.tree,
        }  # fmt: skip
        change = {name: value for name, value in change.items() if value}
        if frame.layout != layout:
            layout = change["layout"] = frame.layout
        if frame.prefix != prefix:
            prefix = frame.prefix
            change["prefix"] = list(prefix.values())
        if change:
            changes[number] = change
    return changes

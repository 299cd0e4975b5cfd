"""A trace in the terminal: what the run as a whole did, and a line for each request."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from dev.trace.reader import Trace
from dev.trace.story import Life, State, tell
from dev.trace.times import first_token_at, host_intervals, percentile, readers

_MOST_ROWS = 40


def show(trace: Trace, console: Console) -> None:
    """Print both tables."""
    lives = tell(trace)
    console.print(_run_table(trace, lives))
    console.print(_request_table(trace, lives))
    if len(lives) > _MOST_ROWS:
        console.print(f"... and {len(lives) - _MOST_ROWS} more requests", style="dim")


def facts(trace: Trace, lives: list[Life]) -> dict[str, str]:
    """What is said about the run, by name."""
    header, frames = trace.header, trace.frames
    steps = [frame for frame in frames if frame.step is not None]
    endings = Counter(life.ending.reason if life.ending else "not ended" for life in lives)
    cached = sum(tokens for life in lives for _, tokens in life.hits)
    computed = sum(life.num_computed for life in lives)
    sampled = sum(life.num_sampled for life in lives)
    output = sum(life.ending.num_output_tokens for life in lives if life.ending)
    again = sum(s.end - s.start for life in lives for s in life.spans if s.state is State.RECOMPUTE)
    where = header["environment"]
    machine = where["gpu"] or f"{where['cpu']}, {where['num_threads']} threads"
    result = {
        "run": f"{trace.milestone}, {header['model']['name']}, {header['config']['dtype']}, "
        f"{machine}, {where['date']}",
        "requests": f"{len(lives)}: " + ", ".join(f"{n} {why}" for why, n in endings.items()),
        "steps": f"{len(steps):,}, of which {sum(f.is_graph for f in steps):,} replayed a graph",
        "tokens computed": f"{computed:,}, {again:,} of them again; {cached:,} more were cached",
        "tokens sampled": f"{sampled:,}, {output:,} of them in outputs that have ended",
        "preemptions": f"{sum(life.num_preemptions for life in lives):,}",
    }
    if not steps:
        return result
    allocated = sum(frame.kv_allocated for frame in steps)
    if allocated:
        used = sum(frame.kv_used for frame in steps)
        result["KV slots"] = (
            f"{used / allocated:.1%} of the allocated ones in use, "
            f"at most {max(f.kv_allocated for f in steps):,} allocated"
        )
    took = [(frame.end - frame.start) / 1e3 for frame in steps]
    result["batch"] = (
        f"{sum(f.num_tokens for f in steps) / len(steps):.1f} tokens a step on average, "
        f"{max(f.num_tokens for f in steps):,} at most; "
        f"up to {max(f.running for f in steps):,} running, "
        f"{max(f.waiting for f in steps):,} waiting"
    )
    result["step time"] = (
        f"{percentile(took, 0.5):.2f} ms median, {percentile(took, 0.99):.2f} ms p99, "
        f"{max(took):.2f} ms at most"
    )
    parts: Counter[str] = Counter()
    for frame in frames:
        parts.update({name: part.length for name, part in host_intervals(frame).items()})
    total = max(sum(parts.values()), 1)
    result["host's time"] = ", ".join(f"{name} {n / total:.1%}" for name, n in parts.items())
    return result


def _run_table(trace: Trace, lives: list[Life]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    for name, value in facts(trace, lives).items():
        table.add_row(name, value)
    return table


def _request_table(trace: Trace, lives: list[Life]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="\nrequests; times in ms",
                  title_justify="left", title_style="dim")  # fmt: skip
    table.add_column("id", no_wrap=True, max_width=16)
    for name in ("prompt", "cached", "output", "chunks", "preempted", "wait", "TTFT", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("end")
    done = readers(trace)
    for life in lives[:_MOST_ROWS]:
        request, ending = life.request, life.ending
        ran = next((s for s in life.spans if s.state is not State.WAITING), None)
        first = first_token_at(trace, life, done)
        chunks = sum(s.state in (State.PREFILL, State.RECOMPUTE) for s in life.spans)
        table.add_row(
            request.name,
            str(request.num_prompt_tokens),
            str(sum(tokens for _, tokens in life.hits)),
            str(ending.num_output_tokens if ending else life.num_sampled),
            str(chunks),
            str(life.num_preemptions),
            "" if ran is None else _ms(trace.frames[ran.first].start - request.added_at),
            "" if first is None else _ms(first - request.added_at),
            "" if ending is None else _ms(ending.at - request.added_at),
            "" if ending is None else ending.reason,
        )
    return table


def _ms(microseconds: int) -> str:
    return f"{microseconds / 1e3:,.1f}"

"""What the rows of ``serve`` and ``mixed`` say beyond ``report.FIELDS``, and how they are shown."""

from __future__ import annotations

_POINTS = ("mean", "p50", "p90", "p99", "max")

SERVE_FIELDS: dict[str, str] = {
    "request_rate": "requests per second asked for; null: all at once",
    **{
        f"e2e_{point}_s": f"from a request's arrival to its last token: {point}, in seconds"
        for point in _POINTS
    },
    "goodput_share": "share of the requests that kept every limit of --goodput",
    "goodput_requests_per_s": "such requests by seconds",
    "num_waiting_mean": "requests that had arrived and not yet run, mean over the run",
    "num_waiting_peak": "most of these at once",
    "num_present_mean": "requests that had arrived and not yet finished, mean over the run",
    "num_present_peak": "most of these at once",
    "late_max_s": "longest time from a request's arrival until it was submitted: the load "
    "generator's own delay, with --front sync also the step that was running",
}
"""Fields of ``serve`` alone; ttft and e2e count from the arrival that was drawn."""

MIXED_FIELDS: dict[str, str] = {
    **{
        f"quiet_itl_{point}_s": f"gaps before the prompts arrive: {point}, in seconds"
        for point in _POINTS
    },
    "prompt_ttfts_s": "time to first token of each prompt, ascending",
    "prompt_ttft_min_s": "the first of them",
    "prompt_ttft_max_s": "the last of them",
    "window_s": "seconds from the prompts' arrival to the end of the window",
    "window_tokens_per_s": "prompt tokens and tokens of the decodes in the window, by window_s",
}
"""Fields of ``mixed`` alone; every figure is the median over the repetitions, itl is that of the
decodes in the window."""

CHUNK_FIELDS: dict[str, str] = {
    "chunks_by_prompt": "chunks of prompts, from m5 on, that were all that was left to compute",
    "chunks_by_budget": "chunks that the tokens of a step were not enough to make longer",
    "chunks_by_itl": "chunks that the target for the gaps between tokens kept from being longer",
    "chunks_by_blocks": "chunks for which there were no more KV blocks",
}
"""Fields of both, where there were such chunks; those of ``mixed`` are of the median run."""

Line = tuple[str, str, str]
"""Label, field, style."""

_SPEED: tuple[Line, ...] = (
    ("output tokens/s", "output_tokens_per_s", "number"),
    ("all tokens/s", "total_tokens_per_s", "number"),
    ("requests/s", "requests_per_s", "number"),
    ("duration", "seconds", "time"),
)
_COUNTS: tuple[Line, ...] = (
    ("steps", "num_steps", "count"),
    ("  as CUDA graphs", "num_graph_steps", "count"),
    ("chunks to the prompt's end", "chunks_by_prompt", "count"),
    ("  cut by the budget", "chunks_by_budget", "count"),
    ("  cut by the ITL target", "chunks_by_itl", "count"),
    ("  cut by the free blocks", "chunks_by_blocks", "count"),
    ("preemptions", "num_preemptions", "count"),
    ("KV slots used of allocated", "kv_utilization", "share"),
    ("padding", "padding_share", "share"),
    ("scheduling", "schedule_share", "share"),
    ("peak memory", "peak_memory_bytes", "bytes"),
)


def _percentiles(label: str, name: str) -> tuple[Line, ...]:
    return tuple((f"{label} {point}", f"{name}_{point}_s", "time") for point in _POINTS[1:])


SERVE_LINES: tuple[Line, ...] = (
    ("requests/s asked for", "request_rate", "number"),
    *_SPEED,
    *_percentiles("TTFT", "ttft"),
    *_percentiles("TPOT", "tpot"),
    *_percentiles("ITL", "itl"),
    *_percentiles("arrival to end", "e2e"),
    ("good requests", "goodput_share", "share"),
    ("good requests/s", "goodput_requests_per_s", "number"),
    ("waiting, mean", "num_waiting_mean", "number"),
    ("waiting, most", "num_waiting_peak", "count"),
    ("waiting or running, mean", "num_present_mean", "number"),
    ("waiting or running, most", "num_present_peak", "count"),
    ("submitted late by at most", "late_max_s", "time"),
    *_COUNTS,
)
MIXED_LINES: tuple[Line, ...] = (
    *_percentiles("ITL", "itl"),
    *_percentiles("ITL, quiet", "quiet_itl"),
    ("prompts: first TTFT", "prompt_ttft_min_s", "time"),
    ("prompts: last TTFT", "prompt_ttft_max_s", "time"),
    ("window", "window_s", "time"),
    ("  all tokens/s in it", "window_tokens_per_s", "number"),
    *_SPEED,
    *_COUNTS,
)

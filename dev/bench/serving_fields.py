"""What the rows of ``serve``, ``mixed`` and ``prefix`` say beyond ``report.FIELDS``, and how."""

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
    **{
        f"run_itl_{point}_s": f"gaps from the quiet time to the decodes' ends: {point}, in seconds"
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

PREFIX_FIELDS: dict[str, str] = {
    "workload": "what the requests are like: shared-system, few-shot, multi-turn, "
    "tree-of-thoughts, hit, none",
    "prefix_index": "how the engine finds prefixes: tree, hash or off",
    "tokens_saved": "tokens that were found in the cache instead of being computed; from here on "
    "those that a preempted request found again count too",
    "hit_token_share": "these, by the tokens of all requests that were looked up",
    "hit_request_share": "share of the lookups that found anything",
    "best_hit_token_share": "share of the prompt tokens in whole blocks that an earlier request "
    "had, if none was ever given up",
    "best_hit_request_share": "share of the requests with such a block",
    "share_of_best": "hit_token_share by best_hit_token_share; above 1 where parts of blocks are "
    "copied",
    "num_blocks_evicted": "cached blocks given up for others",
    "index_blocks": "blocks in the index at the end, those of earlier runs included",
    "index_nodes": "nodes of the tree, or entries of the table, at the end",
}
"""Fields of ``prefix`` alone; ttft counts from the moment a request could be sent."""

HIT_FIELDS: dict[str, str] = {
    "cached_ttft_s": "time to first token of the prompt that is cached, median over the runs",
    "uncached_ttft_s": "of one as long that is not",
}
"""What its workload ``hit`` has besides: both alone in an idle engine."""

CHUNK_FIELDS: dict[str, str] = {
    "chunks_by_prompt": "chunks of prompts, from m5 on, that were all that was left to compute",
    "chunks_by_budget": "chunks that the tokens of a step were not enough to make longer",
    "chunks_by_chunk": "chunks as long as they may be in a step with decodes",
    "chunks_by_itl": "chunks that the target for the gaps between tokens kept from being longer",
    "chunks_by_blocks": "chunks for which there were no more KV blocks",
}
"""Fields of all these, where there were such chunks; those of ``mixed`` are of the median run."""

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
    ("  cut by the chunk size", "chunks_by_chunk", "count"),
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
    *_percentiles("ITL, to the end", "run_itl"),
    ("prompts: first TTFT", "prompt_ttft_min_s", "time"),
    ("prompts: last TTFT", "prompt_ttft_max_s", "time"),
    ("window", "window_s", "time"),
    ("  all tokens/s in it", "window_tokens_per_s", "number"),
    *_SPEED,
    *_COUNTS,
)
PREFIX_LINES: tuple[Line, ...] = (
    ("cached: TTFT", "cached_ttft_s", "time"),
    ("uncached: TTFT", "uncached_ttft_s", "time"),
    *_percentiles("TTFT", "ttft"),
    *_SPEED,
    ("index", "prefix_index", "text"),
    ("prompt tokens", "prompt_tokens", "count"),
    ("  found in the cache", "tokens_saved", "count"),
    ("  share found", "hit_token_share", "share"),
    ("  at best", "best_hit_token_share", "share"),
    ("  found of the best", "share_of_best", "share"),
    ("requests with a hit", "hit_request_share", "share"),
    ("  at best", "best_hit_request_share", "share"),
    ("blocks evicted", "num_blocks_evicted", "count"),
    ("blocks in the index", "index_blocks", "count"),
    ("nodes in the index", "index_nodes", "count"),
    *_percentiles("TPOT", "tpot"),
    *_COUNTS,
)

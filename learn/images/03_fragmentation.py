"""Where the KV cache's memory goes under five ways to hand it out. Counts, draws, needs no model.

    PYTHONPATH=. .venv/bin/python learn/images/03_fragmentation.py

The work is the bench's: 256 requests, prompts and outputs of 100 to 1024 tokens, seed 0. Every way
gets the same memory and serves in order of arrival. Steps count while somebody waits, so that free
memory is memory nobody could use. The schedulers of m2 and m3 run as they are: they know ids and
lengths, no tensors, so a list of zeros stands in for the tokens that a model would sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import m2_batching.kv_cache
import m2_batching.scheduler
import m3_paged.kv_cache
import m3_paged.scheduler
from common.request import Request
from common.sampling_params import SamplingParams
from dev.bench.workloads import BenchRequest, Lengths, random_requests

MEMORY = 65_536  # tokens
MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 256
BATCHED_TOKENS = 8192
PARTS = ("used", "reserved for later", "never used", "free, but too small or kept back")


def contiguous(work: list[BenchRequest], size_of: Callable[[int], int]) -> Iterator[Counter]:
    """One piece of memory a sequence, as long as ``size_of`` its final length; first hole that fits."""
    waiting = [(r.input_len, r.input_len + r.output_len) for r in work]
    running: list[list[int]] = []  # [start, size, length now, final length], by start
    while waiting:
        while waiting and (start := first_hole(running, size_of(waiting[0][1]))) is not None:
            now, final = waiting.pop(0)
            running.append([start, size_of(final), now, final])
            running.sort()
        if waiting:
            yield Counter({
                "seqs": len(running),
                PARTS[0]: sum(now for _, _, now, _ in running),
                PARTS[1]: sum(final - now for _, _, now, final in running),
                PARTS[2]: sum(size - final for _, size, _, final in running),
                PARTS[3]: MEMORY - sum(size for _, size, _, _ in running),
            })
        running = [[s, size, now + 1, final] for s, size, now, final in running if now + 1 < final]


def first_hole(running: list[list[int]], size: int) -> int | None:
    end = 0
    for start, taken, _, _ in [*running, [MEMORY, 0, 0, 0]]:
        if start - end >= size:
            return end
        end = start + taken
    return None


def scheduled(work: list[BenchRequest], scheduler) -> Iterator[Counter]:
    """What a scheduler of ours does with the same memory."""
    for arrival, each in enumerate(work):
        params = SamplingParams(max_tokens=each.output_len, ignore_eos=True)
        scheduler.add(
            Request(str(arrival), each.prompt_token_ids, params,
                    max_model_len=MAX_MODEL_LEN, arrival=arrival)
        )
    cache = scheduler.kv_cache
    while scheduler.waiting:
        step = scheduler.schedule()
        sampled = getattr(step, "sampled", step.requests)
        scheduler.update(step, [0] * len(sampled))
        if scheduler.waiting:
            yield Counter({
                "seqs": len(scheduler.running),
                PARTS[0]: cache.num_used,
                PARTS[2]: cache.num_allocated - cache.num_used,
                PARTS[3]: MEMORY - cache.num_allocated,
            })
        for request in sampled:
            if request.is_finished:
                scheduler.finish(request)


def m2_scheduler():
    cache = m2_batching.kv_cache.SlotCache(MEMORY, MAX_NUM_SEQS, MAX_MODEL_LEN)
    return m2_batching.scheduler.Scheduler(cache, BATCHED_TOKENS)


def m3_scheduler(block_size: int = 16):
    cache = m3_paged.kv_cache.PagedKVCache(MEMORY // block_size, block_size)
    return m3_paged.scheduler.Scheduler(cache, MAX_NUM_SEQS, BATCHED_TOKENS)


def mean(states: Iterator[Counter]) -> dict[str, float]:
    total: Counter[str] = Counter()
    num_steps = 0
    for num_steps, state in enumerate(states, start=1):
        total.update(state)
    return {name: value / num_steps for name, value in total.items()}


COLORS = ("#2a9d8f", "#e9c46a", "#e76f51", "#8d99ae")


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Stacked bars; grey text that reads on a light and on a dark page."""
    left, width, height = 200, 480, 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {len(rows) * 44 + 86}" '
        'font-family="sans-serif" font-size="13" fill="#7a8494">',
        f"<title>Shares of {MEMORY:,} KV slots, mean over the steps with requests waiting</title>",
    ]
    for i, (part, color) in enumerate(zip(PARTS, COLORS, strict=True)):
        x = left + (0, 80, 236, 340)[i]
        parts.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{x + 17}" y="23">{part}</text>')
    for i, (name, row) in enumerate(rows.items()):
        y, x = 44 + i * 44, float(left)
        parts.append(f'<text x="{left - 10}" y="{y + 20}" text-anchor="end">{name}</text>')
        for part, color in zip(PARTS, COLORS, strict=True):
            share = row.get(part, 0.0) / MEMORY
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{share * width:.1f}" '
                         f'height="{height}" fill="{color}"/>')
            if share > 0.06:
                parts.append(f'<text x="{x + share * width / 2:.1f}" y="{y + 20}" fill="#14213d" '
                             f'text-anchor="middle">{share:.0%}</text>')
            x += share * width
        parts.append(f'<text x="{left + width + 10}" y="{y + 20}">{row["seqs"]:.1f} at once</text>')
    y = 44 + len(rows) * 44 + 14
    parts.append(f'<text x="{left}" y="{y}">share of {MEMORY:,} KV slots, mean over the steps in '
                 "which a request waits</text></svg>")
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    lengths = Lengths(100, 1024)
    work = random_requests(256, lengths, lengths, vocab_size=10_001)
    rows = {
        "reserve max_model_len": mean(contiguous(work, lambda final: MAX_MODEL_LEN)),
        "reserve a power of two": mean(contiguous(work, lambda n: 1 << (n - 1).bit_length())),
        "reserve exactly (oracle)": mean(contiguous(work, lambda final: final)),
        "m2: equal slots": mean(scheduled(work, m2_scheduler())),
        "m3: blocks of 16": mean(scheduled(work, m3_scheduler())),
    }
    print(f"{'':26}{'at once':>8}", *(f"{part[:18]:>19}" for part in PARTS))
    for name, row in rows.items():
        print(f"{name:26}{row['seqs']:8.1f}", *(f"{row.get(p, 0) / MEMORY:19.1%}" for p in PARTS))
    draw(rows, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()

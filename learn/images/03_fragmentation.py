"""Counts where the KV cache's memory goes, and draws it. Needs no model and no GPU.

    PYTHONPATH=. .venv/bin/python learn/images/03_fragmentation.py

The work is the bench's: 256 requests, prompts and outputs of 100 to 1024 tokens, seed 0, served in
order of arrival from a cache of 65,536 tokens. The schedulers of m2 and m3 run as they are: they
know ids and lengths but no tensors, so zeros stand in for the tokens that a model would sample.
Every number is a count, the same on any machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
USED, LATER, NEVER, FREE = "used", "kept for later", "never used", "free"
LENGTHS = Lengths(100, 1024)
WORK = random_requests(256, LENGTHS, LENGTHS, vocab_size=10_001)

Scheduler = m2_batching.scheduler.Scheduler | m3_paged.scheduler.Scheduler


# ---- five ways to hand memory out: the state after every step in which somebody waits ------------


def contiguous(size_of: Callable[[int], int]) -> Iterator[Counter[str]]:
    """One piece of memory a sequence, ``size_of`` its final length, in the first hole that fits."""
    waiting = [(r.input_len, r.input_len + r.output_len) for r in WORK]
    running: list[list[int]] = []  # [start, size, length now, final length], by start
    while waiting:
        while waiting and (start := _first_hole(running, size_of(waiting[0][1]))) is not None:
            now, final = waiting.pop(0)
            running.append([start, size_of(final), now, final])
            running.sort()
        if waiting:
            yield _state(running)
        running = [[s, size, now + 1, final] for s, size, now, final in running if now + 1 < final]


def _first_hole(running: list[list[int]], size: int) -> int | None:
    end = 0
    for start, taken, _, _ in [*running, [MEMORY, 0, 0, 0]]:
        if start - end >= size:
            return end
        end = start + taken
    return None


def scheduled(scheduler: Scheduler, done: Counter[str] | None = None) -> Iterator[Counter[str]]:
    """What one of our schedulers does; ``done`` takes the sums over the whole run."""
    done = Counter() if done is None else done
    cache = scheduler.kv_cache
    for arrival, each in enumerate(WORK):
        scheduler.add(request_for(each, arrival))
    while step := scheduler.schedule():
        sampled = step.sampled if hasattr(step, "sampled") else step.requests
        scheduler.update(step, [0] * len(sampled))
        done["steps"] += 1
        if step.is_prefill:
            done["prompt tokens"] += sum(r.num_computed_tokens for r in step.requests)
        if scheduler.waiting:
            running = scheduler.running
            size = _block_sizes if hasattr(cache, "pool") else _slot_sizes
            finals = [r.num_prompt_tokens + r.max_tokens for r in running]
            nows = [r.num_computed_tokens for r in running]
            yield _state(zip(running, size(cache, running), nows, finals, strict=True))
        for request in sampled:
            if request.is_finished:
                scheduler.finish(request)
    done["preemptions"] = scheduler.num_preemptions


def request_for(each: BenchRequest, arrival: int) -> Request:
    params = SamplingParams(max_tokens=each.output_len, ignore_eos=True)
    return Request(
        str(arrival), each.prompt_token_ids, params, max_model_len=MAX_MODEL_LEN, arrival=arrival
    )


def _slot_sizes(cache: m2_batching.kv_cache.SlotCache, running: list[Request]) -> list[int]:
    return [cache.slot_len] * len(running)


def _block_sizes(cache: m3_paged.kv_cache.PagedKVCache, running: list[Request]) -> list[int]:
    return [cache.block_size * len(cache.table(request)) for request in running]


def _state(running: Iterable) -> Counter[str]:
    """Slots by what they are for; each of ``running`` is (anything, size, length now, at last)."""
    state = Counter({FREE: MEMORY})
    for _, size, now, final in running:
        state["seqs"] += 1
        state[USED] += now
        state[LATER] += min(size, final) - now
        state[NEVER] += max(size - final, 0)
        state[FREE] -= size
    return state


def mean(states: Iterable[Counter[str]]) -> dict[str, float]:
    states = list(states)
    total = sum(states, Counter())
    return {name: value / len(states) for name, value in total.items()}


def m2_scheduler() -> m2_batching.scheduler.Scheduler:
    cache = m2_batching.kv_cache.SlotCache(MEMORY, MAX_NUM_SEQS, MAX_MODEL_LEN)
    return m2_batching.scheduler.Scheduler(cache, BATCHED_TOKENS)


def m3_scheduler(block_size: int = 16) -> m3_paged.scheduler.Scheduler:
    cache = m3_paged.kv_cache.PagedKVCache(MEMORY // block_size, block_size)
    return m3_paged.scheduler.Scheduler(cache, MAX_NUM_SEQS, BATCHED_TOKENS)


# ---- the tables of the note ----------------------------------------------------------------------


def five_ways() -> dict[str, dict[str, float]]:
    rows = {
        "reserve max_model_len": mean(contiguous(lambda final: MAX_MODEL_LEN)),
        "reserve a power of two": mean(contiguous(lambda final: 1 << (final - 1).bit_length())),
        "reserve exactly (oracle)": mean(contiguous(lambda final: final)),
        "m2: slots of one length": mean(scheduled(m2_scheduler())),
        "m3: blocks of 16": mean(scheduled(m3_scheduler())),
    }
    print(f"{MEMORY:,} slots, mean over the steps in which a request waits\n")
    print(f"{'':26}{'at once':>8}", *(f"{part:>15}" for part in (USED, LATER, NEVER, FREE)))
    for name, row in rows.items():
        shares = (f"{row.get(part, 0) / MEMORY:15.1%}" for part in (USED, LATER, NEVER, FREE))
        print(f"{name:26}{row['seqs']:8.1f}", *shares)
    return rows


def block_sizes() -> None:
    print("\nblock size   predicted   counted   at once")
    for size in (8, 16, 32, 64, 128, 256):
        row = mean(scheduled(m3_scheduler(size)))
        length = row[USED] / row["seqs"]
        predicted = length / (length + (size - 1) / 2)
        counted = row[USED] / (MEMORY - row[FREE])
        print(f"{size:10} {predicted:11.1%} {counted:9.1%} {row['seqs']:9.1f}")


def watermarks() -> None:
    print("\nwatermark    steps   preemptions   tokens computed again")
    total = sum(each.input_len + each.output_len for each in WORK)
    for share in (0.0, 0.01, 0.02, 0.05, 0.1):
        m3_paged.scheduler._WATERMARK = share
        done: Counter[str] = Counter()
        list(scheduled(m3_scheduler(), done))
        again = done["prompt tokens"] - sum(each.input_len for each in WORK)
        print(f"{share:9.0%} {done['steps']:8,} {done['preemptions']:13} {again / total:23.1%}")


# ---- the picture ---------------------------------------------------------------------------------

COLORS = {USED: "#2a9d8f", LATER: "#e9c46a", NEVER: "#e76f51", FREE: "#d9dde4"}
INK, SOFT = "#1d2433", "#5b6577"
LEFT, WIDTH, TOP, PITCH = 196, 500, 90, 44


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Stacked bars on a light panel, which reads the same on a light and on a dark page."""
    height = TOP + PITCH * len(rows) + 14
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{INK}">',
        "<title>Where the KV cache's memory goes</title>",
        f'<rect x="0.5" y="0.5" width="839" height="{height - 1}" rx="8" fill="#fbfbf8" '
        'stroke="#c9ced8"/>',
        f'<text x="24" y="32" font-size="15" font-weight="bold">Where {MEMORY:,} KV slots go '
        "while requests wait</text>",
    ]
    x = LEFT
    for part, color in COLORS.items():
        svg.append(f'<rect x="{x}" y="54" width="13" height="13" rx="2" fill="{color}"/>')
        svg.append(f'<text x="{x + 19}" y="65" font-size="12" fill="{SOFT}">{part}</text>')
        x += 40 + 8 * len(part)
    svg.append(f'<text x="{LEFT + WIDTH + 12}" y="65" font-size="12" fill="{SOFT}">'
               "sequences at once</text>")
    for place, (name, row) in enumerate(rows.items()):
        y, x = TOP + PITCH * place, float(LEFT)
        svg.append(f'<text x="{LEFT - 12}" y="{y + 20}" text-anchor="end">{name}</text>')
        for part, color in COLORS.items():
            share = row.get(part, 0.0) / MEMORY
            svg.append(f'<rect x="{x:.1f}" y="{y}" width="{share * WIDTH:.1f}" height="30" '
                       f'fill="{color}"/>')
            if share > 0.05:
                svg.append(f'<text x="{x + share * WIDTH / 2:.1f}" y="{y + 20}" '
                           f'text-anchor="middle">{share:.0%}</text>')
            x += share * WIDTH
        svg.append(f'<text x="{LEFT + WIDTH + 12}" y="{y + 20}" font-weight="bold">'
                   f'{row["seqs"]:.1f}</text>')
    path.write_text("\n".join([*svg, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    draw(five_ways(), Path(__file__).with_suffix(".svg"))
    block_sizes()
    watermarks()

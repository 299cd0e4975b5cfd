"""Counts what note 5 counts: m4's and m5's schedulers against a clock that is a formula.

    PYTHONPATH=. python learn/images/05_experiments.py mixed

No model runs, except for `overshoot` (a tiny random one). Steps, tokens and padding are facts of
the schedulers; milliseconds are those of ``step_ms``, fitted to m4's measured times on an H200
(``docs/results/h200-latency-m4.json``, ``h200-kernels-m4.json``). What there is: model, roofline,
mixed, adaptive, throughput, arrivals, memory, overshoot, padding.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import m5_chunked
from common.request import Request
from common.sampling_params import SamplingParams
from m4_flash.kv_cache import PagedKVCache as CacheOfM4
from m4_flash.scheduler import Scheduler as SchedulerOfM4
from m5_chunked.chunk_size import ChunkSize
from m5_chunked.kernels.prefill_plan import plan_prefill, round_up
from m5_chunked.kv_cache import PagedKVCache
from m5_chunked.scheduler import Scheduler
from m5_chunked.step_inputs import StepArrays

Span = tuple[int, int, bool]  # first token, end, whether one is sampled after them

# Qwen3-0.6B in bfloat16: weights of the layers and of the vocabulary, FLOPs of one pair of query
# and key in all layers (4 Hq D L), bytes of one token's keys and values in all layers.
LAYERS, VOCABULARY = 440_401_920, 1024 * 151_936
PAIR_FLOPS, TOKEN_BYTES = 4 * 16 * 128 * 28, 2 * 2 * 8 * 128 * 28
READ, MATRIX, ATTENTION = 4.37e12, 450e12, 560e12  # bytes/s, FLOP/s, FLOP/s of long chunks
FIXED = 0.7e-3  # seconds: the boundaries between a step's kernels


def work(spans: Sequence[Span]) -> tuple[float, float, float]:
    """(FLOPs of the matrices, FLOPs of attention, bytes) of a step."""
    tokens = sum(end - start for start, end, _ in spans)
    samples = sum(sampled for *_, sampled in spans)
    pairs = sum((end - start) * (start + end + 1) / 2 for start, end, _ in spans)
    matrix = 2 * LAYERS * tokens + 2 * VOCABULARY * samples
    read = 2 * (LAYERS + VOCABULARY) + TOKEN_BYTES * sum(end for _, end, _ in spans)
    return matrix, PAIR_FLOPS * pairs, read


def step_ms(spans: Sequence[Span]) -> float:
    """The cost model: milliseconds of a step."""
    matrix, _, read = work(spans)
    attention = 0.0
    for start, end, _ in spans:
        count = end - start
        if count > 1:  # decodes pay for reading their keys, which is in `read`
            pairs = count * (start + end + 1) / 2
            attention += PAIR_FLOPS * pairs / (ATTENTION * count / (count + 256))
    return 1e3 * (FIXED + read / READ + matrix / MATRIX + attention)


@dataclass
class User:
    """A request, when it came, and when its tokens did."""

    request: Request
    arrival: float
    times: list[float] = field(default_factory=list)


@dataclass
class Run:
    """What a scheduler did with some users."""

    users: list[User]
    steps: list[tuple[float, int, int]]  # milliseconds, decodes, other tokens
    seconds: float
    scheduler: Any
    late_from: int  # steps before the late users came


def user(name: str, prompt: int, output: int, arrival: float = 0.0, priority: int = 0) -> User:
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    request = Request(
        name, [1] * prompt, params, max_model_len=40_960, arrival=int(name), priority=priority
    )
    return User(request, arrival)


def m4(budget: int = 8192, num_blocks: int = 60_000, max_num_seqs: int = 256) -> SchedulerOfM4:
    return SchedulerOfM4(CacheOfM4(num_blocks, 16), max_num_seqs, budget)


def m5(
    budget: int, num_blocks: int = 60_000, max_num_seqs: int = 256, target_ms: float | None = None
) -> Scheduler:
    target = None if target_ms is None else target_ms / 1e3
    cache = PagedKVCache(num_blocks, 16)
    return Scheduler(cache, max_num_seqs, budget, ChunkSize(budget, target))


def by_work(chunk_size: int) -> Scheduler:
    """m5 with a budget of 8,192, and chunks beside decodes by their work."""
    size = ChunkSize(chunk_size, pairs_per_token=2 * LAYERS / PAIR_FLOPS)
    return Scheduler(PagedKVCache(60_000, 16), 256, 8192, size)


def spans_of(step: Any) -> list[Span]:
    if hasattr(step, "parts"):
        return [(part.start, part.end, part.samples) for part in step.parts]
    return [(0 if step.is_prefill else r.num_tokens - 1, r.num_tokens, True)
            for r in step.requests]  # fmt: skip


def run(scheduler: Any, users: list[User], late: list[User] = (), hold: int = 0) -> Run:
    """Step until all are served, m5 as its engine does: launch the next step, read the last.

    ``late`` users come when everyone else has ``hold`` tokens.
    """
    overlap = isinstance(scheduler, Scheduler)
    coming, everyone = sorted(users, key=lambda u: u.arrival), [*users, *late]
    by_key = {u.request.key: u for u in everyone}
    held, unfinished = list(late), len(everyone)
    host = gpu = last_read = 0.0
    before, steps, late_from = None, [], 0

    def read(step: Any, end: float) -> None:
        nonlocal host, last_read, unfinished
        host = max(host, end)
        if overlap:
            prompt_tokens = step.num_tokens - step.num_decodes
            scheduler.chunk_size.observe(prompt_tokens, step.num_decodes, host - last_read)
        last_read = host
        scheduler.update(step, [2] * len(step.sampled))
        for request in step.sampled:
            by_key[request.key].times.append(host)
            if request.is_finished:
                scheduler.finish(request)
                unfinished -= 1

    while unfinished:
        while coming and coming[0].arrival <= host:
            scheduler.add(coming.pop(0).request)
        if held and all(len(u.times) >= hold for u in users):
            for u in held:
                u.arrival = host
                scheduler.add(u.request)
            held, late_from = [], len(steps)
        step, launched = scheduler.schedule(), None
        if step is not None:
            spans = spans_of(step)
            ms = step_ms(spans)
            gpu = max(gpu, host) + ms / 1e3
            launched = (step, gpu)
            ones = sum(end - start == 1 for start, end, _ in spans)
            steps.append((ms, ones, sum(end - start for start, end, _ in spans) - ones))
        if not overlap:
            before, launched = launched, None
        if before is not None:
            read(*before)
        elif step is None and coming:
            host = max(host, coming[0].arrival)
        before = launched
    return Run(everyone, steps, host, scheduler, late_from)


def gaps(times: Sequence[float]) -> list[float]:
    return [1e3 * (b - a) for a, b in pairwise(times)]


def mixed_run(scheduler: Any, output: int = 512) -> tuple[Run, list[float], list[float], float]:
    """The work of ``python -m dev.bench mixed``: the run, the decodes' gaps, the TTFTs, ms."""
    decodes = [user(str(i), 256, output) for i in range(64)]
    prompts = [user(str(64 + i), 8192, 16) for i in range(4)]
    done = run(scheduler, decodes, prompts, hold=64)
    arrival, answered = prompts[0].arrival, max(u.times[0] for u in prompts)
    window = []
    for u in decodes:
        first = next(i for i, t in enumerate(u.times) if t > arrival)
        last = next(i for i, t in enumerate(u.times) if t >= answered) + 16
        window += gaps(u.times[first - 1 : last + 1])
    ttfts = sorted(1e3 * (u.times[0] - u.arrival) for u in prompts)
    return done, window, ttfts, 1e3 * (answered - arrival)


def model() -> None:
    """The cost model beside what m4 measured."""
    measured = [
        ("decode, batch 1", [(192, 193, True)], 0.92),
        ("decode, batch 8", [(192, 193, True)] * 8, 0.92),
        ("decode, batch 64", [(192, 193, True)] * 64, 1.55),
        ("decode, batch 256", [(192, 193, True)] * 256, 3.28),
        ("prompt of 512", [(0, 512, True)], 5.5),
        ("prompt of 2,048", [(0, 2048, True)], 7.2),
        ("prompt of 8,192", [(0, 8192, True)], 31.4),
        ("prompt of 32,768", [(0, 32_768, True)], 287.0),
    ]
    for name, spans, ms in measured:
        print(f"{name:18} model {step_ms(spans):6.2f} ms, measured {ms:6.2f}")


def roofline() -> None:
    """FLOPs, bytes and intensity of some steps."""
    decodes = [(1023, 1024, True)] * 64
    for name, spans in (
        ("64 decodes", decodes),
        ("256 decodes", [(1023, 1024, True)] * 256),
        ("chunk of 448 behind 4,096", [(4096, 4544, False)]),
        ("both", [*decodes, (4096, 4544, False)]),
        ("chunk of 1,984 behind 4,096", [(4096, 6080, False)]),
        ("both", [*decodes, (4096, 6080, False)]),
        ("prompt of 8,192", [(0, 8192, True)]),
    ):
        matrix, attention, read = work(spans)
        flops = matrix + attention
        print(
            f"{name:28} {flops / 1e12:6.3f} TFLOP {read / 1e9:6.2f} GB"
            f" {flops / read:6.0f} FLOP/B  {1e3 * flops / 787e12:5.2f} ms FLOPs"
            f" {1e3 * read / READ:5.2f} ms bytes, model {step_ms(spans):5.2f}"
        )


def mixed() -> None:
    """64 decodes, 4 prompts of 8,192 tokens."""
    for name, scheduler in (
        ("m4", m4()),
        *((f"m5 {budget}", m5(budget)) for budget in BUDGETS),
        *((f"work {size}", by_work(size)) for size in (8192, 12288, 16384)),
    ):
        done, window, ttfts, _ = mixed_run(scheduler)
        p50, p99 = np.percentile(window, (50, 99))
        num_mixed = sum(1 for *_, others in done.steps[done.late_from :] if others)
        tokens = sum(ones + others for _, ones, others in done.steps)
        made = sum(len(u.times) for u in done.users)
        print(
            f"{name:10} steps {len(done.steps):4}, with chunks {num_mixed:3}, ITL p50 {p50:6.2f}"
            f" p99 {p99:6.2f} max {max(window):6.1f}, TTFT {ttfts[0]:6.1f} to {ttfts[-1]:6.1f},"
            f" {tokens} tokens, {made} made in {done.seconds:.3f} s:"
            f" {made / done.seconds:,.0f}/s"
        )


BUDGETS = (512, 1024, 2048, 4096, 8192)


def adaptive() -> None:
    """The same work with a target, and the chunks it leads to."""
    for target in (4, 6, 10, 20):
        done, window, ttfts, _ = mixed_run(m5(8192, target_ms=target))
        p50, p99 = np.percentile(window, (50, 99))
        chunks = [others for _, _, others in done.steps[done.late_from :] if others]
        print(
            f"target {target:2} ms: ITL p50 {p50:5.2f} p99 {p99:5.2f} max {max(window):5.1f},"
            f" TTFT {ttfts[0]:5.1f} to {ttfts[-1]:5.1f}, {dict(done.scheduler.chunk_reasons)}"
        )
        print("    ", *chunks[:28])


def workload(rate: float | None = None) -> list[User]:
    """256 requests of 100 to 1,024 tokens in and out, at once or at a rate per second."""
    rng, now, users = random.Random(0), 0.0, []
    for i in range(256):
        users.append(user(str(i), rng.randint(100, 1024), rng.randint(100, 1024), now))
        now += rng.expovariate(rate) if rate else 0.0
    return users


def throughput() -> None:
    """256 requests at once."""
    for name, scheduler in (
        ("m4", m4()),
        *((f"m5 {budget}", m5(budget)) for budget in BUDGETS),
        ("work 12288", by_work(12288)),
    ):
        done = run(scheduler, workload())
        made = sum(len(u.times) for u in done.users)
        ttfts = [1e3 * (u.times[0] - u.arrival) for u in done.users]
        worst = max(max(gaps(u.times)) for u in done.users)
        print(
            f"{name:10} {len(done.steps)} steps, {made / done.seconds:,.0f} tokens/s, TTFT mean"
            f" {np.mean(ttfts):5.1f} max {max(ttfts):5.1f}, longest gap {worst:5.1f} ms"
        )


def arrivals() -> None:
    """The same requests, 32 a second."""
    for name, scheduler in (
        ("m4", m4()),
        *((f"m5 {budget}", m5(budget)) for budget in BUDGETS),
    ):
        done = run(scheduler, workload(rate=32.0))
        all_gaps = [gap for u in done.users for gap in gaps(u.times)]
        ttfts = [1e3 * (u.times[0] - u.arrival) for u in done.users]
        p50, p99 = np.percentile(all_gaps, (50, 99))
        print(
            f"{name:10} {len(done.steps)} steps, ITL p50 {p50:.2f} p99 {p99:.2f}"
            f" max {max(all_gaps):.1f} ms, TTFT p50 {np.median(ttfts):.1f}"
            f" p99 {np.percentile(ttfts, 99):.1f} ms"
        )


def memory() -> None:
    """Two prompts that do not fit together; the second, more urgent one comes at step 3."""
    scheduler = m5(64, num_blocks=20, max_num_seqs=4)
    users = [user("0", 240, 8, priority=1), user("1", 150, 24)]
    scheduler.add(users[0].request)
    before = None
    for number in range(1, 60):
        if number == 3:
            scheduler.add(users[1].request)
        preempted = scheduler.num_preemptions
        step = scheduler.schedule()
        if step is not None:
            parts = " ".join(f"{'AB'[int(p.request.request_id)]} {p.start}-{p.end}"
                             for p in step.parts)  # fmt: skip
            print(
                f"step {number:2}: {parts:24} free {scheduler.kv_cache.pool.num_free:2}"
                + " preempted" * (scheduler.num_preemptions - preempted)
            )
        if before is not None:
            for request in scheduler.update(before, [2] * len(before.sampled)):
                if request is not None and request.is_finished:
                    scheduler.finish(request)
        before = step
        if all(u.request.is_finished for u in users):
            break
    print(dict(scheduler.chunk_reasons))


def overshoot() -> None:
    """Tokens computed for nobody when sequences end by a stop token."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 200) for _ in range(rng.randint(4, 60))] for _ in range(64)]
    for stops in (False, True):
        for overlap in (False, True):
            llm = m5_chunked.LLM(
                "random:tiny-llama", device="cpu", max_num_seqs=16, max_num_batched_tokens=64,
                num_kv_blocks=400, overlap=overlap,
            )  # fmt: skip
            ends = [*range(0, 250, 16)] if stops else None  # 1 in 16 tokens ends a sequence
            params = SamplingParams(
                temperature=1.0, seed=0, max_tokens=64, ignore_eos=True, stop_token_ids=ends
            )
            outputs = llm.generate(prompts, params)
            seen = sum(len(output.outputs[0].token_ids) for output in outputs)
            stats = llm.stats()
            print(
                f"stop tokens {stops}, overlap {overlap}: {seen} tokens seen,"
                f" {stats['num_generated_tokens']} sampled, {stats['num_steps']} steps"
            )


def padding() -> None:
    """Tokens and shapes of the steps with chunks that graphs would take, padded and not."""
    for budget in (512, 1024, 2048, 4096):
        for name, users, late, hold in (
            ("mixed", [user(str(i), 256, 512) for i in range(64)],
             [user(str(64 + i), 8192, 16) for i in range(4)], 64),
            ("256 requests, 32/s", workload(32.0), [], 0),
        ):  # fmt: skip
            print(f"budget {budget}, {name}:", _padding(m5(budget), users, late, hold))


def _padding(scheduler: Scheduler, users: list[User], late: list[User], hold: int) -> str:
    seen: Counter[Any] = Counter()
    real = padded_tokens = replays = 0
    schedule: Callable[[], Any] = scheduler.schedule

    def watched() -> Any:
        nonlocal real, padded_tokens, replays
        step = schedule()
        if step is None or step.is_decode:
            return step
        lens = [part.end - part.start for part in step.parts]
        width = max(map(len, step.block_tables))
        tables = np.zeros((len(lens), width), dtype=np.int32)
        rows = np.zeros(len(lens), dtype=np.int64)
        samples = np.zeros(len(step.sampled), dtype=np.int64)
        arrays = StepArrays.of(step, rows, samples, tables, 16)
        decodes = round_up(step.num_decodes)
        others = round_up(arrays.num_tokens - step.num_decodes)
        padded = arrays.padded(decodes, decodes + others, round_up(len(samples)))
        plan = plan_prefill(
            [*[0] * decodes, *padded.query_lens[decodes:]],
            [*[0] * decodes, *padded.cached_lens[decodes:]],
            "cpu", num_heads=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16,
            num_multiprocessors=132, gather=False, padded=True,
        )  # fmt: skip
        front = step.num_decodes
        long = front and sum(arrays.seq_lens[:front]) >= 512 * front
        key = (decodes, bool(long), padded.num_tokens, padded.num_samples, padded.tables.shape,
               plan.launch_key)  # fmt: skip
        replays += key in seen
        seen[key] += 1
        real += arrays.num_tokens
        padded_tokens += padded.num_tokens
        return step

    scheduler.schedule = watched
    run(scheduler, users, late, hold)
    return (f"{sum(seen.values())} steps with chunks, {padded_tokens / real - 1:.1%} more tokens,"
            f" {len(seen)} shapes, {replays} replayed")  # fmt: skip


if __name__ == "__main__":
    for name in sys.argv[1:] or ("model", "roofline", "mixed", "adaptive", "throughput",
                                 "arrivals", "memory", "overshoot", "padding"):  # fmt: skip
        print(f"--- {name}")
        globals()[name]()

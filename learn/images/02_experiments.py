"""Counts what note 2 counts: steps, rows, slots and preemptions, on the engines themselves.

    PYTHONPATH=. python learn/images/02_experiments.py steps

The model is tiny and random and a step is the clock, so every machine prints the same numbers. What
there is: policies, steps, padding, memory, doubling, starvation, queue.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import m2_batching
import m3_paged
from common.sampling_params import SamplingParams

NAMES, LENGTHS = "ABCDEFGH", (3, 9, 5, 12, 4, 7, 2, 6)
ARRIVALS, ROWS = (0, 0, 1, 3, 5, 6, 8, 9), 4

# Requests that wait outside the engine: the step each came in, and which one it is.
Queue = list[tuple[int, int]]
# How many may start now: (queue, whether the engine is idle, step, whether no more will come).
Policy = Callable[[Queue, bool, int, bool], int]


def new_llm(milestone: ModuleType = m2_batching, **options: Any) -> Any:
    return milestone.LLM("random:tiny-llama", device="cpu", **options)


def tokens(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


def static(queue: Queue, idle: bool, step: int, no_more: bool) -> int:
    return ROWS if idle and (len(queue) >= ROWS or no_more) else 0


def dynamic(queue: Queue, idle: bool, step: int, no_more: bool) -> int:
    waited = step - queue[0][0] if queue else 0
    return ROWS if idle and (len(queue) >= ROWS or waited >= 2 or no_more) else 0


def continuous(queue: Queue, idle: bool, step: int, no_more: bool) -> int:
    return len(queue)


def play(policy: Policy, arrivals: Sequence[int]) -> list[str]:
    """Hold requests back as the policy says; returns who got a token in each step."""
    engine = new_llm(max_num_seqs=ROWS).engine
    queue: Queue = []
    rows: list[str] = []
    arrived = 0
    while arrived < len(NAMES) or queue or engine.has_unfinished_requests():
        while arrived < len(NAMES) and arrivals[arrived] <= len(rows):
            queue.append((len(rows), arrived))
            arrived += 1
        idle = not engine.has_unfinished_requests()
        count = policy(queue, idle, len(rows), arrived == len(NAMES))
        for _, place in queue[:count]:
            engine.add_request(NAMES[place], [1] * 8, tokens(LENGTHS[place]))
        del queue[:count]
        rows.append("".join(output.request_id for output in engine.step()))
    return rows


def policies() -> None:
    """Eight requests, one by one and all at once, under three ways to form a batch."""
    for arrivals in (ARRIVALS, (0,) * len(NAMES)):
        print(f"arrivals {arrivals}, {sum(LENGTHS)} tokens to make")
        for policy in (static, dynamic, continuous):
            rows = play(policy, arrivals)
            first = [min(t for t, row in enumerate(rows) if name in row) for name in NAMES]
            ttft = sum(f - a + 1 for f, a in zip(first, arrivals, strict=True)) / len(NAMES)
            used = sum(map(len, rows)) / (ROWS * len(rows))
            print(f"{policy.__name__:10} {len(rows)} steps, first token after {ttft:.1f}, "
                  f"{used:.0%} of the row-steps used")
            print("          ", " ".join(row or "." for row in rows))


def workload() -> tuple[list[list[int]], list[SamplingParams]]:
    """128 prompts of 8 to 128 tokens with outputs of 1 to 128 tokens."""
    rng = random.Random(0)
    prompts = [[1] * rng.randint(8, 128) for _ in range(128)]
    return prompts, [tokens(rng.randint(1, 128)) for _ in prompts]


def steps() -> None:
    """Steps of static batches (groups that run to their end) and of continuous batching."""
    prompts, params = workload()
    for slots in (4, 8, 16, 32):
        for group in (slots, len(prompts)):
            llm = new_llm(max_num_seqs=slots, max_model_len=256)
            for i in range(0, len(prompts), group):
                llm.generate(prompts[i : i + group], params[i : i + group])
            stats = llm.stats()
            print(f"{slots:2} slots, {'static' if group == slots else 'continuous':10} "
                  f"{stats['num_steps']:5,} steps, "
                  f"{stats['num_generated_tokens'] / stats['num_steps']:5.2f} tokens a step")


def padding() -> None:
    """What padding costs in prefill, by the limit on a step; and in what decode steps read."""
    prompts, params = workload()
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for limit in (128, 512, 8192):
        for order in (range(len(prompts)), by_length):
            llm = new_llm(max_num_seqs=64, max_model_len=256, max_num_batched_tokens=limit)
            llm.generate([prompts[i] for i in order], [params[i] for i in order])
            stats = llm.stats()
            print(f"limit {limit:5,}, {'sorted' if order is by_length else 'as they came':12} "
                  f"{stats['padding_share']:.1%} padding, {stats['num_steps']} steps")
    engine = new_llm(max_num_seqs=16, max_model_len=256).engine
    for place, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(place), prompt, own)
    read = needed = 0
    while engine.has_unfinished_requests():
        before = engine.stats()["num_prompt_tokens"]
        contexts = [request.num_tokens for request in engine.scheduler.running]
        engine.step()
        if engine.stats()["num_prompt_tokens"] == before:  # a decode step
            read += len(contexts) * max(contexts)
            needed += sum(contexts)
    print(f"decode steps with 16 slots read {read:,} cached tokens and need {needed:,}")


def memory() -> None:
    """The same work in caches of one size, with slots and with blocks of 16."""
    prompts, params = workload()
    num_prompt_tokens = sum(map(len, prompts))
    for size in (1024, 4096, 8192, 16384):
        for milestone, option in (
            (m2_batching, {"num_kv_tokens": size}), (m3_paged, {"num_kv_blocks": size // 16})
        ):
            llm = new_llm(milestone, max_num_seqs=64, max_model_len=256, **option)
            llm.generate(prompts, params)
            stats = llm.stats()
            print(f"{size:6,} tokens, {milestone.__name__:11} at most {stats['num_running_peak']} "
                  f"at once, {stats['num_steps']:5,} steps, {stats['num_preemptions']:2} "
                  f"preemptions, {stats['num_prompt_tokens'] - num_prompt_tokens:5,} tokens again, "
                  f"{stats['kv_utilization']:.1%} of slots used")


def doubling() -> None:
    """Four requests in a cache of 128 tokens; a line whenever something changes."""
    engine = new_llm(max_num_seqs=4, num_kv_tokens=128, max_model_len=100).engine
    for name, prompt_len, count in (("A", 26, 30), ("B", 12, 10), ("C", 20, 30), ("D", 5, 20)):
        engine.add_request(name, [1] * prompt_len, tokens(count))
    scheduler, step, before = engine.scheduler, 0, None
    while engine.has_unfinished_requests():
        ran = " ".join(output.request_id for output in engine.step())
        step += 1
        slots = " ".join(request.request_id for request in scheduler.running) or "-"
        waiting = " ".join(request.request_id for request in scheduler.waiting) or "-"
        state = (scheduler.kv_cache.slot_len, slots, waiting, scheduler.num_preemptions)
        if state != before:
            print(f"step {step:2}: ran {ran:8} slot_len {state[0]:3}  slots {slots:8} "
                  f"waiting {waiting:6} preemptions {state[3]}")
        before = state


def starvation() -> None:
    """One request of low priority among urgent ones that keep coming until step 200."""
    for every in (8, 6, 5, 4):
        engine = new_llm(max_num_seqs=2, max_model_len=64).engine
        engine.add_request("patient", [1] * 8, tokens(20), priority=1)
        step = 0
        while engine.has_unfinished_requests() or step < 200:
            if step % every == 0 and step < 200:
                engine.add_request(f"urgent {step}", [1] * 8, tokens(8), priority=0)
            for output in engine.step():
                if output.request_id == "patient" and output.finished:
                    print(f"an urgent one every {every} steps: the patient one is done in step "
                          f"{step}, preempted {output.metrics.num_preemptions} times")
            step += 1


def queue() -> None:
    """Little's law: requests at random times, the step as the clock."""
    for rate in (0.05, 0.10, 0.15, 0.20, 0.24, 0.28, 0.32):
        serve(rate)


def serve(rate: float, num_requests: int = 400, slots: int = 8, mean_output: float = 20) -> None:
    rng = random.Random(0)
    engine = new_llm(max_num_seqs=slots, max_model_len=256).engine
    plan, t = [], 0.0
    for _ in range(num_requests):
        t += rng.expovariate(rate)
        plan.append((t, min(1 + int(rng.expovariate(1 / (mean_output - 0.5))), 200)))
    came: dict[str, int] = {}
    first: dict[str, int] = {}
    left: dict[str, int] = {}
    step = inside = num_tokens = 0
    while len(left) < num_requests:
        while len(came) < num_requests and plan[len(came)][0] <= step:
            request_id, length = str(len(came)), plan[len(came)][1]
            engine.add_request(request_id, [1] * 8, tokens(length))
            came[request_id] = step
        inside += len(came) - len(left)
        for output in engine.step():
            num_tokens += 1
            first.setdefault(output.request_id, step)
            if output.finished:
                left[output.request_id] = step
        step += 1
    served = num_requests / step
    time_inside = sum(left[i] - came[i] + 1 for i in came) / num_requests
    ttft = sum(first[i] - came[i] + 1 for i in came) / num_requests
    print(f"lambda {served:.4f}  R {time_inside:.2f}  lambda R {served * time_inside:.2f}  "
          f"N {inside / step:.2f}  first token {ttft:.1f}  tokens a step {num_tokens / step:.2f}")


if __name__ == "__main__":
    experiments = {f.__name__: f for f in (
        policies, steps, padding, memory, doubling, starvation, queue
    )}
    if not sys.argv[1:] or not set(sys.argv[1:]) <= experiments.keys():
        sys.exit(f"name one or more of: {', '.join(experiments)}")
    for name in sys.argv[1:]:
        experiments[name]()

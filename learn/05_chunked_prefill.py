# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Chunked prefill and overlap, rebuilt step by step
#
# This notebook goes with [note 5](05_chunked_prefill.md). It builds a scheduler with a budget of
# tokens, lets it loose on a clock that is a formula, runs it into a deadlock, and then overlaps its
# steps on a toy GPU that does its work late, as a real one does. Each step ends with an exercise
# whose solution is the cell below it.
#
# ```bash
# make notebooks                                         # opens JupyterLab
# MPLBACKEND=Agg python learn/05_chunked_prefill.py      # or as a plain script
# ```

# %%
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np

# %% [markdown]
# ## 1. What a step costs
#
# Qwen3-0.6B in bfloat16 on an H200. A *span* `(start, end)` is what one sequence computes: a decode
# is `(n - 1, n)`. The step's time is a sum of four terms, fitted to measurements (note 5, section
# 3): a fixed part, bytes, FLOPs of the matrices, and attention of chunks, which is slow for short
# ones.

# %%
Span = tuple[int, int]
WEIGHTS, VOCABULARY = 440_401_920, 1024 * 151_936  # parameters
KEY_BYTES, PAIR_FLOPS = 114_688, 229_376  # of a cached token; of a query and a key


def work(spans: list[Span]) -> tuple[float, float]:
    """(FLOPs, bytes) of a step, every span of which samples."""
    tokens = sum(end - start for start, end in spans)
    pairs = sum((end - start) * (start + end + 1) / 2 for start, end in spans)
    flops = 2 * WEIGHTS * tokens + 2 * VOCABULARY * len(spans) + PAIR_FLOPS * pairs
    return flops, 2 * (WEIGHTS + VOCABULARY) + KEY_BYTES * sum(end for _, end in spans)


def step_ms(spans: list[Span]) -> float:
    tokens = sum(end - start for start, end in spans)
    seconds = 0.7e-3 + work(spans)[1] / 4.37e12
    seconds += (2 * WEIGHTS * tokens + 2 * VOCABULARY * len(spans)) / 450e12
    for start, end in spans:
        if end - start > 1:
            pairs = (end - start) * (start + end + 1) / 2
            seconds += PAIR_FLOPS * pairs / (560e12 * (end - start) / (end - start + 256))
    return 1e3 * seconds


decodes = [(1023, 1024)] * 64
for chunk in (0, 64, 128, 256, 512, 1024, 2048):
    spans = decodes + ([(4096, 4096 + chunk)] if chunk else [])
    flops, moved = work(spans)
    print(f"64 decodes and {chunk:5} prompt tokens: {flops / moved:5.0f} FLOP/byte,"
          f" {step_ms(spans):5.2f} ms")
assert abs(step_ms([(0, 8192)]) - 31.4) < 0.1  # as measured

# %% [markdown]
# **Exercise 1.** How many prompt tokens lift this step to the ridge of 180 FLOP per byte? Does the
# model's time have a kink there? Why not?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 1. About 830. The model adds what a roofline takes the maximum of: kernels that are bound
# by bytes and kernels that are bound by arithmetic run one after the other.
for chunk in range(10, 2000, 10):
    flops, moved = work([*decodes, (4096, 4096 + chunk)])
    if flops / moved >= 787 / 4.37:
        break
print("to the ridge:", chunk, "tokens")
assert 800 <= chunk <= 850


# %% [markdown]
# ## 2. A scheduler in thirty lines
#
# A request is a prompt length, an output length, and two counts: tokens that exist (or are about
# to), and tokens that are computed. What is left decides: 1 is a decode, more is a prompt.


# %%
@dataclass
class Request:
    prompt: int
    output: int
    arrival: float = 0.0
    computed: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.prompt + len(self.times) - self.computed

    @property
    def done(self) -> bool:
        return len(self.times) == self.output


Plan = list[tuple[Request, Span]]
Policy = Callable[[list[Request]], Plan]


def prompts_first(requests: list[Request], budget: int = 8192) -> Plan:
    """m4: a step of prompts, whole ones, or else a step of decodes."""
    plan: Plan = []
    for r in requests:
        if r.left > 1 and (not plan or r.left <= budget):
            plan.append((r, (r.computed, r.computed + r.left)))
            budget -= r.left
    return plan or [(r, (r.computed, r.computed + 1)) for r in requests]


def chunked(budget: int) -> Policy:
    """m5: decodes, then chunks with what is left."""

    def policy(requests: list[Request]) -> Plan:
        plan = [(r, (r.computed, r.computed + 1)) for r in requests if r.left == 1]
        room = budget - len(plan)
        for r in requests:
            if r.left > 1 and room > 0:
                size = min(r.left, room)
                plan.append((r, (r.computed, r.computed + size)))
                room -= size
        return plan

    return policy


def run(policy: Policy, requests: list[Request]) -> list[tuple[float, int]]:
    """Serve all; returns (ms, tokens) of each step. Arrivals are in ms."""
    now, steps = 0.0, []
    while not all(r.done for r in requests):
        plan = policy([r for r in requests if r.arrival <= now and not r.done])
        ms = step_ms([span for _, span in plan])
        now += ms
        for r, (_, end) in plan:
            r.computed = end
            if r.left == 0:  # only who reaches the end of its tokens samples one
                r.times.append(now)
        steps.append((ms, sum(end - start for _, (start, end) in plan)))
    return steps


def mixed() -> list[Request]:
    """64 decodes; after 100 ms four prompts arrive."""
    return [Request(256, 250) for _ in range(64)] + [Request(8192, 8, 100.0) for _ in range(4)]


def gaps(requests: list[Request]) -> np.ndarray:
    return np.concatenate([np.diff(r.times) for r in requests])


policies = {"prompts first": prompts_first}
policies |= {f"budget {budget}": chunked(budget) for budget in (512, 1024, 2048, 4096, 8192)}
results = {}
for name, policy in policies.items():
    requests = mixed()
    steps = run(policy, requests)
    longest = gaps(requests[:64]).max()
    ttfts = [r.times[0] - r.arrival for r in requests[64:]]
    results[name] = (longest, max(ttfts), requests)
    total = sum(ms for ms, _ in steps)
    print(f"{name:14} {len(steps):4} steps, longest gap {longest:6.1f} ms,"
          f" last first token after {max(ttfts):6.1f} ms, all done at {total:.0f}")
assert results["prompts first"][0] > 10 * results["budget 2048"][0]

figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
for name in ("prompts first", "budget 2048", "budget 512"):
    axes[0].step(results[name][2][0].times, range(250), where="post", label=name)
axes[0].set_xlabel("ms")
axes[0].set_ylabel("tokens of one decode")
axes[0].legend()
budgets = (512, 1024, 2048, 4096, 8192)
for place, label in ((0, "longest gap"), (1, "last first token")):
    axes[1].loglog(budgets, [results[f"budget {b}"][place] for b in budgets], "o-", label=label)
axes[1].set_xlabel("tokens of a step")
axes[1].set_ylabel("ms")
axes[1].legend()
plt.show()

# %% [markdown]
# **Exercise 2.** A token may be sampled only after a prompt's *last* token. In `run`, where is that
# said, and what would happen to the number of sampled tokens if every chunk sampled?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 2. `if r.left == 0`. Otherwise each chunk would append a token: the prompt would grow by
# tokens that were drawn in the middle of it, and `left` with it.
pieces = -(-8192 // (512 - 64))
print(f"a prompt of 8,192 in chunks of 448: {pieces} samples instead of 1")

# %% [markdown]
# ## 3. A size that finds itself
#
# Given a target, scale the size by target over measured time, at most halved and at most a quarter
# larger. First with the time of the step before; then as it is when steps overlap: when a step's
# time is known, the next one has been launched.


# %%
def control(target: float, late: int, scale_measured: bool, num_steps: int = 40) -> list[float]:
    """Sizes over steps of 1.5 ms and 2.5 us for each token."""
    limit, under_way, sizes = 8192.0, deque(), []
    for _ in range(num_steps):
        sizes.append(limit)
        under_way.append(limit)
        if len(under_way) > late:
            size = under_way.popleft()
            factor = target / (1.5 + 2.5e-3 * size)
            if scale_measured:
                factor *= size / limit
            limit *= min(max(factor, 0.5), 1.25)
    return sizes


TARGET = 10.0
ideal = (TARGET - 1.5) / 2.5e-3
at_once, late = control(TARGET, 0, False), control(TARGET, 1, False)
plt.figure(figsize=(8, 3.4))
plt.plot(at_once, label="seen at once")
plt.plot(late, label="seen a step late")
plt.axhline(ideal, color="gray", linestyle=":")
plt.xlabel("step")
plt.ylabel("tokens")
plt.legend()
plt.show()
assert abs(at_once[10] / ideal - 1) < 1e-3
assert min(late) < 0.6 * ideal  # it overshoots

# %% [markdown]
# **Exercise 3.** Near the ideal, an error x develops as x(n+1) = x(n) - e x(n) or, a step late, as
# x(n+1) = x(n) - e x(n-1), with e = 1 - 1.5 / target. Compute what remains of it each step in both
# cases. Then scale the size that was *measured* instead of the limit of now (`scale_measured`).

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 3. 1 - e = 0.15 at once; late, the roots of z^2 - z + e have absolute value sqrt(e) =
# 0.92 and are complex: it swings, and needs 28 steps for a tenth. Scaling what was measured gives
# the first ratio back, every other step.
e = 1 - 1.5 / TARGET
print("at once", 1 - e, "late", abs(np.roots([1, -1, e])))
cured = control(TARGET, 1, True)
print([round(size) for size in cured[:14]])
assert abs(cured[12] / ideal - 1) < 1e-2 < max(abs(size / ideal - 1) for size in late[12:])

# %% [markdown]
# ## 4. Half-computed prompts and a full pool
#
# Now blocks are finite. The tempting rule: admit a prompt if there is a block for its first chunk,
# and share the budget evenly among those who run.


# %%
def serve(lengths: list[int], pool: int, budget: int, *, room_for_all: bool, urgent: bool) -> str:
    """Prompts of so many blocks, `budget` blocks a step, in order of urgency or shared evenly."""
    waiting, running, free = list(range(len(lengths))), {}, pool
    for _ in range(100):
        left, advanced = budget, False

        def advance(name: int, most: int) -> None:
            nonlocal free, left, advanced
            take = min(most, left, lengths[name] - running[name], free)
            running[name] += take
            free, left, advanced = free - take, left - take, advanced or take > 0

        for name in list(running):
            advance(name, budget if urgent else budget // 3)
        while waiting and left > 0 and len(running) < 3:
            if free < (lengths[waiting[0]] if room_for_all else 1):
                break
            running[waiting[0]] = 0
            advance(waiting.pop(0), budget if urgent else budget // 3)
        for name in [name for name, size in running.items() if size == lengths[name]]:
            free += running.pop(name)  # complete; let it end at once
        if not running and not waiting:
            return "all served"
        if not advanced:
            return f"stuck: {running} of {lengths} blocks, {free} free"
    return "never ends"


tempting = serve([100, 100, 100], pool=150, budget=30, room_for_all=False, urgent=False)
print(tempting)
assert tempting.startswith("stuck")

# %% [markdown]
# **Exercise 4.** Now admit only prompts that fit whole into what is free (`room_for_all`). Why does
# it still get stuck, and what does order (`urgent`) change?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 4. What is free now is taken later: all three are admitted while hardly a block is taken.
# In order of urgency the first takes the whole budget until it is complete, and nobody is admitted
# meanwhile; when the next one is, the first holds all it will need for its prompt. What decodes
# take afterwards they may have to give back: that is preemption.
for urgent in (False, True):
    result = serve([100, 100, 100], pool=150, budget=30, room_for_all=True, urgent=urgent)
    print(f"urgent first {urgent}: {result}")
    assert result.startswith("all" if urgent else "stuck")

# %% [markdown]
# ## 5. A toy GPU, late as a real one
#
# `launch` puts work into a queue, the stream. It is done later, in order: when the host waits, and
# not before. Copies from the host's memory are such work too: they read that memory *when they are
# done*.
#
# The model: keys are the tokens themselves, in blocks of 4 slots. The next token is a sum over the
# sequence's cache, so a single wrong slot changes everything behind it. A token divisible by 13
# ends a sequence.


# %%
BLOCK, PLACES, POISON = 4, 64, 10**6


class Stream:
    """Work in order, done when somebody waits for it."""

    def __init__(self) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        self._done = self._queued = 0

    def launch(self, job: Callable[[], None]) -> int:
        self._queue.append(job)
        self._queued += 1
        return self._queued

    def wait(self, number: int) -> None:
        while self._done < number:
            self._queue.popleft()()
            self._done += 1


class ToyGPU:
    """A cache, a pool of tokens by row, a buffer for a step's integers."""

    def __init__(self, num_buffers: int) -> None:
        self.stream = Stream()
        self.cache = np.full(PLACES * BLOCK, POISON)
        self.token_pool = np.zeros(PLACES, dtype=int)
        self.hosts = [np.zeros((PLACES, 4 + PLACES), dtype=int) for _ in range(num_buffers)]
        self.results = [np.zeros(PLACES, dtype=int) for _ in range(2)]
        self.packed = np.zeros_like(self.hosts[0])

    def step(self, rows: list[tuple[int, int, int, list[int]]]) -> tuple[int, np.ndarray]:
        """(row, position, token or -1, block table) of each decode; returns event and result."""
        self.hosts.append(self.hosts.pop(0))
        self.results.reverse()
        host, result, count = self.hosts[0], self.results[0], len(rows)
        for i, (row, position, token, table) in enumerate(rows):
            host[i, :4] = row, position, token, len(table)
            host[i, 4 : 4 + len(table)] = table

        def compute() -> None:
            self.packed[:] = host  # the copy: it reads the host's memory now
            for i in range(count):
                row, position, token, width = self.packed[i, :4]
                table = self.packed[i, 4 : 4 + width]
                token = self.token_pool[row] if token < 0 else token
                slots = np.repeat(table, BLOCK) * BLOCK + np.tile(np.arange(BLOCK), width)
                self.cache[slots[position]] = token
                keys = self.cache[slots[: position + 1]]
                new = int((keys * np.arange(1, len(keys) + 1)).sum() * 7 + position) % 101
                self.token_pool[row] = result[i] = new

        return self.stream.launch(compute), result


# %% [markdown]
# The engine: up to 4 sequences of one prompt token each; blocks are taken when needed and given
# back when the end is read. With `overlap`, a step is launched before the one before it is read.
# `pending` counts tokens that are being sampled.


# %%
@dataclass
class Sequence:
    row: int
    tokens: list[int]
    table: list[int] = field(default_factory=list)
    computed: int = 0
    pending: int = 0
    ended: bool = False


def generate(
    first_tokens: list[int], *, overlap: bool, buffers: int = 2, limit: int = 24,
    free_twice: bool = False,
) -> tuple[list[list[int]], int]:
    """The tokens of each sequence, and how many were sampled for nobody."""
    gpu, free = ToyGPU(buffers), list(range(PLACES))
    waiting = [Sequence(row, [token]) for row, token in enumerate(first_tokens)]
    everyone, running, launched, for_nobody = list(waiting), [], deque(), 0

    def read() -> None:
        nonlocal for_nobody
        step, (event, result) = launched.popleft()
        gpu.stream.wait(event)
        for sequence, token in zip(step, result.tolist(), strict=False):
            sequence.pending -= 1
            if sequence.ended:
                for_nobody += 1
                if free_twice:
                    free[:0] = sequence.table  # the bug
                continue
            sequence.tokens.append(token)
            if token % 13 == 0 or len(sequence.tokens) > limit:
                sequence.ended = True
                running.remove(sequence)
                free[:0] = sequence.table  # the next one to need a block gets these

    while waiting or running or launched:
        while waiting and len(running) < 4:
            running.append(waiting.pop(0))
        step, rows = [], []
        for s in running:
            known = len(s.tokens)
            if known + s.pending - s.computed != 1 or known + s.pending > limit:
                continue
            if s.computed % BLOCK == 0:
                s.table.append(free.pop(0))
            token = s.tokens[s.computed] if s.computed < known else -1
            rows.append((s.row, s.computed, token, list(s.table)))
            s.computed += 1  # counted when scheduled
            s.pending += 1
            step.append(s)
        if step:
            launched.append((step, gpu.step(rows)))
        while len(launched) > (1 if overlap and step else 0):
            read()
    return [s.tokens for s in everyone], for_nobody


FIRST = [3, 17, 29, 31, 44, 51, 58, 60, 71, 75, 83, 97]
plain, wasted = generate(FIRST, overlap=False)
assert wasted == 0
overlapped, wasted = generate(FIRST, overlap=True)
assert overlapped == plain
ends = sum(tokens[-1] % 13 == 0 and len(tokens) <= 24 for tokens in plain)
print(f"{len(FIRST)} sequences, {sum(map(len, plain)) - len(FIRST)} tokens; overlapped the same,"
      f" and {wasted} for nobody ({ends} ended by a stop token before the limit)")
assert wasted == ends

# %% [markdown]
# Blocks are freed while the step with one token too many is still in the queue, and the next
# sequence gets exactly these blocks. Still every token is right: the new owner's writes stand
# behind the late one in the stream, and nobody reads a slot that it has not filled.
#
# **Exercise 5.** Take one host buffer instead of two. Predict: what goes wrong without overlap, and
# what with it?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 5. Without overlap nothing: the host waits for each step before it packs the next one.
# With overlap step N is done when the host waits for it, after N+1 has been packed into the same
# memory: it computes N+1's positions, with a token of N-1.
assert generate(FIRST, overlap=False, buffers=1)[0] == plain
torn, _ = generate(FIRST, overlap=True, buffers=1)
print(sum(a != b for a, b in zip(torn, plain, strict=True)), "of", len(plain), "sequences differ")
assert torn != plain

# %% [markdown]
# **Exercise 6.** `free_twice` gives the blocks back a second time when the token too many is read.
# Why are the tokens wrong, and why would a test with a single sequence not notice?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 6. A block is in the list twice, two sequences get it, and each writes over the other's
# keys. A sequence by itself has nobody to share with.
twice, _ = generate(FIRST * 3, overlap=True, free_twice=True)
right, _ = generate(FIRST * 3, overlap=False)
print(sum(a != b for a, b in zip(twice, right, strict=True)), "of", len(right), "sequences differ")
assert twice != right
assert generate(FIRST[:1], overlap=True, free_twice=True)[0] == plain[:1]

# %% [markdown]
# **Exercise 7.** The host works h ms on a step and the GPU g. How long does a step take one after
# the other, and how long overlapped? When does a second step ahead help?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 7. h + g against max(h, g). With steady h and g a second step ahead wins nothing. It
# helps when h varies: work is hidden up to the length of the steps that are queued.


def mean_step(h: list[float], g: float, ahead: int) -> float:
    """ms a step, if the host may be so many steps ahead of what it has read."""
    host = gpu = 0.0
    ends: list[float] = []
    for i, cost in enumerate(h):
        if i > ahead:
            host = max(host, ends[i - 1 - ahead])
        host += cost
        gpu = max(gpu, host) + g
        ends.append(gpu)
    return gpu / len(h)


even, uneven = [0.5] * 1000, ([0.1] * 9 + [4.1]) * 100
for name, h in (("even", even), ("uneven", uneven)):
    print(name, [round(mean_step(h, 1.5, ahead), 2) for ahead in (0, 1, 2)])
assert mean_step(even, 1.5, 1) < 1.51 < mean_step(even, 1.5, 0)

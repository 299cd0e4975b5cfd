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
# # Continuous batching, rebuilt step by step
#
# This notebook goes with [note 2](02_continuous_batching.md). It asks what a batch is worth, lets
# three policies serve the same requests, builds a scheduler with queues and preemption, and puts
# prompts of unequal lengths into one tensor without a special case. Plain Python and a model of two
# layers, some seconds on the CPU. Each step ends with an exercise whose solution is the cell below
# it.
#
# ```bash
# make notebooks                                              # opens JupyterLab
# MPLBACKEND=Agg python learn/02_continuous_batching.py       # or as a plain script
# ```
#
# B is the number of requests in a step, S the tokens of context of each.

# %%
from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
import torch

from common.attention import causal_mask, masked_attention
from common.checkpoint import load_model, open_checkpoint
from m2_batching import LLM, SamplingParams

torch.set_grad_enabled(False)
plt.rcParams["figure.constrained_layout.use"] = True

# %% [markdown]
# ## 1. What a batch is worth
#
# A decode step reads the weights once and everyone's keys and values once. Qwen3-0.6B in bfloat16
# on an H200's data sheet: 1.19 GB of weights, 114,688 bytes for a token of context, 4.8 TB/s.

# %%
WEIGHTS, TOKEN, READ = 1_192_099_840, 114_688, 4.8e12


def step_seconds(batch: int, context: int) -> float:
    return (WEIGHTS + batch * context * TOKEN) / READ


batches = [2**i for i in range(11)]
plt.figure(figsize=(7, 3.6))
for context, colour in ((128, "#1d3557"), (1024, "#2a9d8f"), (4096, "#e76f51")):
    rates = [batch / step_seconds(batch, context) for batch in batches]
    plt.loglog(batches, rates, "o-", color=colour, label=f"{context} tokens of context")
    plt.axhline(READ / (context * TOKEN), color=colour, linestyle=":")
plt.xlabel("requests in a step")
plt.ylabel("tokens per second at most")
plt.legend()
plt.show()
for batch in (1, 8, 64, 256):
    seconds = step_seconds(batch, 1024)
    print(f"B {batch:3}: {1e6 * seconds:5.0f} us a step, {batch / seconds:7,.0f} tokens/s")

# %% [markdown]
# **Exercise 1.** The dotted lines are where throughput tends to. At which batch is half of it
# reached, for a context of 128, 1,024 and 4,096? What does a longer context do to both?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 1. Where the caches weigh as much as the weights: B S = 10,394 tokens. So after 81, 10
# and 2.5 requests. A longer context lowers the limit and brings it nearer: with long contexts
# batching is soon over.
for context in (128, 1024, 4096):
    half = WEIGHTS / TOKEN / context
    rate, limit = half / step_seconds(half, context), READ / (context * TOKEN)
    print(f"S {context:4}: half of {limit:,.0f} tokens/s at B = {half:.1f}")
    assert math.isclose(rate, limit / 2)

# %% [markdown]
# ## 2. Three policies
#
# Eight requests with an arrival and a number of tokens to make; four can run at a time. *Static*
# takes four and runs until the longest is done. *Dynamic* also starts when the oldest has waited
# for two steps. *Continuous* chooses anew before every step. (A prompt is free here.)

# %%
ARRIVALS = [0, 0, 1, 3, 4, 5, 7, 9]
OUTPUTS = [3, 9, 5, 12, 4, 7, 2, 6]
SLOTS = 4
Timeline = list[list[int]]  # who computes a token in each step


def fixed_batches(arrivals: Sequence[int], outputs: Sequence[int], patience: float) -> Timeline:
    """Static batches, or dynamic ones if patience ends before four are there."""
    steps: Timeline = []
    queue = list(range(len(outputs)))
    while queue:
        now = len(steps)
        here = [r for r in queue if arrivals[r] <= now]
        full = len(here) >= min(SLOTS, len(queue))
        if not here or not (full or now - arrivals[here[0]] >= patience):
            steps.append([])
            continue
        batch = here[:SLOTS]
        queue = [r for r in queue if r not in batch]
        for i in range(max(outputs[r] for r in batch)):
            steps.append([r for r in batch if i < outputs[r]])
    return steps


def continuous(arrivals: Sequence[int], outputs: Sequence[int]) -> Timeline:
    steps: Timeline = []
    left = list(outputs)
    while any(left):
        here = [r for r in range(len(left)) if arrivals[r] <= len(steps) and left[r]]
        steps.append(here[:SLOTS])
        for r in steps[-1]:
            left[r] -= 1
    return steps


policies = {
    "static": fixed_batches(ARRIVALS, OUTPUTS, math.inf),
    "dynamic": fixed_batches(ARRIVALS, OUTPUTS, 2),
    "continuous": continuous(ARRIVALS, OUTPUTS),
}
figure, axes = plt.subplots(3, 1, figsize=(9, 6), sharex=True)
for axis, (name, steps) in zip(axes, policies.items(), strict=True):
    for step, batch in enumerate(steps):
        axis.bar([step] * len(batch), 0.8, 0.9, [r - 0.4 for r in batch], color="#2a9d8f")
    axis.plot([a - 0.5 for a in ARRIVALS], range(8), "k|", markersize=9)
    axis.set_ylim(7.6, -0.6)
    axis.set_yticks(range(8), "ABCDEFGH")
    axis.set_title(f"{name}: {len(steps)} steps", fontsize=10)
    done = [max(i for i, batch in enumerate(steps) if r in batch) + 1 for r in range(8)]
    waits = [d - a - o for d, a, o in zip(done, ARRIVALS, OUTPUTS, strict=True)]
    print(f"{name:10} {len(steps)} steps, waited {sum(waits) / 8:.1f} on average: {waits}")
axes[2].set_xlabel("step (the tick is the arrival)")
plt.show()
assert len(policies["continuous"]) < len(policies["static"])
assert all(sum(map(len, steps)) == sum(OUTPUTS) for steps in policies.values())

# %% [markdown]
# Starting early is no cure: a dynamic batch leaves with a free seat, and who just misses it waits
# for all of it. Only who may join and leave in the middle waits for nothing but a slot.
#
# **Exercise 2.** Everyone is there from the start and outputs are uniform from 1 to N. What share
# of a static batch's rows is useful, for B rows? And if the lengths are exponential?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 2. Mean over the expected maximum of B. Uniform: (N/2) / (N B/(B+1)) = (B+1)/(2B), never
# below a half. Exponential: 1 / (1 + 1/2 + ... + 1/B), which goes on falling: a few long answers
# keep everybody. Continuous batching loses only at the end, whatever the distribution.
rng = np.random.default_rng(0)
for rows in (4, 8, 32):
    uniform = rng.random((20_000, rows))
    exponential = rng.exponential(size=(20_000, rows))
    shares = [x.mean() / x.max(1).mean() for x in (uniform, exponential)]
    harmonic = sum(1 / i for i in range(1, rows + 1))
    print(f"B {rows:2}: uniform {shares[0]:.3f}, exponential {shares[1]:.3f}")
    assert abs(shares[0] - (rows + 1) / (2 * rows)) < 0.01
    assert abs(shares[1] - 1 / harmonic) < 0.01

# %% [markdown]
# ## 3. A scheduler
#
# Two lists: waiting, sorted by urgency, and running. A step either computes the prompts of
# newcomers or one token of everyone who runs; newcomers go first. A more urgent newcomer may take
# the place of a less urgent one, which keeps its tokens and computes them again later.


# %%
@dataclass(eq=False)  # two requests are never the same, however alike they are
class Request:
    priority: int
    arrival: int
    name: str = ""
    output: int = 1
    made: int = 0
    times: list[int] = field(default_factory=list)


class Scheduler:
    def __init__(self, slots: int, order: Callable[[Request], tuple] | None = None) -> None:
        self.slots = slots
        self.order = order or (lambda r: (r.priority, r.arrival))
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self.now = 0

    def add(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=self.order)

    def make_room(self, request: Request) -> bool:
        if len(self.running) < self.slots:
            return True
        victim = max(self.running, key=self.order)
        if self.order(victim)[0] <= self.order(request)[0]:  # never for one's equals
            return False
        self.running.remove(victim)
        self.add(victim)
        self.preemptions += 1
        return True

    def step(self) -> tuple[str, list[Request]]:
        """What is computed, and for whom; each of them gets a token."""
        self.now += 1
        self.waiting.sort(key=self.order)
        admitted = []
        while self.waiting and len(admitted) < self.slots:
            request = self.waiting[0]
            if not self.make_room(request):
                break
            self.waiting.remove(request)
            admitted.append(request)
            self.running.append(request)
        batch = admitted or list(self.running)
        for request in batch:
            request.made += 1
            request.times.append(self.now)
            if request.made == request.output:
                self.running.remove(request)
        return ("prefill" if admitted else "decode"), batch


scheduler = Scheduler(slots=2)
arriving = {
    1: [Request(0, 1, "A", 6), Request(0, 1, "B", 3)],
    3: [Request(0, 3, "C", 4)],
    7: [Request(-1, 7, "U", 2)],
}
for step in range(1, 10):
    for request in arriving.get(step, []):
        scheduler.add(request)
    kind, batch = scheduler.step()
    names = " ".join(r.name for r in batch)
    waiting = " ".join(r.name for r in scheduler.waiting)
    print(f"step {step:2}: {kind:7} {names:4} waiting {waiting or '-'}")
assert scheduler.preemptions == 1
assert not scheduler.waiting
assert not scheduler.running

# %% [markdown]
# **Exercise 3.** In `make_room`, let a request preempt its equals as well (`<` for `<=`). Three
# requests of priority 0 in two slots: what happens?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 3. The newest runs, throws out the one behind it in the order, which then is the newcomer
# and throws out the next: every step is a prefill, of the same few. Work is lost without end, and
# in a real engine each of these prefills is longer than the last.


class Rude(Scheduler):
    def make_room(self, request: Request) -> bool:
        if len(self.running) >= self.slots:
            self.add(self.running.pop(0))
            self.preemptions += 1
        return True


counts = {}
for kind in (Scheduler, Rude):
    scheduler = kind(slots=2)
    for i in range(3):
        scheduler.add(Request(0, i, "ABC"[i], 40))
    prefills = sum(scheduler.step()[0] == "prefill" for _ in range(40))
    counts[kind.__name__] = prefills
    print(f"{kind.__name__}: {prefills} prefills in 40 steps, {scheduler.preemptions} preempted")
assert counts["Rude"] == 40 > 3 >= counts["Scheduler"]

# %% [markdown]
# ## 4. Waiting lines
#
# Requests arrive at random, a fraction of what the engine can serve. How long do they wait for
# their first token? And Little's law: requests inside = arrivals per step x steps inside.


# %%
def queue(rate: float, num_requests: int = 400, slots: int = 8) -> tuple[float, float, float]:
    """(mean number inside, mean steps inside, mean steps to the first token)."""
    rng = random.Random(1)
    scheduler, requests, clock = Scheduler(slots), [], 0.0
    for i in range(num_requests):
        clock += rng.expovariate(rate)
        requests.append(Request(0, math.ceil(clock), str(i), rng.randint(5, 33)))
    coming, inside = list(requests), 0
    while coming or scheduler.waiting or scheduler.running:
        while coming and coming[0].arrival <= scheduler.now:
            scheduler.add(coming.pop(0))
        inside += len(scheduler.waiting) + len(scheduler.running)
        scheduler.step()
    spent = sum(r.times[-1] - r.arrival for r in requests) / num_requests
    first = sum(r.times[0] - r.arrival for r in requests) / num_requests
    return inside / scheduler.now, spent, first


rates = [0.05, 0.1, 0.15, 0.2, 0.24, 0.27, 0.29, 0.3]
found = [queue(rate) for rate in rates]
plt.figure(figsize=(7, 3.4))
plt.plot(rates, [first for _, _, first in found], "o-", color="#e76f51", label="to the first token")
plt.plot(rates, [spent for _, spent, _ in found], "o-", color="#1d3557", label="inside")
plt.xlabel("requests that arrive per step")
plt.ylabel("steps")
plt.legend()
plt.show()
for rate, (inside, spent, first) in zip(rates, found, strict=True):
    print(f"{rate:.2f} per step: {inside:5.2f} inside, {first:5.1f} steps to the first token")
    served = 400 / (400 / rate + spent)  # the last one leaves some time after it has arrived
    assert abs(inside / (served * spent) - 1) < 0.15

# %% [markdown]
# **Exercise 4.** Outputs are 19 tokens on average, eight slots. Why is the engine full at about 0.3
# requests per step and not at 8 / 19 = 0.42?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 4. A prefill halts everybody: a request costs one step of its own and 18 decodes shared
# by eight, 1 + 18 / 8 = 3.25 steps of the engine. A quarter of the capacity goes into pauses; m5
# puts prompts and decodes into one step and gets it back.
capacity = 1 / (1 + 18 / 8)
print(f"{capacity:.3f} requests per step")
assert rates[-1] < capacity < 8 / 19
assert found[-1][2] > 5 * found[0][2]

# %% [markdown]
# ## 5. Unequal lengths in one tensor
#
# A real model now, of two layers with random weights: what matters is that its tokens depend on the
# whole context. Prompts are padded behind to the longest. Positions count on, and the causal mask
# is all there is: a real token never sees what stands behind it.

# %%
checkpoint = open_checkpoint("random:tiny-llama")
model = load_model(checkpoint, dtype=torch.float32, device="cpu", max_positions=512)


def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """ids and positions [B, T] -> logits [B, T, V]; every row sees itself only."""
    mask = causal_mask(positions, ids.shape[1])
    return model.compute_logits(
        model(ids, positions, lambda _, q, k, v: masked_attention(q, k, v, mask))
    )


rng = random.Random(2)
prompts = [[rng.randrange(256) for _ in range(length)] for length in (3, 11, 7)]
alone = [logits(torch.tensor([p]), torch.arange(len(p))[None])[0, -1] for p in prompts]

longest = max(map(len, prompts))
padded = torch.tensor([p + [p[-1]] * (longest - len(p)) for p in prompts])
together = logits(padded, torch.arange(longest).expand(3, -1))
for row, p in enumerate(prompts):
    difference = (together[row, len(p) - 1] - alone[row]).abs().max().item()
    print(f"{len(p):2} tokens in a row of {longest}: largest difference {difference:.1e}")
    assert difference < 1e-4
waste = 1 - sum(map(len, prompts)) / padded.numel()
print(f"{waste:.0%} of the rows computed are padding")

# %% [markdown]
# **Exercise 5.** Pad in front instead, with positions 0, 1, 2, ... from the row's beginning. What
# is wrong? And which two things would mend it?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 5. The tokens stand at the wrong positions, and they see the padding. Positions that
# begin behind the padding do not suffice: the mask must hide it as well. Behind, both come for
# free.
front = torch.tensor([[p[-1]] * (longest - len(p)) + p for p in prompts])
wrong = logits(front, torch.arange(longest).expand(3, -1))[:, -1]
print([f"{(wrong[i] - alone[i]).abs().max():.1e}" for i in range(3)])
assert (wrong[0] - alone[0]).abs().max() > 0.1
assert (wrong[1] - alone[1]).abs().max() < 1e-4  # the longest has no padding

# %% [markdown]
# **Exercise 6.** A slot of the cache behind a row's tokens holds a NaN that an earlier request
# left. The mask hides it. Is the row safe?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 6. No. The mask makes the weight 0, and 0 x NaN is NaN. Masked is not unread: m2 wipes a
# slot in which NaN was written, m3's reference clears what it gathers beyond the context.
q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8)
v[0, 3] = math.nan
mask = torch.tensor([[[True, True, True, False]]])
print("with NaN in a masked value:", masked_attention(q, k, v, mask).isnan().any().item())
assert masked_attention(q, k, v, mask).isnan().any()
assert not masked_attention(q, k, v.nan_to_num(0.0), mask).isnan().any()

# %% [markdown]
# ## 6. Slots without holes
#
# m2 keeps running sequences in slots 0 to n-1, so that the batch is a slice of the cache. When
# slots grow, everybody moves to the right. The cache is one line of memory:


# %%
def grow(
    memory: Sequence[str], lengths: Sequence[int], old: int, new: int, order: Sequence[int]
) -> str:
    """Move sequences from slots of one length to longer ones, one after the other."""
    memory = list(memory)
    for slot in order:
        source, target = slot * old, slot * new
        memory[target : target + lengths[slot]] = memory[source : source + lengths[slot]]
    return "".join("".join(memory[i * new : i * new + n]) for i, n in enumerate(lengths))


lengths = (4, 4, 3)
memory = [*"aaaabbbbccc.", *"............"]
expected = "aaaabbbbccc"
moved = grow(memory, lengths, 4, 8, order=(2, 1, 0))
print("the last one first: ", moved)
assert moved == expected

# %% [markdown]
# **Exercise 7.** What do the sequences hold if the first one moves first? What would a user see?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 7. Slot 1 goes to where slot 2 still is: sequence c then holds b's keys and values. Its
# user reads the continuation of somebody else's text, with no error anywhere.
broken = grow(memory, lengths, 4, 8, order=(0, 1, 2))
print("the first one first:", broken)
assert broken == "aaaabbbbbbb"

# %% [markdown]
# ## 7. The engine itself
#
# The same four requests with memory for all, and with too little: sequences outgrow their slots,
# somebody is preempted, and computed again later. The tokens do not change.

# %%
params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
prompts = [[rng.randrange(256) for _ in range(length)] for length in (12, 17, 9, 15)]
results = {}
for num_tokens in (512, 128):
    llm = LLM(
        "random:tiny-llama", device="cpu", dtype="float32", max_num_seqs=4,
        num_kv_tokens=num_tokens, max_model_len=128,
    )  # fmt: skip
    outputs = llm.generate(prompts, params)
    stats = llm.engine.stats()
    results[num_tokens] = [output.outputs[0].token_ids for output in outputs]
    steps, preempted = stats["num_steps"], stats["num_preemptions"]
    print(f"cache of {num_tokens}: {steps} steps, {preempted} preempted,"
          f" {stats['num_forward_tokens']} tokens computed")
    if num_tokens == 512:
        assert stats["num_preemptions"] == 0
assert stats["num_preemptions"] > 0
assert results[512] == results[128]

# %% [markdown]
# **Exercise 8.** An urgent request of eight tokens arrives every four steps, and a patient one of
# priority 1 needs 20 tokens; two slots. When is it done? Change `order` so that waiting makes
# urgent.

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 8. After the last urgent one: the two slots are never free. With ageing (a level for
# every 30 steps since the arrival) the patient one becomes as urgent as they are and is no longer
# thrown out. It is late, and it is served.


def patient(ageing: float) -> int:
    """The step in which the patient one is done."""
    scheduler = Scheduler(2)
    if ageing:
        scheduler.order = lambda r: (
            r.priority - int((scheduler.now - r.arrival) / ageing), r.arrival,
        )  # fmt: skip
    waits = Request(1, 0, "patient", 20)
    scheduler.add(waits)
    while len(waits.times) < 20:
        if scheduler.now % 4 == 0 and scheduler.now < 200:
            scheduler.add(Request(0, scheduler.now, "urgent", 8))
        scheduler.step()
    return waits.times[-1]


without, with_ageing = patient(0), patient(30)
print(f"without ageing in step {without}, with it in step {with_ageing}")
assert with_ageing < 150 < 200 < without

# %% [markdown]
# ## What is missing
#
# m2 has a second limit, tokens per step, and aborts, stop strings and errors that end one request
# and leave the others alone. What it wastes is memory: slots as long as the longest sequence.
# [Note 3](03_paged_kv_cache.md) hands it out in blocks.

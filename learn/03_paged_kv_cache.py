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
# # A paged KV cache, rebuilt step by step
#
# This notebook goes with [note 3](03_paged_kv_cache.md). It counts where memory goes when every
# sequence gets one piece, cuts the cache into blocks, reads scattered blocks as if they were one
# piece, lets samples share a prompt until they write, and cuts a long context into pieces that are
# computed apart. Each step adds one idea, checks it, and ends with an exercise whose solution is
# the cell below it. Some seconds on the CPU.
#
# ```bash
# make notebooks                                          # opens JupyterLab
# MPLBACKEND=Agg python learn/03_paged_kv_cache.py        # or as a plain script
# ```
#
# A *slot* holds the keys and values of one token. A block holds `SIZE` slots.

# %%
from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import m2_batching
import m3_paged

torch.manual_seed(0)
plt.rcParams["figure.constrained_layout.use"] = True
SIZE = 16

# %% [markdown]
# ## 1. Where memory goes
#
# A cache of 8,192 slots; 200 requests wait. Each step every running sequence grows by one token. A
# sequence gets one piece of memory for its whole life, of a size that `reserve` decides, in the
# first hole that is large enough. Or it gets blocks as it grows.


# %%
@dataclass(eq=False)
class Request:
    prompt: int
    output: int
    length: int = 0
    start: int = 0  # of its piece
    room: int = 0  # size of its piece, or of its blocks

    @property
    def final(self) -> int:
        return self.prompt + self.output


def workload(seed: int = 0, count: int = 200) -> list[Request]:
    rng = random.Random(seed)
    return [Request(rng.randint(50, 400), rng.randint(50, 400)) for _ in range(count)]


def first_hole(running: list[Request], size: int, slots: int) -> int | None:
    """Where a piece fits between those that are taken."""
    at = 0
    for sequence in sorted(running, key=lambda s: s.start):
        if sequence.start - at >= size:
            return at
        at = sequence.start + sequence.room
    return at if slots - at >= size else None


def in_pieces(reserve: Callable[[Request], int], slots: int = 8192) -> dict[str, float]:
    """Shares of the cache, averaged over the steps in which somebody waits."""
    waiting, running, seen = workload(), [], []
    while waiting:
        while waiting:
            sequence = waiting[0]
            start = first_hole(running, reserve(sequence), slots)
            if start is None:
                break
            sequence.start, sequence.room = start, reserve(sequence)
            sequence.length = sequence.prompt
            running.append(waiting.pop(0))
        seen.append(shares(running, slots))
        for sequence in running:
            sequence.length += 1
        running = [s for s in running if s.length < s.final]
    return mean(seen)


def in_blocks(size: int = SIZE, slots: int = 8192) -> dict[str, float]:
    """Blocks as they are needed. Who finds none gives its own back and waits again."""
    waiting, running, seen = workload(), [], []
    blocks = slots // size

    def taken() -> int:
        return sum(s.room for s in running) // size

    while waiting:
        while waiting and taken() + math.ceil(waiting[0].prompt / size) + 8 <= blocks:
            sequence = waiting.pop(0)
            sequence.length = max(sequence.length, sequence.prompt)
            sequence.room = math.ceil(sequence.length / size) * size
            running.append(sequence)
        seen.append(shares(running, slots))
        for sequence in list(running):
            if sequence.length == sequence.room:
                if taken() == blocks:
                    waiting.insert(0, running.pop())  # the last one that came
                    if sequence not in running:
                        continue
                sequence.room += size
            sequence.length += 1
        running = [s for s in running if s.length < s.final]
    return mean(seen)


def shares(running: list[Request], slots: int) -> dict[str, float]:
    used = sum(s.length for s in running)
    later = sum(min(s.final, s.room) - s.length for s in running)
    never = sum(s.room - min(s.final, s.room) for s in running)
    parts = {"used": used, "later": later, "never": never, "free": slots - used - later - never}
    return {"at once": len(running), **{name: part / slots for name, part in parts.items()}}


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


ways = {
    "reserve 1,024": in_pieces(lambda s: 1024),
    "a power of two": in_pieces(lambda s: 2 ** math.ceil(math.log2(s.final))),
    "exactly (an oracle)": in_pieces(lambda s: s.final),
    "blocks of 16": in_blocks(),
}
figure, axis = plt.subplots(figsize=(8, 3))
left = [0.0] * len(ways)
colours = {"used": "#2a9d8f", "later": "#e9c46a", "never": "#e76f51", "free": "#d9dde4"}
for name, colour in colours.items():
    widths = [way[name] for way in ways.values()]
    axis.barh(list(ways), widths, left=left, color=colour, label=name)
    left = [a + b for a, b in zip(left, widths, strict=True)]
axis.invert_yaxis()
axis.set_xlabel("share of the cache")
axis.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.25))
plt.show()
for name, way in ways.items():
    print(f"{name:20} {way['at once']:5.1f} at once, {way['used']:.1%} used")
assert ways["blocks of 16"]["used"] > 0.9 > 0.75 > ways["exactly (an oracle)"]["used"]

# %% [markdown]
# **Exercise 1.** Even the oracle, which knows how long each answer will be, uses less than three
# quarters. Which two kinds of loss are left, and why has the block cache neither?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 1. Slots for later (the piece is as long as the sequence will once be), and free memory
# in holes that are too small for who comes next. Blocks are taken when they are needed, and all
# holes have the same size, so every one fits. What is left over lies in the last block of each.
oracle, blocks = ways["exactly (an oracle)"], ways["blocks of 16"]
print(f"later: {oracle['later']:.1%} and {blocks['later']:.1%}, free: {oracle['free']:.1%}"
      f" and {blocks['free']:.1%}")
assert oracle["later"] > 0.2 > 0.03 > blocks["later"]
assert blocks["at once"] > 1.3 * oracle["at once"]

# %% [markdown]
# ## 2. How large a block?
#
# A sequence of n tokens leaves `SIZE * ceil(n / SIZE) - n` slots empty: as it grows, (SIZE - 1) / 2
# on average.

# %%
sizes = [1, 4, 8, 16, 32, 64, 128, 256]
plt.figure(figsize=(7, 3.4))
for length, colour in ((30, "#e76f51"), (400, "#2a9d8f"), (4000, "#1d3557")):
    lengths = range(length // 2, 3 * length // 2)
    counted = [sum(lengths) / sum(b * math.ceil(n / b) for n in lengths) for b in sizes]
    predicted = [length / (length + (b - 1) / 2) for b in sizes]
    plt.semilogx(sizes, counted, "o", base=2, color=colour, label=f"about {length} tokens")
    plt.semilogx(sizes, predicted, ":", base=2, color=colour)
    assert abs(counted[3] - predicted[3]) < 0.03
plt.xlabel("tokens of a block")
plt.ylabel("share of slots that hold a token")
plt.legend()
plt.show()

# %% [markdown]
# **Exercise 2.** Blocks of one token waste nothing. What speaks against them? And how long must
# sequences be on average for blocks of 16 to be 96 % full?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 2. A table with an entry for each token, and reads in pieces of one token: a kernel needs
# an address before it can read, and long contiguous pieces are what memory is fast at. 96 %: S / (S
# + 7.5) = 0.96, S = 180.
enough = next(s for s in range(1, 1000) if s / (s + (SIZE - 1) / 2) >= 0.96)
print(enough, "tokens")
assert enough == 180

# %% [markdown]
# ## 3. The pool: ids and counts


# %%
class Pool:
    """Blocks by number, each with a count of those who hold it."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = list(range(num_blocks))[::-1]  # a stack: pop and append take O(1)

    def allocate(self) -> int:
        block = self.free.pop()
        self.counts[block] = 1
        return block

    def share(self, block: int) -> None:
        self.counts[block] += 1

    def release(self, block: int) -> None:
        if self.counts[block] == 0:
            raise RuntimeError(f"block {block} was released twice")
        self.counts[block] -= 1
        if self.counts[block] == 0:
            self.free.append(block)


pool = Pool(4)
one, two = pool.allocate(), pool.allocate()
pool.share(one)
pool.release(one)
print("free:", pool.free, "counts:", pool.counts)
assert pool.counts == [1, 1, 0, 0]

# %% [markdown]
# **Exercise 3.** Take the check out of `release` and release a block twice. Who notices, and when?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 3. Nobody, until two sequences hold the block and each writes its own tokens over the
# other's: an answer that drifts into a stranger's, some minutes after the fault. So it must be an
# error at once.


class Trusting(Pool):
    def release(self, block: int) -> None:
        self.counts[block] -= 1
        if self.counts[block] <= 0:
            self.free.append(block)


pool = Trusting(4)
block = pool.allocate()
pool.release(block)
pool.release(block)
owners = pool.allocate(), pool.allocate()
print("two owners got blocks", owners)
assert owners[0] == owners[1]

# %% [markdown]
# ## 4. Tables: scattered blocks read as one piece
#
# Token i of a sequence lives in block `table[i // SIZE]` at offset `i % SIZE`. Its *slot* is the
# block times SIZE plus the offset. Writing goes by slots, reading by tables.

# %%
HEADS, DIM = 2, 8
keys, values = torch.full((2, 12, SIZE, HEADS, DIM), math.nan)  # nobody has written anything yet


def slots_of(table: Sequence[int], start: int, end: int) -> Tensor:
    """The slots of tokens start to end."""
    places = torch.arange(start, end)
    return torch.tensor(table)[places // SIZE] * SIZE + places % SIZE


def write(k: Tensor, v: Tensor, slots: Tensor) -> None:
    """k and v [T, heads, DIM] into their slots [T]."""
    keys.flatten(0, 1)[slots] = k
    values.flatten(0, 1)[slots] = v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query [heads, DIM] sees all of k and v [S, heads, DIM]."""
    scores = torch.einsum("hd,shd->hs", q, k) / math.sqrt(DIM)
    return torch.einsum("hs,shd->hd", scores.softmax(-1), v)


def paged_attention(q: Tensor, table: Sequence[int], length: int) -> Tensor:
    blocks = torch.tensor(table)
    k, v = (cache[blocks].flatten(0, 1)[:length] for cache in (keys, values))
    return attention(q, k, v)


tables = {"A": [7, 2, 9], "B": [4, 11]}
lengths = {"A": 37, "B": 20}
plain = {}
for name, table in tables.items():
    k, v = torch.randn(2, lengths[name], HEADS, DIM)
    plain[name] = k, v
    write(k, v, slots_of(table, 0, lengths[name]))
print("slots of A's tokens 14 to 18:", slots_of(tables["A"], 14, 19).tolist())
q = torch.randn(HEADS, DIM)
for name, table in tables.items():
    difference = (paged_attention(q, table, lengths[name]) - attention(q, *plain[name])).abs().max()
    print(f"{name}: largest difference to one piece {difference:.1e}")
    assert difference < 1e-5

# %% [markdown]
# **Exercise 4.** A batch's tables are put into a rectangle as wide as the longest, and a mask hides
# what lies beyond each context. With which filler, and is the mask enough?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 4. Any valid number will do as filler, none that is out of range. The mask is not enough:
# slots beyond the context hold what somebody left there, here NaN, and a weight of 0 times NaN is
# NaN. Clear what was gathered, or do not read it.
k, v = (cache[torch.tensor([4, 11, 0])].flatten(0, 1) for cache in (keys, values))
scores = torch.einsum("hd,shd->hs", q, k) / math.sqrt(DIM)
scores[:, lengths["B"] :] = -math.inf  # the mask
masked = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
v[lengths["B"] :] = 0
cleared = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
print("masked:", masked[0, :3].tolist(), "cleared:", cleared[0, :3].tolist())
assert masked.isnan().all()
torch.testing.assert_close(cleared, attention(q, *plain["B"]))

# %% [markdown]
# ## 5. When the pool runs dry
#
# Nobody has reserved the block that a sequence needs next, so it may not be there. Then the last
# one that came gives all of its blocks back and is computed again later. A newcomer leaves a share
# of the pool free, the *watermark*, so that this does not happen in the next step.


# %%
def serve(watermark: float, num_blocks: int = 512) -> tuple[int, int, float]:
    """(steps, preemptions, share of prefilled tokens that were computed before)."""
    waiting, running = workload(1, 120), []
    steps = preempted = prefilled = again = 0
    free = num_blocks
    while waiting or running:
        steps += 1
        admitted = []
        while waiting:
            needed = math.ceil(max(waiting[0].length, waiting[0].prompt) / SIZE)
            if needed > free - (watermark * num_blocks if running else 0):
                break
            sequence = waiting.pop(0)
            again += sequence.length
            sequence.length = max(sequence.length, sequence.prompt)
            prefilled += sequence.length
            sequence.room, free = needed * SIZE, free - needed
            admitted.append(sequence)
            running.append(sequence)
        if admitted:
            continue  # a step of prompts
        for sequence in list(running):
            if sequence not in running:
                continue
            if sequence.length == sequence.room:
                while not free and sequence in running:
                    victim = running.pop()
                    free, victim.room = free + victim.room // SIZE, 0
                    waiting.insert(0, victim)
                    preempted += 1
                if sequence not in running:
                    continue
                sequence.room, free = sequence.room + SIZE, free - 1
            sequence.length += 1
        for sequence in [s for s in running if s.length >= s.final]:
            running.remove(sequence)
            free += sequence.room // SIZE
    return steps, preempted, again / prefilled


marks = [0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
found = [serve(mark) for mark in marks]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
axes[0].plot([100 * m for m in marks], [p for _, p, _ in found], "o-", color="#e76f51")
axes[0].set_ylabel("preemptions")
axes[1].plot([100 * m for m in marks], [s for s, _, _ in found], "o-", color="#1d3557")
axes[1].set_ylabel("steps")
for axis in axes:
    axis.set_xlabel("watermark, percent of the pool")
plt.show()
for mark, (steps, preempted, again) in zip(marks, found, strict=True):
    print(f"{mark:5.1%}: {steps} steps, {preempted:3} preempted, {again:.1%} computed again")
assert found[0][1] > 5 * found[4][1]
assert min(steps for steps, _, _ in found) < found[-1][0]  # too much of it costs steps

# %% [markdown]
# **Exercise 5.** How many steps does a watermark of five percent last? Why do steps increase again
# beyond that? And which rule of this scheduler makes sure that somebody always gets on?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 5. About 20 sequences run, and each takes a block every 16 steps: 1.3 blocks a step. Five
# percent are 25 blocks, enough for 20 steps, in which others finish. More of it is memory that
# stands empty. The sequence that came first is never a victim before all others are, so it
# finishes; then the next one is the first. (One sequence alone must fit: an engine checks that when
# a request arrives.)
print(f"{20 / SIZE:.2f} blocks a step, {0.05 * 512 / (20 / SIZE):.0f} steps")

# %% [markdown]
# ## 6. Samples share a prompt until they write
#
# `n` samples of one prompt get the same table. Who writes into a block that others hold copies it
# first.


# %%
@dataclass
class Cache:
    """What each block holds is kept as text, to be seen."""

    pool: Pool
    memory: list[list[str]] = field(default_factory=list)
    copies: int = 0

    def __post_init__(self) -> None:
        self.memory = [[""] * SIZE for _ in self.pool.counts]

    def append(self, table: list[int], length: int, token: str) -> None:
        """Write token number ``length`` of a sequence."""
        place = length // SIZE
        if place == len(table):
            table.append(self.pool.allocate())
        elif self.pool.counts[table[place]] > 1:
            copy = self.pool.allocate()
            self.memory[copy] = list(self.memory[table[place]])
            self.pool.release(table[place])
            table[place] = copy
            self.copies += 1
        self.memory[table[place]][length % SIZE] = token

    def fork(self, table: list[int]) -> list[int]:
        for block in table:
            self.pool.share(block)
        return list(table)

    def read(self, table: list[int], length: int) -> list[str]:
        return [token for block in table for token in self.memory[block]][:length]


def sample(prompt: int, n: int, output: int) -> tuple[Cache, list[list[str]]]:
    cache = Cache(Pool(400))
    first: list[int] = []
    for i in range(prompt):
        cache.append(first, i, f"p{i}")
    samples = [first, *(cache.fork(first) for _ in range(n - 1))]
    for i in range(prompt, prompt + output):
        for name, table in enumerate(samples):
            cache.append(table, i, f"{name}:{i}")
    return cache, [cache.read(table, prompt + output) for table in samples]


cache, texts = sample(prompt=500, n=8, output=100)
expected = [
    [f"p{i}" for i in range(500)] + [f"{name}:{i}" for i in range(500, 600)] for name in range(8)
]
assert texts == expected
used = sum(count > 0 for count in cache.pool.counts)
print(f"{used} blocks instead of {8 * math.ceil(600 / SIZE)}, {cache.copies} copies")
assert (used, cache.copies) == (87, 7)

# %% [markdown]
# **Exercise 6.** Seven copies for eight samples: who does not copy? How many copies does a prompt
# of 512 tokens need? And what do the samples say if nobody copies?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 6. The last one finds itself alone and writes in place. 512 tokens fill their last block:
# nobody ever writes to it, so no copy. Without copies all samples write to the same slots of the
# prompt's last block, and each reads what the last one wrote there.


class Careless(Cache):
    def append(self, table: list[int], length: int, token: str) -> None:
        counts, self.pool.counts = self.pool.counts, [1] * len(self.pool.counts)
        super().append(table, length, token)
        self.pool.counts = counts


assert sample(prompt=512, n=8, output=10)[0].copies == 0
cache = Careless(Pool(10))
table: list[int] = []
for i in range(20):
    cache.append(table, i, f"p{i}")
other = cache.fork(table)
for i in (20, 21):
    cache.append(table, i, f"0:{i}")
    cache.append(other, i, f"1:{i}")
print("sample 0 reads", cache.read(table, 22)[-3:])
assert cache.read(table, 22)[-2:] == ["1:20", "1:21"]

# %% [markdown]
# ## 7. A long context in pieces
#
# One sequence gives a GPU with 132 processors work for 8 of them (one for each KV head). So the
# context is cut, each piece is computed apart, and the results are merged: each weighs as much as
# the sum of its exponentials.


# %%
def piece(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to a part of the context, and the log of its sum of exponentials [heads]."""
    scores = torch.einsum("hd,shd->hs", q, k) / math.sqrt(DIM)
    return attention(q, k, v), scores.logsumexp(-1)


def merge(outs: Tensor, logs: Tensor) -> Tensor:
    """outs [pieces, heads, DIM], logs [pieces, heads]."""
    weights = (logs - logs.max(0).values).exp()
    return (weights[..., None] * outs).sum(0) / weights.sum(0)[..., None]


k, v = torch.randn(2, 1000, HEADS, DIM, dtype=torch.float64) * 3
q = torch.randn(HEADS, DIM, dtype=torch.float64)
parts = [piece(q, *both) for both in zip(k.split(300), v.split(300), strict=True)]
outs, logs = (torch.stack(column) for column in zip(*parts, strict=True))
error = (merge(outs, logs) - attention(q, k, v)).abs().max().item()
print(f"four pieces, the last one shorter: error {error:.1e}")
assert error < 1e-12

# %% [markdown]
# **Exercise 7.** Somebody averages the pieces instead. How wrong is that? And how must an *empty*
# piece look, so that it changes nothing?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 7. As wrong as the pieces are unequal: a piece whose keys fit nothing counts as much as
# one that has the answer. An empty piece has a log of -inf (the sum of no exponentials is 0) and
# any finite result; its weight is 0.
average = (outs.mean(0) - attention(q, k, v)).abs().max().item()
empty = torch.cat([outs, torch.zeros_like(outs[:1])]), torch.cat([logs, logs[:1] * 0 - math.inf])
print(f"averaged: error {average:.2f}")
assert average > 0.1
assert torch.equal(merge(*empty), merge(outs, logs))

# %% [markdown]
# ## 8. The engines in the same memory
#
# m2 with slots of one length, m3 with blocks; a model of two layers with random weights, the same
# 24 requests, 1,024 slots each.

# %%
rng = random.Random(3)
prompts = [[rng.randrange(256) for _ in range(rng.randint(10, 120))] for _ in range(24)]
results = {}
for milestone, options in (
    (m2_batching, {"num_kv_tokens": 1024}),
    (m3_paged, {"num_kv_blocks": 1024 // SIZE, "block_size": SIZE}),
):
    llm = milestone.LLM(
        "random:tiny-llama", device="cpu", dtype="float32", max_model_len=256, max_num_seqs=24,
        **options,
    )  # fmt: skip
    params = milestone.SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    results[milestone.__name__] = tokens, llm.engine.stats()
    stats = llm.engine.stats()
    print(f"{milestone.__name__:12} {stats['num_steps']:3} steps, at most"
          f" {stats['num_running_peak']:2} at once, {stats['kv_utilization']:.1%} of what it holds"
          f" is used, {stats['num_preemptions']} preempted")
(tokens2, stats2), (tokens3, stats3) = results.values()
assert tokens2 == tokens3
assert stats3["kv_utilization"] > stats2["kv_utilization"]
assert stats3["num_steps"] < stats2["num_steps"]

# %% [markdown]
# **Exercise 8.** Eight samples of one prompt of 100 tokens. Predict how many prompt tokens each of
# the two engines computes.

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 8. m2 computes the prompt for each sample, 800 tokens. m3 computes it once and takes the
# row of logits of its last token eight times.
for milestone, expected_tokens in ((m2_batching, 800), (m3_paged, 100)):
    llm = milestone.LLM("random:tiny-llama", device="cpu", dtype="float32", max_model_len=256)
    params = milestone.SamplingParams(n=8, max_tokens=4, ignore_eos=True, seed=1)
    llm.generate([[i % 256 for i in range(100)]], params)
    computed = llm.engine.stats()["num_prompt_tokens"]
    print(f"{milestone.__name__}: {computed} prompt tokens")
    assert computed == expected_tokens

# %% [markdown]
# ## What is missing
#
# m3's kernels do steps 4 and 7 on the GPU, in Triton and in CUDA C++, without copying a block
# first. [Note 3](03_paged_kv_cache.md) walks through them. Prompts still attend under a mask, and
# every step is launched kernel by kernel: [note 4](04_flash_attention.md).

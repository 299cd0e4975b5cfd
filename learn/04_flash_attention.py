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
# # Flash attention, rebuilt step by step
#
# This notebook goes with [note 4](04_flash_attention.md). It starts from the textbook formula and
# ends with a Triton kernel, on the CPU, in some seconds. Each step adds one idea, checks it against
# the formula in float64, and ends with an exercise whose solution is the cell below it.
#
# ```bash
# make notebooks                                         # opens JupyterLab
# MPLBACKEND=Agg python learn/04_flash_attention.py      # or as a plain script
# ```
#
# Shape letters: T queries, S keys, D head size, Hq and Hkv query and key/value heads, G = Hq / Hkv,
# B sequences.

# %%
# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers)
import heapq
import math
import os
from collections.abc import Callable, Sequence

os.environ.setdefault("TRITON_INTERPRET", "1")  # for the last step, before triton is imported

import matplotlib.pyplot as plt
import torch
from torch import Tensor

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
LOG2_E = math.log2(math.e)


def check(ours: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Say how far apart two results are, and refuse more than rounding."""
    assert ours.isfinite().all(), "there is a NaN or an infinity"
    error = (ours - expected).abs().max().item()
    assert error < tolerance, error
    print(f"largest difference {error:.1e}")


# %% [markdown]
# ## 1. The textbook, and the memory it takes
#
# `softmax(q kᵀ / sqrt(D)) v`. We say who sees whom by a position per query: row i sees the keys
# 0 to `positions[i]`. One rule then serves a whole prompt (`0, 1, 2, ...`), a prompt that continues
# a cached context (`S - T, ..., S - 1`), a decode step (`S - 1`), and a row of padding (-1: it sees
# nothing, and we want zeros for it).


# %%
def textbook(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """q [T, D], k and v [S, D], positions [T] -> [T, D]; holds T x S scores."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    visible = torch.arange(len(k)) <= positions[:, None]
    scores = scores.masked_fill(~visible, -math.inf)
    return torch.softmax(scores, dim=1).nan_to_num(0.0) @ v  # a row of -inf gives NaN: zeros


T, S, D = 200, 333, 32
q, k, v = torch.randn(T, D), torch.randn(S, D), torch.randn(S, D)
positions = S - T + torch.arange(T)  # the last T of S tokens are new
expected = textbook(q, k, v, positions)
sdpa = torch.nn.functional.scaled_dot_product_attention
mask = torch.arange(S) <= positions[:, None]
check(expected, sdpa(q[None], k[None], v[None], attn_mask=mask[None])[0])

# One layer of Qwen3-0.6B (Hq 16, Hkv 8, D 128): q, k, v and the output in bfloat16, scores in
# float32, as SDPA without a fused kernel keeps them.
print("\n tokens   q, k, v, out   scores of one layer")
for tokens in (128, 512, 2048, 8192, 32768):
    operands = 2 * tokens * 128 * (2 * 16 + 2 * 8)
    scores = 4 * 16 * tokens**2
    print(f"{tokens:7} {operands / 1e6:11.1f} MB {scores / 1e6:18,.1f} MB")

# %% [markdown]
# **Exercise 1.** From which length on do the scores take more memory than everything else? And why
# is it the *traffic* that hurts, even when they fit?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 1. 64 T^2 bytes of scores against 12,288 T bytes of operands: from T = 192 on. Each score
# is written by the first product, read and written by the softmax, read by the second product: 16
# bytes through memory for 4 D = 512 FLOPs. That is 32 FLOPs per byte, where an H200 needs 178.
print(12_288 / 64, "tokens;", 4 * 128 / 16, "FLOPs per byte")

# %% [markdown]
# ## 2. Softmax, safely, in passes
#
# `exp(s)` overflows in float32 from s = 89 on. Subtracting the maximum changes nothing (numerator
# and denominator shrink alike) and makes every exponent at most 0. But the maximum is known only
# after all scores have been seen. So: one pass for the maximum, one for the sum, one for the
# result.


# %%
def softmax_three_passes(scores: Tensor) -> Tensor:
    maximum, total = -math.inf, 0.0
    for s in scores.tolist():
        maximum = max(maximum, s)
    for s in scores.tolist():
        total += math.exp(s - maximum)
    return torch.tensor([math.exp(s - maximum) / total for s in scores.tolist()])


scores = 10 * torch.randn(300)
check(softmax_three_passes(scores), torch.softmax(scores, 0))
naive = (1000 * torch.ones(3)).exp()
print("without the maximum:", (naive / naive.sum()).tolist())

# %% [markdown]
# **Exercise 2.** Attention wants `softmax(scores) @ values`, not the softmax. Which of the three
# passes can then be merged without any trick?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 2. The last two: sum the weights and the weighted values together, and divide at the end.
# One division per output replaces one per score.
values = torch.randn(300, 4)
maximum, total, weighted = scores.max(), 0.0, torch.zeros(4)
for s, value in zip(scores, values, strict=True):
    weight = torch.exp(s - maximum)
    total, weighted = total + weight, weighted + weight * value
check(weighted / total, torch.softmax(scores, 0) @ values)

# %% [markdown]
# ## 3. Online softmax: one pass
#
# Keep the maximum *so far* and the sums relative to it. When the maximum grows from m to m', every
# term so far is too large by the same factor, so one multiplication mends them all:
#
# $$ l' = l \, 2^{m - m'} + 2^{s - m'} \qquad o' = o \, 2^{m - m'} + 2^{s - m'} v $$
#
# Kernels use powers of two: the GPU has an instruction for them, and `exp(x) = 2^(x log2 e)` costs
# nothing when log2 e is multiplied into the scale beforehand.


# %%
def online(scores: Tensor, values: Tensor) -> Tensor:
    """softmax(scores [S]) @ values [S, D] in one pass over both."""
    maximum, total, weighted = -math.inf, 0.0, torch.zeros(values.shape[1])
    for s, value in zip((scores * LOG2_E).tolist(), values, strict=True):
        new_maximum = max(maximum, s)
        shrink, weight = 2.0 ** (maximum - new_maximum), 2.0 ** (s - new_maximum)
        total = total * shrink + weight
        weighted = weighted * shrink + weight * value
        maximum = new_maximum
    return weighted / total


check(online(scores, values), torch.softmax(scores, 0) @ values)
check(online(100 * scores, values), torch.softmax(100 * scores, 0) @ values)

# %% [markdown]
# Two such states, of two sets of keys, merge into the state of their union. The operation is
# associative and commutative, and `(-inf, 0, 0)` is neutral. So the keys may be taken in any order
# and in any grouping: tiles in a loop (step 4), pieces on different processors (step 7).

# %%
State = tuple[Tensor, Tensor, Tensor]  # maximum [], total [], weighted [D]
NEUTRAL: State = (torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(4))


def state_of(scores: Tensor, values: Tensor) -> State:
    maximum = scores.max()
    weights = torch.exp2(scores - maximum)
    return maximum, weights.sum(), weights @ values


def merge(a: State, b: State) -> State:
    maximum = torch.maximum(a[0], b[0])
    if maximum == -math.inf:  # -inf - -inf is NaN: two empty sets need a case of their own
        return NEUTRAL
    shrink_a, shrink_b = torch.exp2(a[0] - maximum), torch.exp2(b[0] - maximum)
    return maximum, a[1] * shrink_a + b[1] * shrink_b, a[2] * shrink_a + b[2] * shrink_b


scores2 = scores * LOG2_E
a, b, c = (state_of(scores2[i::3], values[i::3]) for i in range(3))
left, right = merge(merge(a, b), c), merge(c, merge(NEUTRAL, merge(b, a)))
check(left[2] / left[1], right[2] / right[1])
check(left[2] / left[1], torch.softmax(scores, 0) @ values)

# %% [markdown]
# **Exercise 3.** A bug: forget to rescale `weighted` (but not `total`). For which inputs does the
# result stay right, and what does that say about a test with random inputs and short contexts?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 3. It stays right whenever the maximum does not grow after the first key (or, in a tiled
# kernel, after the first *tile*): a test whose context fits into one tile never rescales anything.
# So test with scores that grow along the context, over several tiles.


def online_with_bug(scores: Tensor, values: Tensor) -> Tensor:
    maximum, total, weighted = -math.inf, 0.0, torch.zeros(values.shape[1])
    for s, value in zip((scores * LOG2_E).tolist(), values, strict=True):
        new_maximum = max(maximum, s)
        total = total * 2.0 ** (maximum - new_maximum) + 2.0 ** (s - new_maximum)
        weighted = weighted + 2.0 ** (s - new_maximum) * value  # the bug
        maximum = new_maximum
    return weighted / total


for name, order in (("falling", scores.argsort(descending=True)), ("rising", scores.argsort())):
    error = online_with_bug(scores[order], values[order]) - torch.softmax(scores, 0) @ values
    print(f"scores {name}: error {error.abs().max():.1e}")

# %% [markdown]
# ## 4. Tiles: the loop of the kernel
#
# A processor's fast memory holds a tile of queries with their states, and one tile of keys and
# values at a time. This is the loop of every flash attention kernel, ours included; only the loads
# differ. Matrix units do the two products, so the state belongs to a whole tile: maximum and total
# are `[TILE_Q]`, weighted is `[TILE_Q, D]`.


# %%
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, tile_q: int = 64, tile_k: int = 48
) -> Tensor:
    """As ``textbook``; never holds more than tile_q x tile_k scores."""
    out = torch.empty_like(q)
    scale = LOG2_E / math.sqrt(q.shape[1])
    for first in range(0, len(q), tile_q):  # on a GPU: one program each, at the same time
        rows = slice(first, first + tile_q)
        q_tile, limit = q[rows], positions[rows]
        maximum = torch.full((len(q_tile),), -math.inf)
        total = torch.zeros(len(q_tile))
        weighted = torch.zeros_like(q_tile)
        for start in range(0, int(limit.max()) + 1, tile_k):  # keys nobody here sees: never read
            k_tile, v_tile = k[start : start + tile_k], v[start : start + tile_k]
            scores = q_tile @ k_tile.T * scale
            key = start + torch.arange(len(k_tile))
            scores = scores.masked_fill(key > limit[:, None], -math.inf)
            new_maximum = torch.maximum(maximum, scores.max(1).values)
            safe = new_maximum.clamp(min=-1e30)  # a row that has seen nothing yet: no -inf - -inf
            weights = torch.exp2(scores - safe[:, None])
            shrink = torch.exp2(maximum - safe)
            total = total * shrink + weights.sum(1)
            weighted = weighted * shrink[:, None] + weights @ v_tile
            maximum = new_maximum
        out[rows] = weighted / torch.where(total > 0, total, 1.0)[:, None]
    return out


check(flash_attention(q, k, v, positions), expected)
check(flash_attention(q[-1:], k, v, positions[-1:]), expected[-1:])  # a decode step
check(flash_attention(q, k, v, positions, tile_q=7, tile_k=1), expected)
padded = torch.cat([positions[:5], torch.full((3,), -1)])  # three rows of padding
check(flash_attention(q[:8], k, v, padded)[5:], torch.zeros(3, D))

# %% [markdown]
# **Exercise 4.** Remove the `safe` line (use `new_maximum` in both places). Predict which of the
# four calls above fail, then try.

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 4. Only the padded one. Every real row sees key 0, and the loop begins there, so after
# the first tile its maximum is finite for good. A row of padding has seen nothing: -inf - -inf is
# NaN, in its weights and in its total, and the last line cannot save it. A sliding window, or a
# split that begins in the middle, brings the same danger to real rows.
rows = torch.tensor([-math.inf, 0.5])
print("exp2(-inf - -inf) =", torch.exp2(rows - rows).tolist())


# %% [markdown]
# ## 5. Causal tiles: skipped, full, masked
#
# Three kinds of tiles: above the diagonal (never visited), below it (no mask needed), and on it.
# Only the last kind pays for comparing positions.


# %%
def kinds_of_tiles(positions: Tensor, num_keys: int, tile_q: int, tile_k: int) -> Tensor:
    """[query tiles, key tiles]: 0 skipped, 1 full, 2 masked."""
    kinds = torch.zeros(-(-len(positions) // tile_q), -(-num_keys // tile_k))
    for i, limit in enumerate(positions.split(tile_q)):
        for j in range(kinds.shape[1]):
            first, last = j * tile_k, min((j + 1) * tile_k, num_keys) - 1
            kinds[i, j] = 0 if first > limit.max() else 1 if last <= limit.min() else 2
    return kinds


prompt = kinds_of_tiles(torch.arange(2048), 2048, 128, 128)
chunk = kinds_of_tiles(1024 + torch.arange(1024), 2048, 128, 128)
figure, axes = plt.subplots(1, 2, figsize=(9, 4))
for axis, kinds, title in ((axes[0], prompt, "a prompt of 2,048 tokens"),
                           (axes[1], chunk, "1,024 new tokens after 1,024 cached")):
    axis.imshow(kinds, cmap="YlGnBu", vmin=0, vmax=2)
    counts = [int((kinds == kind).sum()) for kind in range(3)]
    axis.set_title(f"{title}\nskipped {counts[0]}, full {counts[1]}, masked {counts[2]}")
    axis.set_xlabel("key tile")
    axis.set_ylabel("query tile")
plt.show()
assert [(prompt == kind).sum() for kind in range(3)] == [120, 120, 16]

# %% [markdown]
# **Exercise 5.** A causal prompt of n x n tiles computes n (n + 1) / 2 of them. How much of that
# work is wasted on masked-out scores, and what does it say about the tile size for short prompts?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 5. Useful scores: T (T + 1) / 2; computed: n (n + 1) / 2 tiles of b^2. About 1 / (n + 1)
# is wasted: half of it with a single tile, 1 % at 8,192 tokens. Short prompts want small tiles, for
# this and because large ones give too few programs.
for length in (128, 512, 2048, 8192):
    for tile in (64, 128):
        n = length // tile
        wasted = 1 - length * (length + 1) / (n * (n + 1) * tile**2)
        print(f"{length:5} tokens, tiles of {tile:3}: {wasted:5.1%} wasted")

# %% [markdown]
# ## 6. Counting what moves
#
# A toy machine: a slow memory that counts, and a fast one of M values. `load` and `store` are the
# only ways between them, and `holds` refuses what does not fit. Both algorithms really compute.


# %%
class Machine:
    """Counts values that cross between slow and fast memory; fast memory holds ``fast`` values."""

    def __init__(self, fast: int) -> None:
        self.fast = fast
        self.moved = 0

    def load(self, x: Tensor) -> Tensor:
        self.moved += x.numel()
        return x.clone()

    def store(self, target: Tensor, x: Tensor) -> None:
        self.moved += x.numel()
        target.copy_(x)

    def holds(self, *tensors: Tensor) -> None:
        if sum(x.numel() for x in tensors) > self.fast:
            raise MemoryError(f"{sum(x.numel() for x in tensors)} values into {self.fast}")


def standard_on(machine: Machine, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three operations; scores and weights go through slow memory.

    Generous: the products get each operand once, as if fast memory could hold k and v.
    """
    scores, out = torch.empty(len(q), len(k)), torch.empty_like(q)
    k_here = machine.load(k)
    for i, row in enumerate(q):
        machine.store(scores[i], k_here @ machine.load(row) / math.sqrt(q.shape[1]))
    for row in scores:
        machine.store(row, torch.softmax(machine.load(row), 0))
    v_here = machine.load(v)
    for i, row in enumerate(scores):
        machine.store(out[i], machine.load(row) @ v_here)
    return out


def flash_on(
    machine: Machine, q: Tensor, k: Tensor, v: Tensor, tile_q: int, tile_k: int
) -> Tensor:
    """Query tiles stay, keys and values stream past: the order of FlashAttention-2."""
    out = torch.empty_like(q)
    scale = LOG2_E / math.sqrt(q.shape[1])
    for first in range(0, len(q), tile_q):
        q_tile = machine.load(q[first : first + tile_q])
        maximum = torch.full((len(q_tile), 1), -math.inf)
        total, weighted = torch.zeros(len(q_tile), 1), torch.zeros_like(q_tile)
        for start in range(0, len(k), tile_k):
            k_tile = machine.load(k[start : start + tile_k])
            v_tile = machine.load(v[start : start + tile_k])
            scores = q_tile @ k_tile.T * scale
            machine.holds(q_tile, weighted, maximum, total, k_tile, v_tile, scores)
            new_maximum = torch.maximum(maximum, scores.amax(1, keepdim=True))
            weights, shrink = torch.exp2(scores - new_maximum), torch.exp2(maximum - new_maximum)
            total = total * shrink + weights.sum(1, keepdim=True)
            weighted = weighted * shrink + weights @ v_tile
            maximum = new_maximum
        machine.store(out[first : first + tile_q], weighted / total)
    return out


def largest_tile_q(fast: int, head_dim: int, tile_k: int) -> int:
    """Rows whose q, weighted, maximum, total and scores fit beside a tile of keys and values."""
    return (fast - 2 * tile_k * head_dim) // (2 * head_dim + 2 + tile_k)


N, d, TILE_K = 512, 16, 8
q6, k6, v6 = (torch.randn(N, d) for _ in range(3))
reference = torch.softmax(q6 @ k6.T / math.sqrt(d), 1) @ v6

machine = Machine(fast=2 * N * d)
check(standard_on(machine, q6, k6, v6), reference)
standard_moved = machine.moved
assert standard_moved == 4 * N * N + 4 * N * d  # write, read, write, read; q, k, v, out

sizes, moved = [512, 1024, 2048, 4096, 8192, 16384, 32768], []
for fast in sizes:
    machine = Machine(fast)
    tile_q = min(N, largest_tile_q(fast, d, TILE_K))
    ours = flash_on(machine, q6, k6, v6, tile_q, TILE_K)
    assert (ours - reference).abs().max() < 1e-12
    assert machine.moved == 2 * N * d + 2 * N * d * -(-N // tile_q)
    moved.append(machine.moved)
    print(f"M {fast:6}  tile_q {tile_q:4}  moved {machine.moved:9,}"
          f"  = {machine.moved / standard_moved:5.2f} of standard")

plt.figure(figsize=(7, 4.5))
plt.loglog(sizes, moved, "o-", label="tiled, counted")
plt.loglog(sizes, [4 * N**2 * d**2 / m for m in sizes], "--", label="4 N² d² / M")
plt.axhline(standard_moved, color="tab:red", label="standard: 4 N² + 4 N d")
plt.axhline(4 * N * d, color="tab:gray", linestyle=":", label="q, k, v and out once: 4 N d")
plt.axvline(d * d, color="tab:gray", linewidth=0.8)
plt.text(d * d * 1.05, 5e4, "M = d²")
plt.xlabel("fast memory M, values")
plt.ylabel("values moved")
plt.title(f"N = {N}, d = {d}")
plt.legend()
plt.show()

# %% [markdown]
# Doubling M halves the traffic until the inputs themselves are what remains. Nothing was said about
# bytes: the count depends on M, N and d only.
#
# **Exercise 6.** FlashAttention (2022) had the loops the other way round: a tile of *keys and
# values* stays, query tiles stream past, and their states go back to slow memory each time. Count
# its traffic by a formula for the same tile sizes. Which order is better, and which one would you
# want on a GPU with 132 processors?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 6. Keys and values once; for each key tile all of q is read, and the state of every query
# (D + 2 values) is read and written. With tiles of b rows either way:
#   keys stay:     2 N d + (N / b) (N d + 2 N (d + 2))      about 3 N^2 d / b
#   queries stay:  2 N d + (N / b) 2 N d                    about 2 N^2 d / b
# Queries that stay are better by a third. Above all, query tiles are independent: 132 processors
# can work on 132 of them. With keys outside they would all update the same states.
for b in (16, 64):
    keys_stay = 2 * N * d + (N // b) * (N * d + 2 * N * (d + 2))
    queries_stay = 2 * N * d + (N // b) * 2 * N * d
    print(f"b = {b}: keys stay {keys_stay:,}, queries stay {queries_stay:,}")


# %% [markdown]
# ## 7. Through a block table
#
# The keys of m3 and m4 do not lie behind each other: token t lives in block `table[t // 16]` at
# offset `t % 16`. Only the loads change. Everything outside the context is poisoned with NaN: a
# correct kernel never lets it in.


# %%
def paged(x: Tensor, num_blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """x [S, D] scattered over a pool [num_blocks, block_size, D] of NaN, and its block table."""
    pool = torch.full((num_blocks, block_size, x.shape[1]), math.nan)
    table = torch.randperm(num_blocks)[: -(-len(x) // block_size)]
    slots = table.repeat_interleave(block_size)[: len(x)] * block_size
    pool.view(-1, x.shape[1])[slots + torch.arange(len(x)) % block_size] = x
    return pool, table


def paged_decode(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, begin: int, end: int, tile: int = 32
) -> tuple[Tensor, Tensor]:
    """Queries [G, D] of one KV head over the keys begin to end - 1.

    Returns the output [G, D] of these keys alone and the log2 of their sum of exponentials [G].
    """
    block_size, width = k_pool.shape[1:]
    scale = LOG2_E / math.sqrt(width)
    maximum, total = torch.full((len(q),), -math.inf), torch.zeros(len(q))
    weighted = torch.zeros_like(q)
    for start in range(begin, end, tile):
        token = start + torch.arange(tile)
        inside = token < end
        # A table entry past the context is garbage: no id is followed that `inside` excludes.
        block = table[torch.where(inside, token // block_size, 0)]
        slot = block * block_size + token % block_size
        k_tile = k_pool.view(-1, width)[slot].masked_fill(~inside[:, None], 0.0)
        v_tile = v_pool.view(-1, width)[slot].masked_fill(~inside[:, None], 0.0)  # 0 * NaN is NaN
        scores = (q @ k_tile.T * scale).masked_fill(~inside, -math.inf)
        new_maximum = torch.maximum(maximum, scores.max(1).values)
        weights = torch.exp2(scores - new_maximum[:, None])
        shrink = torch.exp2(maximum - new_maximum)
        total = total * shrink + weights.sum(1)
        weighted = weighted * shrink[:, None] + weights @ v_tile
        maximum = new_maximum
    log_sum = maximum + torch.log2(total)  # -inf for no keys
    return weighted / torch.where(total > 0, total, 1.0)[:, None], log_sum


k_pool, table = paged(k, 40, 16)
v_pool = torch.full_like(k_pool, math.nan)
v_pool.view(-1, D)[(table.repeat_interleave(16)[:S] * 16 + torch.arange(S) % 16)] = v
out, _ = paged_decode(q[-1:], k_pool, v_pool, table, 0, S)
check(out, expected[-1:])

# %% [markdown]
# **Exercise 7.** The scores of tokens outside are masked to -inf, so their weight is 0. Why must
# their *values* be zeroed too? Show it.

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 7. The product multiplies every weight with its value, and 0 * NaN = NaN. In an engine
# the NaN is another user's overflow, left in a block that was handed on.
print("0 * NaN =", 0.0 * math.nan)

# %% [markdown]
# ## 8. Split the context, then combine (Flash-Decoding)
#
# A decode step has one query a sequence: a single tile, one program, one of 132 processors. The
# keys must be shared out instead. Each piece leaves an output and the log2 of its sum of
# exponentials, and the merge of step 3 puts them together.


# %%
def combine(outs: Sequence[Tensor], log_sums: Sequence[Tensor]) -> Tensor:
    """Outputs [G, D] of pieces, weighted by their sums of exponentials [G]."""
    log_sum = torch.stack(list(log_sums))  # [pieces, G]
    weights = torch.exp2(log_sum - log_sum.max(0).values)
    return (weights[..., None] * torch.stack(list(outs))).sum(0) / weights.sum(0)[:, None]


for pieces in (1, 2, 5, 16):
    chunk = -(-S // pieces)
    parts = [
        paged_decode(q[-1:], k_pool, v_pool, table, begin, min(begin + chunk, S))
        for begin in range(0, S, chunk)
    ]
    check(combine(*zip(*parts, strict=True)), expected[-1:])

# %% [markdown]
# **Exercise 8.** Give `combine` an empty piece (begin = end). What must hold for it to change
# nothing? What if *all* pieces are empty, as for a padded row of a batch?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 8. An empty piece has log_sum = -inf and weight exp2(-inf - finite) = 0; its output must
# be finite (we return 0 / 1 = 0), or 0 * NaN is back. All empty: -inf - -inf. The combine step
# needs the case by itself: a row without pieces writes zeros.
empty = paged_decode(q[-1:], k_pool, v_pool, table, 7, 7)
check(combine(*zip(empty, *parts, strict=True)), expected[-1:])
print("all pieces empty:", combine([empty[0]], [empty[1]])[0, :3].tolist())

# %% [markdown]
# ## 9. GQA: heads that share keys share a tile
#
# With G query heads for each KV head, the G queries of a token are G rows of the same tile: keys
# are read once for all of them. For a prompt, row r of the packed tile is head `r % G` of token
# `r // G`, and the causal rule looks at the token. `flash_attention` needs no change at all: it
# asks for a position per row.

# %%
G, tokens = 4, 50
q_heads = torch.randn(tokens, G, D)  # one KV head's queries
k9, v9 = torch.randn(tokens, D), torch.randn(tokens, D)
each = [textbook(q_heads[:, g], k9, v9, torch.arange(tokens)) for g in range(G)]
packed = flash_attention(
    q_heads.reshape(tokens * G, D), k9, v9, torch.arange(tokens).repeat_interleave(G), tile_q=64
)
check(packed.view(tokens, G, D), torch.stack(each, 1))

# %% [markdown]
# **Exercise 9.** One layer of Qwen3-0.6B decodes one token of a sequence with 4,096 cached ones.
# How many bytes of keys and values are read with and without packing, and how many FLOPs per byte
# are that?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 9. Packed: 2 S Hkv D bytes x 2. One program per *query* head reads everything G times.
S9, Hq, Hkv, width = 4096, 16, 8, 128
flops = 4 * S9 * Hq * width
for name, heads in (("packed", Hkv), ("one program a query head", Hq)):
    read = 2 * S9 * heads * width * 2
    print(f"{name}: {read / 1e6:.1f} MB, {flops / read:.0f} FLOPs per byte")


# %% [markdown]
# ## 10. A ragged batch: fixed splits against a work list
#
# 63 sequences of 200 tokens and one of 16,384. If the number of splits is chosen for the batch (64
# sequences x 8 heads fill the GPU, so: 1), the long one is a single program a head, and everybody
# waits for it. A *work list* cuts by tokens instead: an item is about `total / items` tokens, so
# the long sequence becomes many items and a short one stays whole. 66 items x 8 heads are 528
# programs, four for each of 132 multiprocessors.
#
# To see it we simulate the memory system with three numbers. All programs together get `TOTAL`
# bytes per second. One program alone gets at most `ALONE`, by Little's law: 32 KB in flight over a
# latency of 0.8 us are 40 GB/s. And each takes `START_UP` before it reads. They are assumptions of
# a plausible size, for the shape of the answer; measured times stand in the note.

# %%
TOTAL, ALONE = 4.4e12, 40e9  # bytes per second
RESIDENT = 132 * 4  # programs that run at the same time
START_UP = 2e-6  # seconds
TOKEN_BYTES = 2 * 128 * 2  # keys and values of one head


def simulate(sizes: Sequence[int]) -> tuple[float, list[tuple[float, float]]]:
    """Programs that read so many bytes each, started in order as places get free.

    All that read progress at the same speed, min(ALONE, TOTAL / reading). Returns the time at which
    the last one ends, and (time, bytes read by then) at every start and end.
    """
    now = all_bytes = 0.0
    progress = 0.0  # what a program that reads from the start has read by now
    starting: list[tuple[float, int]] = []  # when it begins to read, how much
    reading: list[float] = []  # the progress at which each ends
    waiting, trace = list(reversed(sizes)), [(0.0, 0.0)]
    while waiting or starting or reading:
        while waiting and len(starting) + len(reading) < RESIDENT:
            heapq.heappush(starting, (now + START_UP, waiting.pop()))
        speed = min(ALONE, TOTAL / max(1, len(reading)))
        end = now + (reading[0] - progress) / speed if reading else math.inf
        begin = starting[0][0] if starting else math.inf
        step = speed * (min(begin, end) - now)
        now, progress, all_bytes = min(begin, end), progress + step, all_bytes + step * len(reading)
        if begin <= end:
            heapq.heappush(reading, progress + heapq.heappop(starting)[1])
        else:
            heapq.heappop(reading)
        trace.append((now, all_bytes))
    return now, trace


def fixed_splits(lens: Sequence[int], num_kv_heads: int, num_splits: int) -> list[int]:
    """Tokens of each program when every sequence is cut into equally many pieces."""
    return [-(-n // num_splits) for n in lens for _ in range(num_kv_heads * num_splits)]


def work_list(lens: Sequence[int], num_kv_heads: int, items: int = 66) -> list[int]:
    """Tokens of each program when an item is about sum(lens) / items tokens; longest first."""
    wanted = max(128, -(-sum(lens) // items))
    pieces = [max(1, round(n / wanted)) for n in lens]
    sizes = [-(-n // p) for n, p in zip(lens, pieces, strict=True) for _ in range(p * num_kv_heads)]
    return sorted(sizes, reverse=True)


batches = {
    "63 x 200 and one of 16,384": [200] * 63 + [16384],
    "255 x 300 and one of 32,768": [300] * 255 + [32768],
    "64 x 1,024": [1024] * 64,
}
ways: dict[str, Callable[[Sequence[int]], list[int]]] = {
    "1 split": lambda lens: fixed_splits(lens, 8, 1),
    "8 splits": lambda lens: fixed_splits(lens, 8, 8),
    "work list": lambda lens: work_list(lens, 8),
}
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
times: dict[tuple[str, str], float] = {}
for axis, (name, lens) in zip(axes, batches.items(), strict=True):
    least = sum(lens) * 8 * TOKEN_BYTES / TOTAL
    print(f"{name}: at least {least * 1e6:.0f} us")
    for way, cut in ways.items():
        programs = cut(lens)
        seconds, trace = simulate([n * TOKEN_BYTES for n in programs])
        times[name, way] = seconds
        print(f"    {way:10} {len(programs):5} programs {seconds * 1e6:6.0f} us")
        axis.plot([t * 1e6 for t, _ in trace], [b / 1e6 for _, b in trace],
                  label=f"{way}: {seconds * 1e6:.0f} us")
    axis.set_title(name)
    axis.set_xlabel("us")
    axis.set_ylabel("MB read")
    axis.legend(loc="lower right")
plt.tight_layout()
plt.show()
skewed = "63 x 200 and one of 16,384"
assert times[skewed, "work list"] < times[skewed, "1 split"] / 2
assert times["64 x 1,024", "work list"] <= times["64 x 1,024", "8 splits"]

# %% [markdown]
# Where the blue line bends, only the long sequence is left: one program a head, at `ALONE`, while
# the rest of the GPU has nothing to do. On equal lengths the list is what a good fixed number of
# splits would be.
#
# **Exercise 10.** What is the *order* of the list worth? Run the second batch with the shortest
# items first, for 66 items and for 16. And why not simply cut everything into pieces of 128?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 10. An item that begins last ends last, and if it is a long one everybody else is done by
# then. Longest first is the rule LPT (Graham 1969): with jobs of fixed speed it ends at most a
# third later than the best plan. The coarser the items the more it matters. Pieces of 128 do as
# well here, but each leaves a partial result that the simulation forgets: for G = 2 heads 2 x 129
# floats, written and read again, 3 % of the 64 KB that the piece read, and a longer merge.
lens = batches["255 x 300 and one of 32,768"]
for items in (66, 16):
    programs = [n * TOKEN_BYTES for n in work_list(lens, 8, items)]
    forward, backward = simulate(programs)[0], simulate(programs[::-1])[0]
    print(f"{items} items: longest first {forward * 1e6:.0f} us, last {backward * 1e6:.0f} us")
small = [min(128, n - start) * TOKEN_BYTES for n in lens for start in range(0, n, 128)] * 8
print(f"pieces of 128: {len(small)} programs, {simulate(small)[0] * 1e6:.0f} us")

# %% [markdown]
# ## 11. The same in Triton
#
# Triton's interpreter runs a GPU kernel on the CPU, one program after the other. `tl.load` is the
# `load` of step 6, a program is one turn of the outer loop of step 4, and the loop over keys is the
# one you know. With this in your head, read `m4_flash/kernels/`.

# %%
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    print("triton is not installed here: nothing to do in this step")

if triton:

    @triton.jit
    def flash_kernel(
        q,  # [T, D]
        k,  # [S, D]
        v,  # [S, D]
        out,  # [T, D]
        num_queries,
        num_keys,
        scale_log2,  # softmax scale * log2(e)
        D: tl.constexpr,
        TILE_Q: tl.constexpr,
        TILE_K: tl.constexpr,
    ):
        row = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
        column = tl.arange(0, D)
        limit = num_keys - num_queries + row  # the last key that each row sees
        used = (row < num_queries)[:, None]
        query = tl.load(q + row[:, None] * D + column[None, :], mask=used, other=0.0)
        maximum = tl.full([TILE_Q], float("-inf"), tl.float32)
        total = tl.zeros([TILE_Q], tl.float32)
        weighted = tl.zeros([TILE_Q, D], tl.float32)
        end = tl.minimum(num_keys, num_keys - num_queries + (tl.program_id(0) + 1) * TILE_Q)
        for start in range(0, end, TILE_K):
            key_id = start + tl.arange(0, TILE_K)
            offset = key_id[:, None] * D + column[None, :]
            inside = (key_id < num_keys)[:, None]
            key = tl.load(k + offset, mask=inside, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
            # Rows past the last query see what the last one sees: no row is ever without a key.
            seen = (key_id[None, :] <= limit[:, None]) & (key_id < num_keys)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_maximum[:, None])
            shrink = tl.exp2(maximum - new_maximum)
            total = total * shrink + tl.sum(weights, axis=1)
            value = tl.load(v + offset, mask=inside, other=0.0)
            weighted = weighted * shrink[:, None] + tl.dot(weights, value, input_precision="ieee")
            maximum = new_maximum
        result = weighted / total[:, None]
        tl.store(out + row[:, None] * D + column[None, :], result, mask=used)

    q32, k32, v32 = (x.float().contiguous() for x in (q, k, v))
    out32 = torch.full_like(q32, math.nan)
    flash_kernel[(triton.cdiv(T, 64),)](
        q32, k32, v32, out32, T, S, LOG2_E / math.sqrt(D), D=D, TILE_Q=64, TILE_K=64
    )
    check(out32.double(), expected, tolerance=1e-5)

# %% [markdown]
# **Exercise 11.** T = 200 and TILE_Q = 64 leave a last tile of which 8 rows are real. Which masks
# of the kernel are there because of its other 56 rows, and what does each prevent?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 11. (1) The load of q: those rows would read what lies behind q, or fault. (2) The store
# of out: without it they overwrite what lies behind `out` in memory, silently. (3) `key_id <
# num_keys` in `seen`: their limit lies beyond the last key, so they would take in the zeros loaded
# there. That harms only rows that are thrown away; in a kernel without the causal rule the same
# mask protects the real rows.
print("kept rows of the last tile:", T % 64, "of 64")

# %% [markdown]
# ## What is missing
#
# The kernels of m4 do the same sums. What they add is for the machine: loads in flight while
# products run, tiles that fit its registers, tables and lengths read on the device so that one
# recorded graph serves every step, and the neighbours' work (norm, rotation, cache write) done on
# the way. [Note 4](04_flash_attention.md) goes through them.

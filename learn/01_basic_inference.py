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
# # One token at a time, rebuilt step by step
#
# This notebook goes with [note 1](01_basic_inference.md). It takes the weights of the default model
# and nothing else of this repository's engine, writes the forward pass in forty lines, generates
# without a cache, counts what that costs, and adds the cache. Then it draws tokens from logits.
# Each step adds one idea, checks it, and ends with an exercise whose solution is the cell below it.
# It runs on the CPU in some seconds.
#
# ```bash
# make notebooks                                          # opens JupyterLab
# MPLBACKEND=Agg python learn/01_basic_inference.py       # or as a plain script
# ```
#
# Shape letters: T tokens computed now, S context length, H hidden size, L layers, Hq and Hkv query
# and key/value heads, D head size, G = Hq / Hkv, V vocabulary.

# %%
from __future__ import annotations

import math
import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from common.attention import causal_self_attention
from common.checkpoint import load_model, open_checkpoint
from common.random import exponential_noise

torch.manual_seed(0)
torch.set_grad_enabled(False)
plt.rcParams["figure.constrained_layout.use"] = True

checkpoint = open_checkpoint("smollm2-135m-instruct")
config, tokenizer = checkpoint.config, checkpoint.tokenizer
weights = {name: tensor.float() for name, tensor in checkpoint.weights("cpu")}
L, Hq, Hkv, D = config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim
for name in ("embed_tokens.weight", "layers.0.self_attn.k_proj.weight", "norm.weight"):
    print(f"{name:34} {list(weights[f'model.{name}'].shape)}")
print(f"{sum(tensor.numel() for tensor in weights.values()):,} parameters")

# %% [markdown]
# ## 1. The forward pass
#
# Text becomes ids, each id picks a row of the embedding, thirty layers add to it, and the last row
# times the embedding again gives a score for every token of the vocabulary. Where keys and values
# live the model does not know: it calls `attend`.

# %%
ATTEND = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [T, heads, D] by angles that grow with the position [T]."""
    frequencies = config.rope.theta ** (-torch.arange(0, D, 2) / D)
    angles = positions[:, None, None] * frequencies
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def forward(ids: list[int], positions: Tensor, attend: ATTEND) -> Tensor:
    """ids of T tokens -> hidden [T, H] after the final norm."""
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(L):

        def linear(x: Tensor, name: str, layer: int = layer) -> Tensor:
            return x @ weights[f"model.layers.{layer}.{name}_proj.weight"].T

        normed = rms_norm(x, weights[f"model.layers.{layer}.input_layernorm.weight"])
        q = rope(linear(normed, "self_attn.q").view(-1, Hq, D), positions)
        k = rope(linear(normed, "self_attn.k").view(-1, Hkv, D), positions)
        v = linear(normed, "self_attn.v").view(-1, Hkv, D)
        x = x + linear(attend(layer, q, k, v).flatten(1), "self_attn.o")
        normed = rms_norm(x, weights[f"model.layers.{layer}.post_attention_layernorm.weight"])
        gated = F.silu(linear(normed, "mlp.gate")) * linear(normed, "mlp.up")
        x = x + linear(gated, "mlp.down")
    return rms_norm(x, weights["model.norm.weight"])


def logits_of(hidden: Tensor) -> Tensor:
    return hidden @ weights["model.embed_tokens.weight"].T  # tied: the embedding again


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """q [T, Hq, D] at positions [T] sees the keys k, v [S, Hkv, D] up to its own: [T, Hq, D]."""
    k, v = (x.repeat_interleave(Hq // Hkv, dim=1) for x in (k, v))  # G query heads share one
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(D)
    hidden = torch.arange(len(k)) > positions[:, None]
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


ids = tokenizer.encode("The sky is")
positions = torch.arange(len(ids))
hidden = forward(ids, positions, lambda _, q, k, v: attention(q, k, v, positions))
probabilities = logits_of(hidden[-1]).softmax(-1)
print("ids", ids, "hidden", list(hidden.shape))
for p, token in zip(*(x.tolist() for x in probabilities.topk(5)), strict=True):
    print(f"{p:6.3f} {tokenizer.decode([token])!r}")

model = load_model(checkpoint, dtype=torch.float32, device="cpu", max_positions=512)
ours = model(torch.tensor(ids), positions, lambda _, q, k, v: causal_self_attention(q, k, v))
print(f"largest difference to common/model.py: {(ours - hidden).abs().max():.1e}")
torch.testing.assert_close(ours, hidden, rtol=1e-3, atol=1e-3)

# %% [markdown]
# **Exercise 1.** `rope` turns q and k by angles that depend on where they stand. Show that their
# product depends only on how far apart they stand. Why is that what allows a key to be kept?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 1. Turning q by a and k by b changes q·k as turning one of them by a - b would. So a key
# is turned once, by its own position, and is right for every later query: nothing that is kept has
# to be touched again.
q, k = torch.randn(2, 1, 1, D).double()
scores = {}
for at, distance in ((0, 5), (100, 5), (400, 5), (100, 6)):
    turned = rope(q, torch.tensor([at + distance])), rope(k, torch.tensor([at]))
    scores[at, distance] = (turned[0] * turned[1]).sum().item()
    print(f"q at {at + distance:3}, k at {at:3}: {scores[at, distance]:.6f}")
assert abs(scores[0, 5] - scores[400, 5]) < 1e-3
assert abs(scores[100, 5] - scores[100, 6]) > 1e-2

# %% [markdown]
# ## 2. Generate, and count
#
# Without a cache every new token runs the model over everything before it. The last row is enough:
# position i predicts token i + 1.

# %%
computed = 0


def generate(ids: list[int], num_tokens: int) -> list[int]:
    """The likeliest continuation; the whole text goes through the model for each of its tokens."""
    global computed
    ids = list(ids)
    for _ in range(num_tokens):
        positions = torch.arange(len(ids))

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor, at: Tensor = positions) -> Tensor:
            return attention(q, k, v, at)

        hidden = forward(ids, positions, attend)
        computed += len(ids)
        ids.append(int(logits_of(hidden[-1]).argmax()))
    return ids


PROMPT, N = tokenizer.encode("The capital of France is"), 12
start = time.perf_counter()
expected = generate(PROMPT, N)
seconds_without = time.perf_counter() - start
print(repr(tokenizer.decode(expected)))
P = len(PROMPT)
print(f"{computed} token computations for a prompt of {P} and {N} new tokens")
assert computed == N * P + N * (N - 1) // 2

# %% [markdown]
# **Exercise 2.** The same for P = 128 and N = 129: how many token computations, and how many if
# each token were computed once? Which tokens must be computed at all?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 2. 24,768 against 256: all but the last one that is drawn, which nothing follows.
p, n = 128, 129
recomputed, once = n * p + n * (n - 1) // 2, p + n - 1
print(recomputed, once, f"{recomputed / once:.1f} times")
assert (recomputed, once) == (24_768, 256)

# %% [markdown]
# ## 3. The cache
#
# Attention is causal: what a token leaves behind, a key and a value in each layer, does not depend
# on what follows. So it is computed once and kept, in memory that is sized up front.


# %%
class Cache:
    """Keys and values of up to ``size`` tokens: [L, size, Hkv, D] each."""

    def __init__(self, size: int) -> None:
        self.keys, self.values = torch.zeros(2, L, size, Hkv, D)
        self.length = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.length + len(k)
        self.keys[layer, self.length : end] = k
        self.values[layer, self.length : end] = v
        positions = torch.arange(self.length, end)
        return attention(q, self.keys[layer, :end], self.values[layer, :end], positions)

    def forward(self, ids: list[int]) -> Tensor:
        """Compute new tokens behind those that are here: the whole prompt, or one."""
        positions = torch.arange(self.length, self.length + len(ids))
        hidden = forward(ids, positions, self.attend)
        self.length += len(ids)
        return hidden


def generate_cached(ids: list[int], num_tokens: int) -> tuple[list[int], int]:
    ids, cache = list(ids), Cache(len(ids) + num_tokens)
    for _ in range(num_tokens):
        hidden = cache.forward(ids[cache.length :])  # prefill the first time, then decode
        ids.append(int(logits_of(hidden[-1]).argmax()))
    return ids, cache.length


start = time.perf_counter()
tokens, computed_once = generate_cached(PROMPT, N)
seconds_with = time.perf_counter() - start
assert tokens == expected
assert computed_once == P + N - 1
print(f"the same tokens, {computed_once} token computations")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
steps = range(1, N + 1)
axes[0].bar(steps, [P + i for i in range(N)], color="#d9dde4", label="without a cache")
axes[0].bar(steps, [P] + [1] * (N - 1), color="#2a9d8f", label="with one")
axes[0].set_xlabel("step")
axes[0].set_ylabel("tokens computed")
axes[0].legend()
axes[1].bar(["without", "with"], [seconds_without, seconds_with], color=["#d9dde4", "#2a9d8f"])
axes[1].set_ylabel(f"seconds for {N} tokens, here")
plt.show()

# %% [markdown]
# **Exercise 3.** Let every decode step believe that it stands at position 0 (in `Cache.forward`).
# Will there be an error, noise, or something else? And does it help to look at the first token?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 3. No error, and text that goes round in circles. The first token is right: it comes from
# the prefill, whose positions are still good. A test that asks for one token would pass.
class LostCache(Cache):
    def forward(self, ids: list[int]) -> Tensor:
        hidden = forward(ids, torch.arange(len(ids)), self.attend)
        self.length += len(ids)
        return hidden


lost, cache = list(PROMPT), LostCache(P + N)
for _ in range(N):
    lost.append(int(logits_of(cache.forward(lost[cache.length :])[-1]).argmax()))
print(repr(tokenizer.decode(lost)))
assert lost[P] == expected[P]
assert lost != expected

# %% [markdown]
# **Exercise 4.** How many bytes does the cache take for each token, in bfloat16? After how many
# tokens is it as large as the weights? And what would it be without GQA (Hkv = Hq)?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 4. 2 (k and v) x L x Hkv x D x 2 bytes = 23,040; the weights are reached at 11,676
# tokens, more than this model can read. Without GQA three times as much.
per_token = 2 * L * Hkv * D * 2
assert per_token == config.kv_bytes_per_token(2) == 23_040
num_parameters = sum(tensor.numel() for tensor in weights.values())
print(per_token, "bytes,", 2 * num_parameters // per_token, "tokens,", per_token * Hq // Hkv)

# %% [markdown]
# ## 4. What a pass costs
#
# A pass reads all weights, however many tokens go through it, and does about two operations per
# weight *and token*. A machine has a limit for each; the larger time counts (the roofline). Here is
# what an H200's data sheet allows for Qwen3-0.6B in bfloat16, and what this machine takes for our
# forward pass.

# %%
READ, MULTIPLY = 4.8e12, 989e12  # bytes and FLOP per second
LAYERS, VOCABULARY = 440_401_920, 155_582_464  # weights in the layers; of the embedding
CACHED, PAIR = 114_688, 229_376  # bytes of a cached token; FLOP for a query and a key


def least(num_tokens: int, context: int = 0) -> tuple[float, float]:
    """Seconds by bytes and by FLOP, for tokens behind a context."""
    pairs = num_tokens * context + num_tokens * (num_tokens + 1) / 2
    flops = 2 * LAYERS * num_tokens + 2 * VOCABULARY + PAIR * pairs
    return (2 * (LAYERS + VOCABULARY) + CACHED * (context + num_tokens)) / READ, flops / MULTIPLY


def seconds_here(num_tokens: int) -> float:
    times = []
    for _ in range(3):
        cache = Cache(num_tokens)
        start = time.perf_counter()
        cache.forward(PROMPT[:1] * num_tokens)
        times.append(time.perf_counter() - start)
    return min(times)


sizes = [2**i for i in range(13)]
small = [2**i for i in range(7)]
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
for place, label in ((0, "by bytes"), (1, "by FLOP")):
    axes[0].loglog(sizes, [1e6 * least(n)[place] for n in sizes], label=label)
axes[0].loglog(sizes, [1e6 * max(least(n)) for n in sizes], "k:", label="at least")
axes[0].set_title("Qwen3-0.6B on an H200, data sheet")
axes[0].set_ylabel("microseconds of a pass")
axes[1].plot(small, [1e3 * seconds_here(n) / n for n in small], "o-")
axes[1].set_xscale("log", base=2)
axes[1].set_title("SmolLM2-135M, here")
axes[1].set_ylabel("milliseconds per token")
for axis in axes:
    axis.set_xlabel("tokens of the pass")
axes[0].legend()
plt.show()

# %% [markdown]
# **Exercise 5.** From how many prompt tokens on is a pass on the H200 limited by arithmetic? How
# busy are its arithmetic units when one token is decoded at a context of 192? What follows for
# sixty-four requests?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 5. From 276 tokens on (the lm_head sees one row only, or it would be 206). One token:
# half a percent. Sixty-four requests in one pass read the weights once: nearly 64 tokens for the
# price of one or two. That is note 2.
ridge = next(n for n in range(1, 4096) if least(n)[1] > least(n)[0])
by_bytes, by_flops = least(1, 192)
print(f"{ridge} tokens; {by_flops / by_bytes:.2%} busy, {1e6 * by_bytes:.0f} us for a token")
assert 250 < ridge < 300

# %% [markdown]
# ## 5. From scores to a token
#
# Dividing the scores by a temperature sharpens or flattens the distribution; `top_p` keeps the
# fewest likeliest tokens that reach a sum.


# %%
def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The tokens that top_p keeps, likeliest first; the one on the boundary stays."""
    values, order = probabilities.sort(descending=True)
    before = values.cumsum(0) - values
    return order[before < top_p]


scores = logits_of(hidden[-1])
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
order = scores.argsort(descending=True)[:12]
labels = [tokenizer.decode([token]) for token in order.tolist()]
colours = {0.5: "#1d3557", 1.0: "#2a9d8f", 2.0: "#b8c0cc"}
for shift, (temperature, colour) in enumerate(colours.items()):
    places = [i + 0.27 * (shift - 1) for i in range(12)]
    p = (scores / temperature).softmax(-1)[order]
    axes[0].bar(places, p, 0.27, color=colour, label=f"T = {temperature}")
axes[0].set_xticks(range(12), labels, rotation=60)
axes[0].set_ylabel("probability")
axes[0].legend()
temperatures = [0.3 + 0.1 * i for i in range(13)]
kept = [len(nucleus((scores / t).softmax(-1), 0.9)) for t in temperatures]
axes[1].semilogy(temperatures, kept, "o-", color="#2a9d8f")
axes[1].set_xlabel("temperature")
axes[1].set_ylabel("tokens that top_p = 0.9 keeps")
plt.show()

# %% [markdown]
# **Exercise 6.** An engine applies top_p first and temperature afterwards. For T = 0.7 and top_p =
# 0.9, how many tokens does it keep here, and how many the other way round? Which one is right?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 6. 240 against 12. Neither is wrong by itself, but the order is a part of what the
# options mean: temperature before truncation is what vLLM and transformers do, and what users'
# settings were found with.
first = len(nucleus(scores.softmax(-1), 0.9))
second = len(nucleus((scores / 0.7).softmax(-1), 0.9))
print(first, "against", second)
assert first > 10 * second

# %% [markdown]
# ## 6. A race instead of a lottery
#
# To draw token i with probability p_i: give each token an exponential random number E_i and take
# the largest w_i / E_i, where w_i is any multiple of p_i. Nothing has to be normalised or added up,
# and leaving a token out means a weight of 0.

# %%
shares = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
draws = 20_000
wins = (7.0 * shares / torch.empty(draws, 5).exponential_()).argmax(1).bincount(minlength=5)
print("wanted", shares.tolist(), "drawn", (wins / draws).tolist())
sigma = (shares * (1 - shares) / draws).sqrt()
assert ((wins / draws - shares).abs() < 4 * sigma).all()

# %% [markdown]
# The engine's exponentials are not drawn from a stream. They are a hash of the request's seed, the
# step and the token, so a request gets the same numbers alone, in a batch, and after it was
# interrupted.

# %%
seeds, steps = torch.tensor([7, 7, 99]), torch.tensor([3, 4, 3])
batch = exponential_noise(seeds, steps, config.vocab_size)
alone = exponential_noise(seeds[1:2], steps[1:2], config.vocab_size)
assert torch.equal(batch[1], alone[0])
assert not torch.equal(batch[0], batch[1])
print(f"mean {batch.mean():.3f}, standard deviation {batch.std():.3f}")

# %% [markdown]
# **Exercise 7.** Somebody takes uniform numbers U instead of exponentials. Which tokens win too
# often? And why does a test with two equally likely tokens see nothing?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 7. Likely tokens win too often. Of two tokens with weights a > b, b wins when U_b < (b/a)
# U_a, which has the probability b / (2 a) instead of b / (a + b). With a = b both say one half.
wrong = (shares / torch.rand(draws, 5)).argmax(1).bincount(minlength=5) / draws
print("wanted", shares.tolist(), "drawn", wrong.tolist())
assert wrong[0] > shares[0] + 4 * sigma[0]
pair = torch.tensor([0.5, 0.5])
even = (pair / torch.rand(draws, 2)).argmax(1).float().mean()
assert abs(even - 0.5) < 4 * 0.5 / draws**0.5

# %% [markdown]
# ## 7. Text that grows
#
# A token is a piece of bytes. A character may need two of them.

# %%
for token in tokenizer.encode("日本"):
    print(token, tokenizer.token_bytes(token).hex(" "), repr(tokenizer.decode([token])))

# %% [markdown]
# **Exercise 8.** Write a function that is given tokens one by one and returns the text that each
# completes. And with the stop string `"</s>"`: how many characters must a stream hold back?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 8. A UTF-8 decoder with its state does it: it returns characters that are complete. Of a
# stop string of four characters three may be there without the fourth, so three are held back until
# more text, or the end, shows what they are.
import codecs  # noqa: E402

decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
pieces = [decoder.decode(tokenizer.token_bytes(token)) for token in tokenizer.encode("日本")]
print(pieces)
assert pieces[0] == ""
assert "".join(pieces) == "日本"

# %% [markdown]
# ## What is missing
#
# m1 does this with all sampling options, several samples of a prompt, stop conditions and a command
# line. What it does not do is more than one request at a time: [note 2](02_continuous_batching.md).

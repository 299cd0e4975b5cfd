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
# # GPTQ on one layer, rebuilt step by step
#
# This notebook goes with [note 7](07_gptq_quantization.md). It takes one projection of the default
# model and the inputs that it really sees, rounds it to the nearest grid points, finds out what
# that does to the layer's output, and then lets weights make up for each other's errors. Each step
# adds one idea, checks it, and ends with an exercise whose solution is the cell below it. It runs
# on the CPU in some seconds.
#
# ```bash
# make notebooks                                            # opens JupyterLab
# MPLBACKEND=Agg python learn/07_gptq_quantization.py       # or as a plain script
# ```
#
# W is [N, K]: N outputs, K inputs. X is [n, K]: n tokens.

# %%
from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from common.attention import causal_self_attention
from common.checkpoint import load_model, open_checkpoint
from m7_gptq.calibration import CALIBRATION, EVALUATION, read_text, token_windows
from m7_gptq.gptq import Hessian, QuantizeConfig, gptq, objective
from m7_gptq.packing import pack_rows, pack_zeros

torch.manual_seed(0)
LAYER, LENGTH = 8, 256

# %% [markdown]
# ## 1. A layer, and what it sees
#
# The output projection of attention in one layer. A hook in front of it keeps its inputs while the
# model reads some text: Python's own help, of which one half is for calibration and the other for
# judging.

# %%
checkpoint = open_checkpoint("smollm2-135m-instruct")
model = load_model(checkpoint, dtype=torch.float32, device="cpu", max_positions=LENGTH)
layer = model.layers[LAYER].o_proj


@torch.inference_mode()
def inputs_of(windows: Tensor) -> Tensor:
    """What the layer sees while the model reads windows [N, T]: [N * T, K]."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for window in windows:
        model(window, torch.arange(len(window)), lambda _, q, k, v: causal_self_attention(q, k, v))
    hook.remove()
    return torch.cat(seen)


def windows_of(text: str, count: int = 10) -> Tensor:
    return token_windows(checkpoint.tokenizer, text, count=count, length=LENGTH)


X = inputs_of(windows_of(read_text("builtin", CALIBRATION)))
held_out = inputs_of(windows_of(read_text("builtin", EVALUATION)))
weights = dict(checkpoint.weights("cpu"))
W = weights[f"model.layers.{LAYER}.self_attn.o_proj.weight"].float()
N, K = W.shape
H = X.T @ X / len(X)
print(f"W {list(W.shape)}, X {list(X.shape)}, H {list(H.shape)}")

correlation = H / (H.diagonal().sqrt()[:, None] * H.diagonal().sqrt())
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.imshow(correlation[:128, :128], cmap="RdBu", vmin=-1, vmax=1)
left.set_title("correlation of the first 128 inputs")
right.semilogy(H.diagonal().sort(descending=True).values)
right.set_title("mean square of each input, sorted")
plt.show()

# %% [markdown]
# **Exercise 1.** The error of the layer's output is `||X Wᵀ - X Ŵᵀ||²`. Show that H is all that one
# needs to know of X. How much smaller is it than X, for 65,536 tokens and K = 12,288?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 1. ||X Eᵀ||² = tr(E Xᵀ X Eᵀ) = n tr(E H Eᵀ). H is K x K: 0.6 GB in float32 instead of
# 3.2 GB, and it does not grow with the tokens.
E = torch.randn(N, K) / 100
direct, by_h = (X @ E.T).square().sum() / len(X), ((E @ H) * E).sum()
torch.testing.assert_close(direct, by_h, rtol=1e-4, atol=0)
print(f"{12288**2 * 4 / 1e9:.1f} GB, {65536 * 12288 * 4 / 1e9:.1f} GB")

# %% [markdown]
# ## 2. Round to nearest
#
# A group of inputs shares a scale and a zero point; codes are whole numbers from 0 to 2^bits - 1.
# The error is given relative to the size of the output.


# %%
def grid_of(members: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row's group, [N, 1]: its range, and 0, fit in."""
    low = members.amin(1, keepdim=True).clamp(max=0)
    high = members.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    return scale, torch.round(-low / scale)


def on_grid(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (torch.round(w / scale + zero).clamp(0, 2**bits - 1) - zero) * scale


def nearest(W: Tensor, bits: int, group: int) -> Tensor:
    parts = [on_grid(part, *grid_of(part, bits), bits) for part in W.split(group, dim=1)]
    return torch.cat(parts, dim=1)


def error_of(found: Tensor, h: Tensor = H) -> float:
    """Of the layer's output, relative."""
    E = found - W
    return (((E @ h) * E).sum() / ((W @ h) * W).sum()).item()


for bits in (8, 4, 3, 2):
    print(bits, "bits, group 64:", f"{error_of(nearest(W, bits, 64)):.2e}")
assert error_of(nearest(W, 8, 64)) < error_of(nearest(W, 4, 64)) < error_of(nearest(W, 2, 64))

# %% [markdown]
# **Exercise 2.** Each group stores a scale (16 bits) and a zero point. Plot the error over the bits
# a weight takes *in all*, for 2, 3, 4 bits and groups of 32, 64, 192, 576. Then store the group's
# minimum as a number instead of a whole zero point, `ŵ = code * scale + minimum`, with 4 bits and
# groups of 32. The error becomes nothing at all. Why, and what does it say about measuring with
# this model?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 2. The weights come from a file in which they had 4 bits already, in groups of 32 with a
# scale and a minimum (GGUF's Q4_1). On that very grid rounding finds the points where they lie. It
# says nothing about rounding and everything about where the weights come from. A whole zero point
# shifts the grid by up to half a step, and other group sizes do not fit it either: there the
# measurement is one of rounding again.
plt.figure(figsize=(6, 3))
for bits in (2, 3, 4):
    groups = (32, 64, 192, 576)
    sizes = [bits + (16 + bits) / group for group in groups]
    errors = [error_of(nearest(W, bits, group)) for group in groups]
    plt.semilogy(sizes, errors, marker="o", label=f"{bits} bits")
plt.xlabel("bits a weight, scale and zero point included")
plt.ylabel("relative error")
plt.legend()
plt.show()


def with_minimum(W: Tensor, bits: int, group: int) -> Tensor:
    parts = W.view(len(W), -1, group)
    low, high = parts.amin(2, keepdim=True), parts.amax(2, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return (torch.round((parts - low) / scale) * scale + low).view_as(W)


for group in (32, 64):
    print(f"4 bits, groups of {group}: whole zero points {error_of(nearest(W, 4, group)):.1e}, "
          f"minimum {error_of(with_minimum(W, 4, group)):.1e}")
assert error_of(with_minimum(W, 4, 32)) < 1e-9
assert error_of(with_minimum(W, 4, 64)) > 1e-3

# %% [markdown]
# ## 3. One weight is rounded, the others make up for it
#
# Two weights of 0.4 on a grid of whole numbers; two inputs of variance 1 and correlation 0.9.
# Rounding the first to 0 leaves an error of 0.4 that the second can mostly undo, if it moves by
# `0.4 * 0.9`.

# %%
h2, w2 = torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.tensor([0.4, 0.4])


def loss_of(found: Tensor, w: Tensor = w2, h: Tensor = h2) -> float:
    return ((found - w) @ h @ (found - w)).item()


for codes in ([0.0, 0.0], [0.0, 1.0]):
    print(codes, f"{loss_of(torch.tensor(codes)):.3f}")
assert loss_of(torch.tensor([0.0, 1.0])) < loss_of(torch.tensor([0.0, 0.0])) / 6

# %% [markdown]
# In general, if weight q is rounded and is off by r = w_q - ŵ_q, the others should move by
# `-r / [H⁻¹]_qq · [H⁻¹]_q,:`, which is the optimal brain surgeon's answer. Then weight q is out of
# the game, and so are its row and column of H.


# %%
def surgeon(w: Tensor, h: Tensor) -> Tensor:
    """Slow and plain: a row of weights on a grid of whole numbers, inverting H for each of them."""
    w = w.clone()
    for q in range(len(w)):
        inverse = torch.linalg.inv(h[q:, q:])  # of those that are still free
        r = w[q] - w[q].round()
        w[q + 1 :] -= r / inverse[0, 0] * inverse[0, 1:]
        w[q] = w[q].round()
    return w


a = torch.randn(200, 12, dtype=torch.float64)
mix = torch.randn(12, 12, dtype=torch.float64)
h12 = mix.T @ (a.T @ a / 200) @ mix
w12 = 2 * torch.randn(12, dtype=torch.float64)
print(f"nearest {loss_of(w12.round(), w12, h12):.1f}, "
      f"surgeon {loss_of(surgeon(w12, h12), w12, h12):.1f}")
assert torch.equal(surgeon(w2, h2), torch.tensor([0.0, 1.0]))
assert loss_of(surgeon(w12, h12), w12, h12) < loss_of(w12.round(), w12, h12)

# %% [markdown]
# **Exercise 3.** With whole-number grids and *uncorrelated* inputs of different sizes, what does
# `surgeon` do? And if all inputs are equal (H all ones, a little more on the diagonal), what
# becomes of 20 weights of 0.4?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 3. Uncorrelated: H and its inverse are diagonal, nothing moves, it is round-to-nearest.
# All equal: only the sum of the weights counts; errors gather until one weight becomes 1. Some 8 of
# 20 do: error diffusion, as in printing grey with black dots.
diagonal = torch.diag(torch.rand(12, dtype=torch.float64) + 0.1)
assert torch.equal(surgeon(w12, diagonal), w12.round())
alike = surgeon(torch.full((20,), 0.4), torch.ones(20, 20) + 0.01 * torch.eye(20))
print(alike.int().tolist(), "sum", alike.sum().item())
assert alike.sum() == 8

# %% [markdown]
# ## 4. The Cholesky factor does all eliminations at once
#
# All rows take the columns in the same order, so they share the inverses, and those are in one
# factor: `H⁻¹ = Uᵀ U`. Row j of U is, up to a number, the first row of the inverse that is left
# after j eliminations.


# %%
def factor_of(h: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


U = factor_of(h12)
for q in range(12):
    inverse = torch.linalg.inv(h12[q:, q:])
    torch.testing.assert_close(inverse[0], U[q, q] * U[q, q:])


def walk(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """`surgeon` by the factor: rows [N, K] -> (on the grid, errors e [N, K])."""
    w, U, errors = w.clone(), factor_of(h), torch.zeros_like(w)
    for q in range(w.shape[1]):
        fixed = w[:, q].round()
        errors[:, q] = (w[:, q] - fixed) / U[q, q]
        w[:, q:] -= errors[:, q : q + 1] * U[q, q:]
    return w, errors


rows = 2 * torch.randn(5, 12, dtype=torch.float64)
found, errors = walk(rows, h12)
for row, expected in zip(found, [surgeon(row, h12) for row in rows], strict=True):
    torch.testing.assert_close(row, expected)

# %% [markdown]
# **Exercise 4.** Note 7 proves that the final loss of a row is the sum of its e². Check it. Which
# columns pay most, and why does it pay to round columns with *large* inputs first?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 4. The price of column j is r² / U_jj², and 1 / U_jj² is what later columns can't explain
# of input j: for the last column the whole of its mean square. So the last ones should be small.
losses = [loss_of(row, w, h12) for row, w in zip(found, rows, strict=True)]
torch.testing.assert_close(errors.square().sum(1), torch.tensor(losses, dtype=torch.float64))
price = 1 / U.diagonal() ** 2
print("price of an error, first to last column:", [f"{p:.1f}" for p in price.tolist()])
torch.testing.assert_close(price[-1], h12[-1, -1])
assert (price <= h12.diagonal() * (1 + 1e-9)).all()

# %% [markdown]
# ## 5. The whole of it
#
# Groups, damping, act-order. A group's grid is fitted when the walk *arrives* at it, to weights
# that have moved by then. (Or beforehand, to the weights as they were: "static groups".)


# %%
def quantize(
    W: Tensor, h: Tensor, bits: int, group: int, *, by_size: bool = False, static: bool = False
) -> Tensor:
    """GPTQ; static: with grids that fit the weights as they were."""
    K = W.shape[1]
    order = h.diagonal().argsort(descending=True) if by_size else torch.arange(K)
    w, h = W[:, order].double(), h[order][:, order].double()
    before = w.clone()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(K)
    U = factor_of(h)
    for q in range(K):
        if q % group == 0:
            scale, zero = grid_of((before if static else w)[:, q : q + group], bits)
        fixed = on_grid(w[:, q : q + 1], scale, zero, bits)
        w[:, q:] -= (w[:, q : q + 1] - fixed) / U[q, q] * U[q, q:]
        w[:, q : q + 1] = fixed
    found = torch.empty_like(W)
    found[:, order] = w.float()
    return found


names = ("nearest", "GPTQ", "large inputs first", "grids fixed before")
table = {}
for bits in (2, 3, 4):
    table[bits] = [
        error_of(found)
        for found in (
            nearest(W, bits, 64),
            quantize(W, H, bits, 64),
            quantize(W, H, bits, 64, by_size=True),
            quantize(W, H, bits, 64, static=True),
        )
    ]
    shown = [f"{name} {error:.2e}" for name, error in zip(names, table[bits], strict=True)]
    print(bits, "bits:", ", ".join(shown))
    assert table[bits][1] < table[bits][0]
    assert table[bits][2] < table[bits][0]

config = QuantizeConfig(bits=4, group_size=64, sym=False, desc_act=True)
ours = gptq(W, H, config)
print(f"gptq.py, 4 bits: {error_of(ours.dequantize()):.2e}")
assert error_of(ours.dequantize()) < 1.1 * table[4][2]

# %% [markdown]
# **Exercise 5.** H comes from the calibration text. Is the gain real on text that the walk has not
# seen? And if it was calibrated on something narrow, such as columns of digits?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 5. On the other half of the text the gain is smaller and still there: a third of the
# error of rounding, where on the calibration text it is a seventh. (2,560 tokens are few for 576
# inputs; with more the two come closer.) Calibrated on digits, the layer is excellent for digits,
# and on ordinary text worse than plain rounding: what H has not seen costs nothing, so it is spent
# freely.
H_other = held_out.T @ held_out / len(held_out)
digits = "".join(f"{i * 7919 % 100000:05d} " for i in range(4000))
digit_inputs = inputs_of(windows_of(digits, 6))
H_digits = digit_inputs.T @ digit_inputs / len(digit_inputs)
narrow = quantize(W, H_digits, 3, 64, by_size=True)
wide = quantize(W, H, 3, 64, by_size=True)
for name, found in (("nearest", nearest(W, 3, 64)), ("wide", wide), ("narrow", narrow)):
    errors = [f"{error_of(found, h):.2e}" for h in (H_other, H_digits)]
    print(f"{name:8} on other text {errors[0]}, on digits {errors[1]}")
assert error_of(wide, H_other) < error_of(nearest(W, 3, 64), H_other)
assert error_of(narrow, H_digits) < error_of(wide, H_digits)
assert error_of(wide, H_other) < error_of(narrow, H_other) / 2
assert error_of(narrow, H_other) > error_of(nearest(W, 3, 64), H_other)

# %% [markdown]
# ## 6. Into 32-bit words
#
# Eight codes of 4 bits share a word, the first one lowest. Checkpoints pack codes along the inputs
# and zero points along the outputs, and version 1 of the format stores zero points less one.

# %%
codes = ours.codes.T.int()  # [K, N]
words = torch.zeros(K // 8, N, dtype=torch.int32)
for place in range(8):
    words |= codes[place::8] << (4 * place)
assert torch.equal(words, pack_rows(ours.codes.T, 4))

back = torch.stack([(words >> (4 * place)) & 15 for place in range(8)], dim=1).reshape(K, N)
assert torch.equal(back, codes)

eights = torch.full((9, N), 8, dtype=torch.uint8)  # symmetric: every zero point is 8
for version in ("gptq", "gptq_v2"):
    word = pack_zeros(eights, 4, version)[0, 0].item()
    print(f"a word of zero points in {version}: {word & 0xFFFFFFFF:#x}")

# %% [markdown]
# **Exercise 6.** Why the `& 15` *after* the shift? What does this layer take, packed with scales
# and zero points, against bf16? And what does reading version 1 as version 2 do to the layer's
# output?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 6. `>>` of int32 copies the sign: the top code of a word would come back as -8 to 7. Off
# by one zero point, every weight of a group is off by its scale, in the same direction: the output
# is off by scale times the sum of the inputs, which is far more than rounding ever does.
packed_bytes = words.nbytes + ours.scales.numel() * 2 + ours.zeros.numel() / 2 + K * 4
print(f"{packed_bytes / 1024:.0f} KiB instead of {W.numel() * 2 / 1024:.0f}: "
      f"{1 - packed_bytes / (W.numel() * 2):.0%} less")
shifted = ours.dequantize() + ours.scales[:, ours.g_idx.long()]
print(f"error: {error_of(ours.dequantize()):.2e}, with zero points off by one "
      f"{error_of(shifted):.2e}")
assert error_of(shifted) > 20 * error_of(ours.dequantize())
assert packed_bytes < 0.3 * W.numel() * 2

# %% [markdown]
# ## 7. What is in `gptq.py` and not here
#
# Blocks of columns, so that later columns wait for 128 errors and get them in one product; scales
# rounded to float16 while walking; symmetric grids; static groups; dead inputs; damping that grows
# if a factor fails; rows that the greedy walk makes worse are rounded to nearest. Its objective is
# the same as ours:

# %%
hessian = Hessian(K)
hessian.add(X)
torch.testing.assert_close(hessian.matrix, H, rtol=1e-3, atol=1e-5)
total = objective(W, ours, hessian.matrix).sum() / ((W @ H) * W).sum()
print(f"{total.item():.2e} and {error_of(ours.dequantize()):.2e}")

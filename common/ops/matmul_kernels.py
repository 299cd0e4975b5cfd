"""Triton kernels for products of a few rows with a large weight; ``common.ops.matmul`` runs them.

Features (outputs) are cut into tiles, one or more programs each. Three kernels, by the rows:

* ``single_row_kernel``: multiply and sum. Tensor cores would idle on 15 of 16 rows.
* ``few_rows_kernel`` (to 16): one tensor-core product per warp on its own part of K, then their
  sum. Without a loop over K the warps never wait for each other.
* ``many_rows_kernel``: the textbook loop over K, its loads pipelined.

The first two have all their weights (or as many as registers hold) under way before they look at
the input. Launched early (``PDL``, see ``common.ops.launch``) they read them while the kernel
before still runs. As they see whole rows of the input they can also normalise them: every program
computes the norms again, which costs less than a kernel for it.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """Allow the next kernel's launch as soon as all our programs have come this far."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait until the kernel before has ended; only weights may be read ahead of this."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def tile_features(N: tl.constexpr, TILE_N: tl.constexpr, SILU: tl.constexpr):
    """Rows of the weight this program multiplies, [TILE_N]; those past the end repeat the last."""
    i = tl.arange(0, TILE_N)
    if SILU:  # gate 0, up 0, gate 1, up 1, ...
        output = tl.minimum(tl.program_id(0) * (TILE_N // 2) + i // 2, N // 2 - 1)
        feature = output + (i % 2) * (N // 2)
    else:
        feature = tl.minimum(tl.program_id(0) * TILE_N + i, N - 1)
    return feature.to(tl.int64)  # a large vocabulary has more than 2**31 weights


@triton.jit
def load_masked(pointers, mask, MASKED: tl.constexpr):
    """Zeros where the mask is false; the mask is left out where it would be true everywhere."""
    if MASKED:
        values = tl.load(pointers, mask=mask, other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def silu_of_pairs(values):
    """silu(gate) * up of the last axis, [..., 2 * n] gate and up in turn -> [..., n]."""
    if len(values.shape) == 1:
        gate, up = tl.split(values.reshape([values.shape[0] // 2, 2]))
    else:
        gate, up = tl.split(values.reshape([values.shape[0], values.shape[1] // 2, 2]))
    return gate * tl.sigmoid(gate) * up


@triton.jit
def single_row_kernel(
    x,  # [K]
    residual,  # RESIDUAL: [K]
    norm_weight,  # NORM: [K]
    weight,  # [N, K]
    bias,  # BIAS: [N]
    y,  # [N]; SILU: [N // 2]
    total,  # RESIDUAL: [K], x + residual
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE_N: tl.constexpr,  # features of one program
    TILE_K: tl.constexpr,  # of the K summed over, at a time
    DEPTH: tl.constexpr,  # tiles of weights in registers; cdiv(K, TILE_K): all at once
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = weight @ x + bias, where NORM asks for it with x = rms_norm(x + residual)."""
    STEPS: tl.constexpr = (K + TILE_K - 1) // TILE_K
    MASKED: tl.constexpr = STEPS * TILE_K != K
    let_next_begin(PDL)
    feature = tile_features(N, TILE_N, SILU)
    k = tl.arange(0, TILE_K)
    tiles = weight + feature[:, None] * K + k[None, :]

    weights, scales = (), ()
    for step in tl.static_range(STEPS):
        inside = step * TILE_K + k < K
        if step < DEPTH:
            weights += (load_masked(tiles + step * TILE_K, inside[None, :], MASKED),)
        if NORM:
            scales += (load_masked(norm_weight + step * TILE_K + k, inside, MASKED),)
    offset = tl.load(bias + feature).to(tl.float32) if BIAS else 0.0
    wait_for_inputs(PDL)

    inputs = ()
    square = tl.zeros([TILE_K], tl.float32)
    for step in tl.static_range(STEPS):
        part = step * TILE_K + k
        values = load_masked(x + part, part < K, MASKED)
        if RESIDUAL:
            added = load_masked(residual + part, part < K, MASKED)
            values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
            if tl.program_id(0) == 0:
                tl.store(total + part, values, mask=part < K)
        square += values.to(tl.float32) * values.to(tl.float32)
        inputs += (values,)
    if NORM:
        scale = tl.rsqrt(tl.sum(square) / K + eps)

    products = tl.zeros([TILE_N, TILE_K], tl.float32)
    for step in tl.static_range(STEPS):
        values = inputs[step].to(tl.float32)
        if NORM:  # rounded as the plain twin rounds it
            values = (values * scale * scales[step].to(tl.float32)).to(x.dtype.element_ty)
            values = values.to(tl.float32)
        products += weights[step].to(tl.float32) * values[None, :]
        if step + DEPTH < STEPS:
            following = (step + DEPTH) * TILE_K
            inside = (following + k < K)[None, :]
            weights += (load_masked(tiles + following, inside, MASKED),)
    result = tl.sum(products, axis=1)  # [TILE_N]
    result += offset
    if SILU:
        result = silu_of_pairs(result)
    OUTPUTS: tl.constexpr = TILE_N // 2 if SILU else TILE_N
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < (N // 2 if SILU else N)
    tl.store(y + output, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def store_result(
    result,  # float32 [TILE_M, TILE_N]
    offset,  # BIAS: float32 [TILE_N]
    y,  # [M, N]; SILU: [M, N // 2]
    rows,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """What is done with finished sums: bias, silu, rounding."""
    result += offset
    if SILU:
        result = silu_of_pairs(result)
    WIDTH: tl.constexpr = N // 2 if SILU else N
    m = tl.arange(0, result.shape[0])[:, None]
    output = (tl.program_id(0) * result.shape[1] + tl.arange(0, result.shape[1]))[None, :]
    inside = (m < rows) & (output < WIDTH)
    tl.store(y + m.to(tl.int64) * WIDTH + output, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def finish(
    result,  # float32 [TILE_M, TILE_N]
    offset,  # BIAS: float32 [TILE_N]
    y,  # [M, N]; SILU: [M, N // 2]
    partial,  # SPLITS > 1: float32 [SPLITS, M, N rounded up to tiles]
    counters,  # SPLITS > 1: int32, a zero for each tile of features
    rows,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Store a tile's sums; of a tile split over K the last program to arrive does, for all."""
    if SPLITS == 1:
        store_result(result, offset, y, rows, N, BIAS, SILU)
    else:
        TILE_N: tl.constexpr = result.shape[1]
        width = tl.num_programs(0) * TILE_N
        m = tl.arange(0, result.shape[0])[:, None]
        place = m * width + (tl.program_id(0) * TILE_N + tl.arange(0, TILE_N))[None, :]
        tl.store(partial + tl.program_id(1) * rows * width + place, result, mask=m < rows)
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = counters + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            result = tl.zeros_like(result)
            for split in tl.static_range(SPLITS):
                part = partial + split * rows * width + place
                # ".cg": not from this multiprocessor's own cache, which may be out of date
                result += tl.load(part, mask=m < rows, other=0.0, cache_modifier=".cg")
            store_result(result, offset, y, rows, N, BIAS, SILU)
            tl.store(counter, 0)


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x,  # [M, K]
    residual,  # RESIDUAL: [M, K]
    norm_weight,  # NORM: [K]
    weight,  # [N, K]
    bias,  # BIAS: [N]
    y,  # [M, N]; SILU: [M, N // 2]
    total,  # RESIDUAL: [M, K], x + residual
    partial,  # SPLITS > 1: float32 [SPLITS, M, N rounded up to tiles]
    counters,  # SPLITS > 1: int32, a zero for each tile of features
    eps,
    rows,  # M, at most TILE_M
    N: tl.constexpr,
    K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,  # features of one program
    TILE_K: tl.constexpr,  # of the K summed over, at a time
    DEPTH: tl.constexpr,  # tiles of weights in registers
    WARPS: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the sums over K; NORM: 1
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = x @ weight.T + bias, where NORM asks for it with x = rms_norm(x + residual).

    K lies along two axes, [WARPS, K of a warp]: the first is a batch of products, one a warp.
    """
    STEPS: tl.constexpr = (K + TILE_K * SPLITS - 1) // (TILE_K * SPLITS)
    MASKED: tl.constexpr = STEPS * TILE_K * SPLITS != K
    WARP_K: tl.constexpr = TILE_K // WARPS
    let_next_begin(PDL)
    feature = tile_features(N, TILE_N, SILU)
    k = tl.arange(0, WARPS)[:, None, None] * WARP_K + tl.arange(0, WARP_K)[None, None, :]
    k += tl.program_id(1) * (STEPS * TILE_K)  # [WARPS, 1, WARP_K]
    m = tl.arange(0, TILE_M)[None, :, None]
    tiles = weight + feature[None, :, None] * K + k  # [WARPS, TILE_N, WARP_K]

    weights, scales = (), ()
    for step in tl.static_range(STEPS):
        inside = step * TILE_K + k < K
        if step < DEPTH:
            weights += (load_masked(tiles + step * TILE_K, inside, MASKED),)
        if NORM:
            scales += (load_masked(norm_weight + step * TILE_K + k, inside, MASKED),)
    offset = tl.load(bias + feature).to(tl.float32) if BIAS else 0.0
    wait_for_inputs(PDL)

    place = m * K + k  # [WARPS, TILE_M, WARP_K]
    inputs = ()
    if NORM:
        square = tl.zeros([WARPS, TILE_M, WARP_K], tl.float32)
        for step in tl.static_range(STEPS):
            inside = (m < rows) & (step * TILE_K + k < K)
            values = tl.load(x + place + step * TILE_K, mask=inside, other=0.0)
            if RESIDUAL:
                added = tl.load(residual + place + step * TILE_K, mask=inside, other=0.0)
                values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
                if tl.program_id(0) == 0:
                    tl.store(total + place + step * TILE_K, values, mask=inside)
            square += values.to(tl.float32) * values.to(tl.float32)
            inputs += (values,)
        mean = tl.sum(tl.sum(square, axis=2), axis=0) / K  # [TILE_M]
        scale = tl.rsqrt(mean + eps)[None, :, None]

    sums = tl.zeros([WARPS, TILE_N, TILE_M], tl.float32)
    for step in tl.static_range(STEPS):
        if NORM:  # rounded as the plain twin rounds it
            values = inputs[step].to(tl.float32) * scale * scales[step].to(tl.float32)
            values = values.to(x.dtype.element_ty)
        else:
            inside = (m < rows) & (step * TILE_K + k < K)
            values = tl.load(x + place + step * TILE_K, mask=inside, other=0.0)
        sums = tl.dot(weights[step], values.permute(0, 2, 1), sums, input_precision="ieee")
        if step + DEPTH < STEPS:
            following = (step + DEPTH) * TILE_K
            weights += (load_masked(tiles + following, following + k < K, MASKED),)
    result = tl.sum(sums, axis=0).T  # [TILE_M, TILE_N]
    finish(result, offset, y, partial, counters, rows, N, SPLITS, BIAS, SILU)


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines at these addresses to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["rows"])
def many_rows_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # BIAS: [N]
    y,  # [M, N]; SILU: [M, N // 2]
    partial,  # SPLITS > 1: float32 [SPLITS, M, N rounded up to tiles]
    counters,  # SPLITS > 1: int32, a zero for each tile of features
    rows,  # M, at most TILE_M
    N: tl.constexpr,
    K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,  # features of one program
    TILE_K: tl.constexpr,  # of the K summed over, at a time
    STAGES: tl.constexpr,  # tiles under way
    PREFETCH: tl.constexpr,  # PDL: of a program's K, brought to the L2 cache ahead of x
    SPLITS: tl.constexpr,  # programs that share the sums over K
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = x @ weight.T + bias."""
    STEPS: tl.constexpr = (K + TILE_K * SPLITS - 1) // (TILE_K * SPLITS)
    MASKED: tl.constexpr = STEPS * TILE_K * SPLITS != K
    let_next_begin(PDL)
    feature = tile_features(N, TILE_N, SILU)
    begin = tl.program_id(1) * (STEPS * TILE_K)
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # 128 bytes
    if PDL and PREFETCH >= LINE:
        line = tl.minimum(begin + tl.arange(0, PREFETCH // LINE) * LINE, K - 1)
        prefetch(weight + feature[:, None] * K + line[None, :])
    offset = tl.load(bias + feature).to(tl.float32) if BIAS else 0.0
    wait_for_inputs(PDL)

    m = tl.arange(0, TILE_M)[:, None]
    k = begin + tl.arange(0, TILE_K)
    inputs = x + m * K + k[None, :]
    weights = weight + feature[None, :] * K + k[:, None]
    sums = tl.zeros([TILE_M, TILE_N], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        inside = step * TILE_K + k < K
        values = tl.load(inputs + step * TILE_K, mask=(m < rows) & inside[None, :], other=0.0)
        factors = load_masked(weights + step * TILE_K, inside[:, None], MASKED)
        sums = tl.dot(values, factors, sums, input_precision="ieee")
    finish(sums, offset, y, partial, counters, rows, N, SPLITS, BIAS, SILU)

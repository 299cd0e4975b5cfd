"""The launches whose kernels ``test_kernel_compile`` compiles, in the shapes that matter.

    python tests/compiled_kernels.py 90      # for sm_90: prints what each kernel takes, as JSON

Most shapes are those of Qwen3-0.6B: hidden size 1024, 16 query heads and 8 KV heads of 128. Others
are there for their size, or because they need masks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import NamedTuple

import torch
from pretended_gpu import PretendedGpu
from torch import Tensor

from common.ops.activation import silu_mul
from common.ops.launch import num_multiprocessors, supports_pdl
from common.ops.matmul import skinny_linear, skinny_norm_linear
from common.ops.norm import add_rms_norm
from common.ops.rope import qk_norm_rope
from common.ops.sampling import sample_tokens
from common.sampling_rows import DeviceRows, FloatColumn, IntegerColumn
from m3_paged.kernels import triton_kernels
from m4_flash.kernels.decode_inputs import DecodeInputs, unpack
from m4_flash.kernels.decode_plan import plan_decode
from m4_flash.kernels.flash_decode import flash_decode, flash_decode_fused
from m4_flash.kernels.flash_prefill import flash_prefill
from m4_flash.kernels.prefill_plan import plan_prefill
from m4_flash.kernels.prefill_tiles import tile_shape
from m7_gptq.kernels.int4_layout import Int4Weights, choose_plane
from m7_gptq.kernels.int4_matmul import dequantize_int4, int4_linear

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = torch.device("cuda", 0)
EPS, SCALE = 1e-6, 0.1
BLOCK_SIZE = 16
HKV = 8
VOCAB = 151936


class Shapes(NamedTuple):
    """Of one family of kernels; compiling takes a second each, so most only for Hopper."""

    everywhere: list[tuple]
    on_hopper: list[tuple]

    def wanted(self) -> list[tuple]:
        is_hopper = torch.cuda.get_device_capability() == (9, 0)
        return self.everywhere + (self.on_hopper if is_hopper else [])


# rows, features
NORMS = Shapes(
    [(8, 1024, BF16), (4096, 1024, BF16), (8, 16384, FP32)],
    [(8, 1024, FP32), (4096, 576, BF16), (8, 4096, BF16)],
)
# query heads, KV heads, head size, whether to normalise and store
ROTATIONS = Shapes(
    [(16, 8, 128, True, BF16), (16, 8, 256, True, FP32)],
    [(16, 8, 128, True, FP32), (16, 8, 128, False, BF16), (9, 3, 80, True, BF16)],
)
# inner size
GATES = Shapes([(3072, BF16)], [(1536, FP32)])
# rows of the input, rows and columns of the weight, what is fused with the product
PRODUCTS = Shapes(
    [
        (1, 4096, 1024, "norm"), (1, 6144, 1024, "norm silu"), (1, 4096, 12288, ""),
        (16, 6144, 1024, "norm silu"), (16, 1024, 3072, ""), (16, 4096, 12288, ""),
        (64, 6144, 1024, "silu"), (64, 1024, 3072, ""), (128, 1024, 3072, ""),
    ],
    [
        (1, 1024, 3072, ""), (1, VOCAB, 1024, ""), (1, 6144, 4096, "norm"),
        (8, 1024, 3072, ""), (16, 960, 576, "norm bias"), (16, VOCAB, 1024, ""),
        (64, 1000, 1000, "bias"), (128, 6144, 1024, "silu"),
    ],
)  # fmt: skip
# sequences, whether they are long, head size, query heads of a KV head
DECODES = Shapes(
    [
        (1, False, 128, 2, BF16), (256, False, 128, 2, BF16), (1, False, 256, 4, BF16),
        (1, True, 64, 3, FP32),
    ],
    [
        (32, False, 128, 2, BF16), (1, True, 128, 2, BF16), (256, True, 128, 2, BF16),
        (1, True, 256, 4, BF16), (1, False, 80, 1, FP16), (256, True, 96, 17, BF16),
    ],
)  # fmt: skip
# head size, whether tiles are large
PREFILLS = Shapes(
    [(128, False, BF16), (128, True, BF16), (256, True, BF16), (256, False, FP32)],
    [
        (64, True, BF16), (96, True, BF16), (128, True, FP16), (64, False, FP32),
    ],
)  # fmt: skip
# head size, of m3's kernels
PAGED = Shapes(
    [(128, BF16), (256, BF16), (64, FP32), (256, FP32)], [(64, BF16), (96, BF16), (128, FP32)]
)
# rows of the input, rows and columns of the weight of 4 bits, group size, whether every zero is 8
PRODUCTS_INT4 = Shapes(
    [
        (1, 24576, 4096, 128, True, BF16), (16, 4096, 12288, 128, True, BF16),
        (64, 6144, 4096, 128, True, BF16), (1, 1024, 3072, 32, False, FP16),
    ],
    [
        (1, 4096, 4096, 32, False, BF16), (1, 960, 576, -1, True, BF16),
        (16, 4096, 4096, 32, False, BF16), (16, 1024, 2048, 128, False, BF16),
        (64, 24576, 4096, 128, False, BF16), (64, 4096, 12288, 32, False, BF16),
        (40, 960, 576, 64, False, BF16),
    ],
)  # fmt: skip


def launch_all(gpu: PretendedGpu) -> None:
    for family, launch_family in (
        (NORMS, launch_norm),
        (ROTATIONS, launch_rotation),
        (GATES, launch_gate),
        (PRODUCTS, launch_product),
        (DECODES, launch_decode),
        (PREFILLS, launch_cut_prefill),
        (PAGED, launch_paged),
        (PRODUCTS_INT4, launch_int4),
    ):
        for shape in family.wanted():
            launch_family(gpu, *shape)
    launch_prefill(gpu, [2048] * 8, [0] * 8, 128, True, BF16)  # neither pages nor merges
    launch_prefill(gpu, [2048], [2048], 128, True, BF16, gather=True)
    launch_unpacking(gpu)
    launch_sampling(gpu, BF16, penalties=True)
    launch_sampling(gpu, FP32, penalties=False)


def launch_norm(gpu: PretendedGpu, rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = gpu.tensor(rows, size, dtype=dtype), gpu.tensor(size, dtype=dtype)
    add_rms_norm(x, x, weight, EPS, pdl=supports_pdl(DEVICE))


def launch_gate(gpu: PretendedGpu, inner: int, dtype: torch.dtype) -> None:
    silu_mul(gpu.tensor(8, 2 * inner, dtype=dtype), pdl=supports_pdl(DEVICE))


def launch_unpacking(gpu: PretendedGpu) -> None:
    inputs = DecodeInputs.allocate(256, 2560, DEVICE)
    unpack(gpu.tensor(2**16, dtype=torch.int32), inputs, BLOCK_SIZE)


def launch_cut_prefill(
    gpu: PretendedGpu, head_dim: int, large: bool, dtype: torch.dtype
) -> None:
    """A short chunk over a long context: read from its pages, by several programs."""
    launch_prefill(gpu, [64], [8192], head_dim, large, dtype)


def packed_qkv(
    gpu: PretendedGpu, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    qkv = gpu.tensor(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    return qkv.split([heads, kv_heads, kv_heads], dim=1)


def caches(
    gpu: PretendedGpu, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    cache = gpu.tensor(100, BLOCK_SIZE, kv_heads, head_dim, dtype=dtype)
    return cache, cache


def rotation(
    gpu: PretendedGpu, tokens: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    return gpu.tensor(tokens, 1, 2 * head_dim, dtype=dtype).chunk(2, dim=-1)


def launch_rotation(
    gpu: PretendedGpu, heads: int, kv_heads: int, head_dim: int, full: bool, dtype: torch.dtype
) -> None:
    weight = gpu.tensor(head_dim, dtype=dtype) if full else None
    k_cache, v_cache = caches(gpu, kv_heads, head_dim, dtype) if full else (None, None)
    slots = gpu.tensor(8, dtype=torch.int64) if full else None
    qk_norm_rope(
        *packed_qkv(gpu, 8, heads, kv_heads, head_dim, dtype),
        weight,
        weight,
        EPS,
        *rotation(gpu, 8, head_dim, dtype),
        k_cache=k_cache,
        v_cache=v_cache,
        slot_mapping=slots,
        pdl=supports_pdl(DEVICE),
    )


def launch_product(
    gpu: PretendedGpu, rows: int, features: int, in_features: int, fused: str
) -> None:
    x, weight = gpu.tensor(rows, in_features), gpu.tensor(features, in_features)
    bias = gpu.tensor(features) if "bias" in fused else None
    options = {"silu_mul": "silu" in fused, "pdl": supports_pdl(DEVICE)}
    if "norm" in fused:
        norm_weight = gpu.tensor(in_features)
        skinny_norm_linear(x, x, norm_weight, EPS, weight, bias, **options)
    else:
        skinny_linear(x, weight, bias, **options)


def launch_decode(
    gpu: PretendedGpu, batch: int, is_long: bool, head_dim: int, group: int, dtype: torch.dtype
) -> None:
    pdl = supports_pdl(DEVICE)
    heads = HKV * group
    q, k, v = packed_qkv(gpu, batch, heads, HKV, head_dim, dtype)
    weight = gpu.tensor(head_dim, dtype=dtype)
    cache = caches(gpu, HKV, head_dim, dtype)
    tables = gpu.tensor(batch, 2560, dtype=torch.int32)
    lens = gpu.tensor(batch, dtype=torch.int32)
    plan = plan_decode(lens, heads, HKV, head_dim, is_long=is_long)
    flash_decode(q, *cache, tables, plan, SCALE, pdl=pdl)
    turned = rotation(gpu, batch, head_dim, dtype)
    slots = gpu.tensor(batch, dtype=torch.int64)
    flash_decode_fused(
        q, k, v, weight, weight, EPS, *turned, *cache, tables, slots, plan, SCALE, pdl=pdl
    )


def launch_prefill(
    gpu: PretendedGpu,
    query_lens: list[int],
    context_lens: list[int],
    head_dim: int,
    large: bool,
    dtype: torch.dtype,
    gather: bool = False,
) -> None:
    heads = 2 * HKV
    generation, _ = torch.cuda.get_device_capability()
    plan = plan_prefill(
        query_lens,
        context_lens,
        DEVICE,
        num_heads=heads,
        num_kv_heads=HKV,
        head_dim=head_dim,
        dtype=dtype,
        num_multiprocessors=num_multiprocessors(DEVICE),
        shape=tile_shape(generation, large, any(context_lens) and not gather, 2, head_dim, dtype),
        gather=gather,
    )
    qkv = packed_qkv(gpu, sum(query_lens), heads, HKV, head_dim, dtype)
    tables = gpu.tensor(len(query_lens), 2560, dtype=torch.int32)
    flash_prefill(*qkv, *caches(gpu, HKV, head_dim, dtype), tables, plan, SCALE)


def launch_paged(gpu: PretendedGpu, head_dim: int, dtype: torch.dtype) -> None:
    batch = 4
    q, k, v = packed_qkv(gpu, batch, 2 * HKV, HKV, head_dim, dtype)
    cache = caches(gpu, HKV, head_dim, dtype)
    triton_kernels.reshape_and_cache(k, v, *cache, gpu.tensor(batch, dtype=torch.int64))
    tables, lens = gpu.tensor(batch, 512, dtype=torch.int32), gpu.tensor(batch, dtype=torch.int32)
    triton_kernels.paged_attention(q, *cache, tables, lens, SCALE)


def launch_int4(
    gpu: PretendedGpu,
    rows: int,
    features: int,
    in_features: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> None:
    plane, part = choose_plane(in_features, group_size, 2 if symmetric else 4)
    row_tiles, blocks = -(-features // 16), -(-in_features // (4 * plane))
    scales = gpu.tensor(row_tiles, blocks, plane // part, 8, 8, dtype=FP16)
    weights = Int4Weights(
        gpu.tensor(row_tiles, blocks * plane // 16, 32, 8, dtype=torch.int16),
        scales,
        None if symmetric else scales.to(dtype),
        features,
        in_features,
        group_size,
        plane,
        dtype,
    )
    x, bias = gpu.tensor(rows, in_features, dtype=dtype), gpu.tensor(features, dtype=dtype)
    int4_linear(x, weights, bias if in_features < 1024 else None, pdl=supports_pdl(DEVICE))
    if rows == 1:
        dequantize_int4(weights)


def launch_sampling(gpu: PretendedGpu, dtype: torch.dtype, penalties: bool) -> None:
    rows = 16
    state = DeviceRows(
        floats=gpu.tensor(rows, len(FloatColumn), dtype=torch.float64),
        integers=gpu.tensor(rows, len(IntegerColumn), dtype=torch.int64),
        num_sampled=gpu.tensor(rows, dtype=torch.int64),
        bias_tokens=gpu.tensor(rows, 8, dtype=torch.int64),
        biases=gpu.tensor(rows, 8, dtype=torch.float32),
        bias_until=gpu.tensor(rows, 8, dtype=torch.int64),
        in_prompt=gpu.tensor(rows, VOCAB, dtype=torch.bool) if penalties else None,
        in_output=gpu.tensor(rows, VOCAB, dtype=torch.int32) if penalties else None,
    )
    logits, places = gpu.tensor(8, VOCAB, dtype=dtype), gpu.tensor(8, dtype=torch.int64)
    sample_tokens(logits, places, state, edit=penalties, truncate=True, select=True)


if __name__ == "__main__":
    with PretendedGpu(divmod(int(sys.argv[1]), 10)) as gpu:
        launch_all(gpu)
    print(json.dumps([asdict(kernel) for kernel in gpu.kernels()]))

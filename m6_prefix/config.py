"""What m6 can be configured with: how prompts that begin alike find each other's blocks."""

from __future__ import annotations

from dataclasses import dataclass

from common.engine_config import BaseEngineConfig, option
from common.ops import CHOICES as OPS_CHOICES

from .backends import BACKENDS
from .kv_cache import INDEXES

PREFIX_INDEXES = (*INDEXES, "off")


@dataclass
class EngineConfig(BaseEngineConfig):
    """m5's options, and the index of prefixes."""

    block_size: int = option(16, "tokens per KV block, 8 to 256")
    num_kv_blocks: int | None = option(
        None, "KV cache size in blocks; the default takes what gpu_memory_utilization leaves"
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory for weights, activations and KV cache together"
    )
    max_num_batched_tokens: int = option(
        8192, "most tokens of one step, decodes and chunks of prompts; more than max_num_seqs"
    )
    chunk_size: int = option(
        12288,
        "most work on prompts in a step in which others decode, in tokens; attention to many "
        "tokens before it makes a token count for more",
    )
    prefix_index: str = option(
        "tree", "how cached prefixes are found: a radix tree, a table of hashes, or not at all",
        choices=PREFIX_INDEXES,
    )
    target_itl_ms: float | None = option(
        None, "make chunks so short that a step with decodes takes about this many milliseconds"
    )
    overlap: bool = option(
        True, "plan and launch a step while the one before it is still being computed"
    )
    attention_backend: str = option(
        "auto", "who computes attention; auto: flash on a GPU, torch on the CPU", choices=BACKENDS
    )
    ops: str = option(
        "auto", "the rest of the layers; auto: fused kernels on a GPU, torch on the CPU",
        choices=OPS_CHOICES,
    )
    enforce_eager: bool = option(
        False, "launch every kernel of a decode step from Python instead of replaying a CUDA graph"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 8 <= self.block_size <= 256:
            raise ValueError(f"block_size must be 8 to 256 tokens, got {self.block_size}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        if self.max_num_batched_tokens < 1:
            raise ValueError(
                f"max_num_batched_tokens must be at least 1, got {self.max_num_batched_tokens}"
            )
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} must be more than "
                f"max_num_seqs {self.max_num_seqs}, so that every sequence can decode and a prompt "
                "still advances: raise it, or lower max_num_seqs"
            )
        if self.prefix_index not in PREFIX_INDEXES:
            raise ValueError(
                f"unknown prefix_index {self.prefix_index!r}: use {', '.join(PREFIX_INDEXES)}"
            )
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, got {self.chunk_size}")
        if self.target_itl_ms is not None and self.target_itl_ms <= 0:
            raise ValueError(f"target_itl_ms must be positive, got {self.target_itl_ms}")
        if self.num_kv_blocks is not None and self.num_kv_blocks < 1:
            raise ValueError(f"num_kv_blocks must be at least 1, got {self.num_kv_blocks}")
        if self.attention_backend not in BACKENDS:
            raise ValueError(
                f"unknown attention_backend {self.attention_backend!r}: use {', '.join(BACKENDS)}"
            )
        if self.ops not in OPS_CHOICES:
            raise ValueError(f"unknown ops {self.ops!r}: use {', '.join(OPS_CHOICES)}")

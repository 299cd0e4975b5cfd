"""What m2 can be configured with: how much memory the cache gets, how much one step may compute."""

from __future__ import annotations

from dataclasses import dataclass

from common.engine_config import BaseEngineConfig, option


@dataclass
class EngineConfig(BaseEngineConfig):
    """Adds the size of the KV cache, which several sequences share now."""

    num_kv_tokens: int | None = option(
        None, "KV cache size in tokens; the default takes what gpu_memory_utilization leaves"
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory for weights, activations and KV cache together"
    )
    max_num_batched_tokens: int = option(
        8192, "most prompt tokens of one prefill step, padding included; a longer prompt goes alone"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        if self.max_num_batched_tokens < 1:
            raise ValueError(
                f"max_num_batched_tokens must be at least 1, got {self.max_num_batched_tokens}"
            )
        if self.num_kv_tokens is not None and self.num_kv_tokens < 2:
            raise ValueError(f"num_kv_tokens must be at least 2, got {self.num_kv_tokens}")

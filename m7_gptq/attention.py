"""What every attention backend is: the cache's tensors, a plan for a step, an attend for a layer.

A step is planned once and attended to in every layer. It packs new tokens of any number of
sequences behind each other, each behind what the cache holds of it already: first those that
decode, with one query each, then chunks of prompts. Backends differ in how they compute that, never
in what (``backends``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from common.config import ModelConfig
from common.memory import allocate_kv_cache
from common.sampling_rows import to_device

from .kv_cache import BlockCopy

Upload = Callable[[np.ndarray], Tensor]
"""Takes an array along to the device; the tensor it returns is filled when the step begins."""


@dataclass(frozen=True)
class AttentionBatch:
    """The sequences of one step, B of them with T new tokens in all.

    Attributes:
        slot_mapping: ``[T]`` int64, where each new token's keys and values go; -1 for nowhere.
        block_tables: ``[B, max_blocks]`` int32; entries past a sequence's end are never read.
        seq_lens: ``[B]`` int32, tokens to attend to, the new ones included; 0 for padding.
        query_lens: new tokens of each sequence, on the host; () if all decode: one each.
        cached_lens: tokens of each that are in the cache already; () if all decode.
        num_decodes: sequences at the front with one query each; all of them if all decode.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_lens: Sequence[int] = ()
    cached_lens: Sequence[int] = ()
    num_decodes: int = 0


class Attention:
    """The base of all backends.

    ``keys`` and ``values``: ``[L, num_blocks, block_size, Hkv, D]``.
    """

    name: ClassVar[str]
    # Whether a decode step may be captured in a CUDA graph: nothing waits for the device, and what
    # is launched depends on shapes alone.
    supports_graphs: ClassVar[bool] = False
    # The same of a prefill step, given a plan that was rounded up.
    supports_prefill_graphs: ClassVar[bool] = False
    # Whether this step wants q and k before norm and rotation, by `rotate_and_attend`.
    takes_unrotated: bool = False

    def __init__(
        self,
        model: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (model.num_layers, num_blocks, block_size, model.num_kv_heads, model.head_dim)
        self.keys = allocate_kv_cache(shape, dtype, device)
        self.values = allocate_kv_cache(shape, dtype, device)
        self.num_heads = model.num_heads
        self.scale = model.head_dim**-0.5
        self._batch: AttentionBatch | None = None

    @staticmethod
    def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One prompt that attends to itself, without a cache: ``[T, Hq, D]``, as large in memory.

        What the engine runs to see how much memory a step takes.
        """
        raise NotImplementedError

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks in every layer; all sources are read before a target is written."""
        if not copies:
            return
        source = to_device([copy.source for copy in copies], torch.int64, self.keys.device)
        target = to_device([copy.target for copy in copies], torch.int64, self.keys.device)
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def plan_prefill(
        self, batch: AttentionBatch, upload: Upload, *, padded: bool = False
    ) -> Hashable:
        """Prepare a pass that has chunks of prompts.

        Called before the batch's tensors are filled: what the plan adds goes with them.

        Args:
            padded: round the plan up, so that many batches launch the same kernels.

        Returns:
            What decides, beside the shapes of the batch, which kernels are launched.
        """
        self._batch = batch
        return None

    def decode_variant(self, mean_len: float) -> Hashable:
        """Which kernels suit a decode step whose sequences have so many tokens on average.

        Lengths are data to a CUDA graph; this is how they can choose between graphs.
        """
        return None

    def plan_decode(self, batch: AttentionBatch, variant: Hashable = None) -> None:
        """Prepare a pass that has decodes; the batch's tensors are filled."""
        self._batch = batch

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: ``[T, Hq, D]``; k, v: ``[T, Hkv, D]``, stored first. Returns ``[T, Hq, D]``."""
        raise NotImplementedError

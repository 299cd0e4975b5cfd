"""What all suites share: a model's shapes, the device, and a paged cache to read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_COPIES = 64
POOL_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}  # of keys and values together
ROTATED_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # several times any cache memory
EPS = 1e-6  # of the norms


@dataclass(frozen=True)
class Setting:
    """Shapes (Hq, Hkv, D, H, I, V and a block's tokens), dtype and device."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def num_multiprocessors(self) -> int:
        """Of a GPU; 1 elsewhere."""
        if not self.on_gpu:
            return 1
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def starts_early(self, rows: int) -> bool:
        """Whether the engines start kernels on so many rows before the last one has ended."""
        if not self.on_gpu:
            return False
        from common.ops.fused import launches_early  # needs Triton

        return launches_early(rows, self.device)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def scale(self) -> float:
        """Factor on the scores of attention."""
        return self.head_dim**-0.5

    @cached_property
    def pool(self) -> Pool:
        return Pool(self)

    def copies(self, num_bytes: int) -> int:
        """How many inputs of this size are more than a cache memory holds."""
        enough = -(-ROTATED_BYTES[self.device.type] // max(num_bytes, 1))
        return min(max(enough, 2), MAX_COPIES)

    def random(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def weight(self, out_features: int, in_features: int) -> Tensor:
        """A matrix that leaves the size of what it is multiplied with about as it is."""
        return self.random(out_features, in_features).mul_(in_features**-0.5)

    def packed_qkv(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[T, Hq, D]``, k and v ``[T, Hkv, D]`` as a projection leaves them: strided rows."""
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        packed = self.random(num_tokens, sum(heads), self.head_dim)
        return packed.split(heads, dim=1)

    def rotation(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """cos, sin ``[T, 1, D]`` of the first positions, as `common.rope.RotaryEmbedding` does."""
        half = self.head_dim // 2
        frequency = 1e6 ** (-torch.arange(half) / half)
        angle = torch.arange(num_tokens)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        table = torch.cat((cos, cos, -sin, sin), dim=-1)[:, None].to(self.device, self.dtype)
        return table.chunk(2, dim=-1)


class Pool:
    """A paged cache with random contents, ``[num_blocks, block_size, Hkv, D]``."""

    def __init__(self, setting: Setting) -> None:
        self.block_size = setting.block_size
        self.device = setting.device
        num_bytes = POOL_BYTES[setting.device.type]
        self.num_blocks = num_bytes // (setting.kv_bytes_per_token * setting.block_size)
        size = (self.num_blocks, setting.block_size, setting.num_kv_heads, setting.head_dim)
        self.keys, self.values = setting.random(*size), setting.random(*size)

    def tables(self, lens: Sequence[int], at_most: int = MAX_COPIES) -> list[Tensor]:
        """Block tables ``[B, max_blocks]`` int32 for several batches of sequences of these lengths.

        The batches have blocks of their own, scattered over the pool, as far as it goes.

        Raises:
            ValueError: the pool is too small for a single batch.
        """
        sizes = -(-torch.tensor(lens) // self.block_size)
        needed, longest = int(sizes.sum()), int(sizes.max())
        count = min(at_most, self.num_blocks // needed)
        if count == 0:
            raise ValueError(
                f"{sum(lens)} cached tokens need more memory than the bench takes for them "
                f"({self.num_blocks * self.block_size} tokens)"
            )
        blocks = torch.randperm(self.num_blocks)[: count * needed].int().view(count, needed)
        rows = torch.arange(len(sizes)).repeat_interleave(sizes)
        columns = torch.arange(needed) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        tables = torch.zeros(count, len(sizes), longest, dtype=torch.int32)
        tables[:, rows, columns] = blocks
        return [table.clone() for table in tables.to(self.device)]  # each aligned

    def slots(self, table: Tensor, positions: Tensor) -> Tensor:
        """Slots ``[B, N]`` int64 of each sequence's tokens at ``positions`` ``[B, N]`` int64."""
        blocks = table.long().gather(1, positions // self.block_size)
        return blocks * self.block_size + positions % self.block_size

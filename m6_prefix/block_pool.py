"""The blocks of the paged KV cache and who holds them. Pure Python: ids and counts, no tensors.

A block is room for ``block_size`` tokens in every layer. Several sequences may hold the same block
(samples of one prompt do); it returns to the free list when the last one lets go.
"""

from __future__ import annotations

from collections.abc import Sequence


class BlockPool:
    """Reference-counted blocks with a free list; every operation takes O(1) for a block.

    Raises:
        ValueError: there is not a single block.
        RuntimeError: a block is released or shared that nobody holds, or taken when none is free.
            Each is a fault of the caller, and going on would hand one block to two owners.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError("the KV cache has no room for a single block: give it more memory")
        self.num_blocks = num_blocks
        # How many sequences hold each. Others only read it: loops over a whole batch, which have no
        # time to call ``ref_count`` for each.
        self.ref_counts = [0] * num_blocks
        # A stack: the block freed last is the one most likely still in a processor's cache.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_allocated(self) -> int:
        return self.num_blocks - len(self._free)

    def ref_count(self, block: int) -> int:
        """How many sequences hold a block."""
        return self.ref_counts[block]

    def allocate(self) -> int:
        """Take a free block; the caller is its only holder."""
        if not self._free:
            raise RuntimeError("no free block: check num_free first")
        block = self._free.pop()
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a holder to a block in use."""
        self.share_all((block,))

    def release(self, block: int) -> bool:
        """Let go of a block; True when that made it free."""
        return bool(self.release_all((block,)))

    def share_all(self, blocks: Sequence[int]) -> None:
        """``share`` each: a sequence has hundreds, and a call for each would take longer."""
        counts = self.ref_counts
        for block in blocks:
            if counts[block] == 0:
                raise RuntimeError(f"block {block} is free and cannot be shared")
            counts[block] += 1

    def release_all(self, blocks: Sequence[int]) -> list[int]:
        """``release`` each, in this order; returns those that this made free."""
        counts, free = self.ref_counts, self._free
        num_free = len(free)
        for block in blocks:
            count = counts[block]
            if count == 1:
                free.append(block)
            elif count == 0:
                raise RuntimeError(f"block {block} was released twice")
            counts[block] = count - 1
        return free[num_free:]

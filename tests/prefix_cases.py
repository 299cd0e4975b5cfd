"""Sequences that behave, over an index of cached prefixes."""

from __future__ import annotations

from hypothesis import strategies as st

from m6_prefix.block_pool import BlockPool
from m6_prefix.hash_index import HashIndex
from m6_prefix.prefix_tree import PrefixTree

INDEX_CLASSES = {"tree": PrefixTree, "hash": HashIndex}
SIZE = 3
# Two different tokens and short blocks: prefixes meet and part all the time.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=16)


def num_common(a, b):
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def paths(tokens):
    """Its full-block prefixes, the shortest first."""
    return [tuple(tokens[:end]) for end in range(SIZE, len(tokens) + 1, SIZE)]


class Cache:
    """An index over a pool, and sequences that behave."""

    def __init__(self, index_class, num_blocks=64, block_size=4, pool_class=BlockPool, **options):
        self.pool = pool_class(num_blocks)
        self.index = index_class(self.pool, block_size, **options)
        self.block_size = block_size

    def compute(self, tokens):
        """Hold blocks for a sequence, with no look at the index, and insert them."""
        table = [self.pool.allocate() for _ in range(-(-len(tokens) // self.block_size))]
        self.index.insert(tokens, table)
        return table

    def release(self, table):
        for block in reversed(table):
            self.index.release(block)

    def remember(self, tokens):
        """Compute a sequence and let go of it."""
        table = self.compute(tokens)
        self.release(table)
        return table

    def blocks(self, tokens, max_tokens=None):
        return self.index.match(tokens, max_tokens).blocks


def run(first, length):
    return list(range(first, first + length))

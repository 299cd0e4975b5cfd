"""Finds the cached blocks that begin as a new prompt does: the interface, and a table of hashes.

The interface of every index of prefixes stands first (``PrefixIndex``); the radix tree that is our
default is in ``prefix_tree.py``. The table below finds the same prefixes in another way, the one of
vLLM's automatic prefix caching: give each full block a name that is computed from the name of the
block before it and from its own token ids. Equal names then mean equal sequences up to here, and a
dictionary from names to blocks is all there is to keep::

    block:  [the quick] [brown fox] [jumps over]       names: h1 = hash(root, "the quick")
                h1  ->      h2  ->      h3                     h2 = hash(h1, "brown fox") ...

What the tree has in its shape, this has in its names: no nodes, nothing to split, and a prefix is
looked up block by block until a name is missing. In return a name says nothing about its
neighbours: there is no asking for a block that begins like ours, so no partial match; and when a
block goes, those behind it stay in the table, unreachable until its like is inserted again.

Equal names need not mean equal sequences: hashes collide. vLLM makes that unlikely enough with
SHA-256. Here the token ids themselves are compared on every hit, so that a fast 64-bit hash will
do: a collision can cost a hit and never gives wrong tokens.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

TOKEN_BYTES = array("I").itemsize


class ReferenceCounts(Protocol):
    """What an index needs of the block pool."""

    ref_counts: list[int]

    def ref_count(self, block: int) -> int: ...
    def share(self, block: int) -> None: ...
    def share_all(self, blocks: Sequence[int]) -> None: ...
    def release(self, block: int) -> bool: ...
    def release_all(self, blocks: Sequence[int]) -> list[int]: ...


@dataclass(frozen=True)
class Match:
    """The cached beginning of a sequence.

    ``partial_block``, if any, goes on with ``num_partial_tokens`` more of the sequence's tokens and
    then differs, or the caller's limit is reached: copy it, and compute only what is behind them.
    """

    blocks: list[int]  # full blocks, in order
    num_tokens: int  # in those
    num_asked: int  # tokens of the sequence that was looked up
    version: int  # of the index: a match is void once blocks have been evicted
    partial_block: int | None = None
    num_partial_tokens: int = 0

    def without_partial(self) -> Match:
        """The same without the block to copy, for when there is no room for the copy."""
        return replace(self, partial_block=None, num_partial_tokens=0)


@dataclass
class PrefixStats:
    """Counters since the start; those of the first paragraph tell the state now."""

    num_blocks: int = 0
    num_nodes: int = 0
    num_evictable: int = 0

    num_queries: int = 0  # matches acquired, empty ones too
    num_hits: int = 0  # those with at least one token
    num_query_tokens: int = 0
    num_hit_tokens: int = 0  # copied ones of a partial block too
    num_inserted: int = 0  # blocks, as all below
    num_replaced: int = 0  # idle ones that gave way to a sequence's own
    num_duplicates: int = 0  # not taken: another sequence holds its own, or what is before them
    num_evicted: int = 0
    num_compared: int = 0  # comparisons of one block's token ids, by match and insert
    num_collisions: int = 0  # of the hash index: blocks whose hash was another block's

    def count_acquired(self, match: Match) -> None:
        num_hit_tokens = match.num_tokens + match.num_partial_tokens
        self.num_queries += 1
        self.num_hits += num_hit_tokens > 0
        self.num_query_tokens += match.num_asked
        self.num_hit_tokens += num_hit_tokens


class PrefixIndex(Protocol):
    """What the cache asks of an index of prefixes, be it this tree or a table of hashes.

    Sequences take and return blocks of the index through it (``acquire``, ``release``), so that it
    knows at any moment which are idle. Sharing one that a sequence holds may go straight to the
    pool, and so may all there is to do with other blocks.

    Whoever holds a block of the index holds all blocks of the index before it. ``acquire`` and
    ``insert`` see to that, and it is why every block that no sequence holds can be evicted, and
    nothing ever stays behind that no walk leads to.

    Attributes:
        num_changes: grows with whatever may change what a match finds.
    """

    num_changes: int

    def match(
        self,
        token_ids: Sequence[int],
        max_tokens: int | None = None,
        keys: tuple[list[bytes], bytes] | None = None,
    ) -> Match:
        """The longest cached prefix. Changes nothing, so a waiting request may ask again and again.

        A caller that needs the last token's logits has to compute that token even if all are
        cached: it asks for at most ``len(token_ids) - 1``.

        Args:
            keys: ``block_keys`` of those tokens, if the caller has kept them.
        """

    def acquire(self, match: Match) -> list[int]:
        """Hold a match's blocks for a sequence, partial block included, and count the hit.

        Each is to be released once; the partial block as soon as its copy is under way.

        Returns:
            Which of ``match.blocks`` no sequence had held.

        Raises:
            RuntimeError: blocks were evicted since the match; it may name some of them.
        """

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int]) -> int:
        """Let later sequences find a sequence's full blocks, all of them computed and held by it.

        To be called again when more are full: blocks that the index has from this sequence, or
        gave to it, are passed over. Where the index has another block with the same tokens after
        the same prefix, an idle one gives way to the sequence's own. One that another sequence
        holds stays, and nothing is taken from there on: what comes behind would keep it from being
        evicted, and its holder knows nothing of that.

        Args:
            token_ids: the whole sequence; what is behind its last full block is not looked at.
            blocks: its block table, which may be longer or shorter.

        Returns:
            How many of the sequence's blocks the index has now, from the first on.

        Raises:
            ValueError: a token id does not fit 32 bits (a placeholder of a token to come?).
            RuntimeError: a block is free, is given twice, or holds other tokens than these.
        """

    def release(self, block: int) -> bool:
        """Let go of any block for a sequence; True when no sequence holds it any more."""

    def release_all(self, blocks: Sequence[int]) -> list[int]:
        """``release`` each, in this order and none twice: a sequence has hundreds.

        Returns:
            Those that no sequence holds any more.
        """

    def num_evictable(self, beside: Match | None = None) -> int:
        """How many blocks ``evict`` could free now, or once ``beside`` is acquired."""

    def evict(self, num_blocks: int) -> list[int]:
        """Free up to so many idle blocks, the least recently used first; returns them."""

    def clear(self) -> list[int]:
        """Forget everything; returns the blocks which that made free."""

    def stats(self) -> PrefixStats: ...

    def snapshot(self) -> list[tuple[int | None, list[int]]]:
        """What it looks like now, for people: the blocks of each node, and the first block of the
        node above it, None at the root. Takes O(nodes)."""


def block_keys(token_ids: Sequence[int], block_size: int) -> tuple[list[bytes], bytes]:
    """Token ids of each full block and those left over, as bytes: fast to compare and to hash."""
    try:
        packed = array("I", token_ids)  # of an array of the same kind: one copy of memory
    except OverflowError:
        raise ValueError("token ids of a prefix are known ones, 0 to 2**32 - 1") from None
    num_full = len(packed) // block_size
    keys = np.frombuffer(packed, f"V{TOKEN_BYTES * block_size}", num_full).tolist()
    return keys, packed[num_full * block_size :].tobytes()


def num_passed_over(blocks: Sequence[int], end: int, known: Container[int]) -> int:
    """Where an insertion begins: behind the last of the first ``end`` blocks that is known."""
    while end and blocks[end - 1] not in known:
        end -= 1
    return end


def check_version(match: Match, version: int) -> None:
    if match.version != version:
        raise RuntimeError("blocks were evicted since this match: match again, then acquire")


def check_new_blocks(blocks: Sequence[int], pool: ReferenceCounts) -> None:
    """Refuse blocks that cannot be a sequence's own, before anything has changed."""
    if len(set(blocks)) < len(blocks):
        raise RuntimeError(f"a block is given twice among {list(blocks)}")
    for block in blocks:
        if not pool.ref_count(block):
            raise RuntimeError(f"block {block} is free and cannot be inserted")


class _Entry:
    """A block in the table."""

    __slots__ = ("block", "key", "name", "parent")

    def __init__(self, name: int, parent: _Entry | None, key: bytes, block: int) -> None:
        self.name = name
        self.parent = parent  # what stood before it when it came, be it in the table or not
        self.key = key
        self.block = block


class HashIndex:
    """The table of hashes; see ``PrefixIndex`` for what its methods promise.

    The least recently used block is the one released the longest ago. Release a sequence's blocks
    last one first, so that the end of a prefix goes before its beginning.

    Match, acquire and insert take O(tokens) as the tree's do; release and eviction O(1) a block.

    Args:
        extra: whatever else the cached values depend on (model, adapter); part of every name.
        hash_block: name of a block from that of the block before it and its token ids.
    """

    def __init__(
        self,
        pool: ReferenceCounts,
        block_size: int,
        *,
        extra: Hashable = None,
        hash_block: Callable[[int, bytes], int] = lambda parent, key: hash((parent, key)),
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._root_name = hash(extra)
        self._hash_block = hash_block
        self._stats = PrefixStats()
        self._version = 0
        self.num_changes = 0
        self._reset()

    def _reset(self) -> None:
        self._entries: dict[int, _Entry] = {}  # by name
        self._entry_of: dict[int, _Entry] = {}  # by block
        # Blocks that no sequence holds, the one released first in front. A linked list, where a
        # plain dict would search for its front among all that it has lost.
        self._idle: OrderedDict[int, None] = OrderedDict()

    def match(
        self,
        token_ids: Sequence[int],
        max_tokens: int | None = None,
        keys: tuple[list[bytes], bytes] | None = None,
    ) -> Match:
        full_keys, _ = keys or block_keys(token_ids[:max_tokens], self._block_size)
        blocks: list[int] = []
        parent = None
        for key in full_keys:
            _, parent = self._find(parent, key)
            if parent is None:
                break
            blocks.append(parent.block)
        return Match(
            blocks=blocks,
            num_tokens=len(blocks) * self._block_size,
            num_asked=len(token_ids),
            version=self._version,
        )

    def acquire(self, match: Match) -> list[int]:
        check_version(match, self._version)
        self._stats.count_acquired(match)
        taken = [block for block in match.blocks if block in self._idle]
        for block in taken:
            del self._idle[block]
        self._pool.share_all(match.blocks)
        return taken

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int]) -> int:
        size = self._block_size
        end = min(len(blocks), len(token_ids) // size)
        first = num_passed_over(blocks, end, self._entry_of)
        # The block before the first tells by its tokens whether this sequence is what it says.
        begin = max(first - 1, 0)
        keys, _ = block_keys(token_ids[begin * size : end * size], size)
        parent = self._entry_of[blocks[begin]] if first else None
        if parent is not None and parent.key != keys.pop(0):
            raise RuntimeError(f"block {parent.block} is in the index with other tokens")
        check_new_blocks(blocks[first:end], self._pool)
        for place, key in enumerate(keys, start=first):
            name, entry = self._find(parent, key)
            if entry is not None and entry.block in self._idle:
                self._replace(entry, blocks[place])
            elif entry is not None or name in self._entries:
                # It is held, or another block has the name: nobody could find what comes behind.
                self._stats.num_duplicates += end - place
                return place
            else:
                entry = _Entry(name, parent, key, blocks[place])
                self._pool.share(entry.block)
                self._entries[name] = self._entry_of[entry.block] = entry
                self._stats.num_inserted += 1
                self.num_changes += 1
            parent = entry
        return end

    def release(self, block: int) -> bool:
        return bool(self.release_all((block,)))

    def release_all(self, blocks: Sequence[int]) -> list[int]:
        freed = self._pool.release_all(blocks)
        ref_counts, entry_of = self._pool.ref_counts, self._entry_of
        idle = [block for block in blocks if block in entry_of and ref_counts[block] == 1]
        self._idle.update(dict.fromkeys(idle))
        return freed + idle

    def num_evictable(self, beside: Match | None = None) -> int:
        matched = beside.blocks if beside is not None else ()
        return len(self._idle) - sum(block in self._idle for block in matched)

    def evict(self, num_blocks: int) -> list[int]:
        freed: list[int] = []
        while self._idle and len(freed) < num_blocks:
            block, _ = self._idle.popitem(last=False)
            del self._entries[self._entry_of.pop(block).name]
            self._pool.release(block)
            freed.append(block)
        self._stats.num_evicted += len(freed)
        self._void_matches(len(freed))
        return freed

    def clear(self) -> list[int]:
        freed = [block for block in self._entry_of if self._pool.release(block)]
        self._void_matches(1)
        self._reset()
        return freed

    def stats(self) -> PrefixStats:
        num_blocks = len(self._entries)
        return replace(
            self._stats,
            num_blocks=num_blocks,
            num_nodes=num_blocks,
            num_evictable=len(self._idle),
        )

    def snapshot(self) -> list[tuple[int | None, list[int]]]:
        nodes: list[tuple[int | None, list[int]]] = []
        for block, entry in self._entry_of.items():
            upper = entry.parent
            is_there = upper is not None and self._entry_of.get(upper.block) is upper
            nodes.append((upper.block if is_there else None, [block]))
        return nodes

    def _replace(self, entry: _Entry, block: int) -> None:
        """Let a sequence's own block stand in place of an idle one with the same tokens."""
        del self._entry_of[entry.block], self._idle[entry.block]
        self._pool.release(entry.block)
        self._pool.share(block)
        entry.block = block
        self._entry_of[block] = entry
        self._stats.num_replaced += 1
        self._void_matches(1)

    def _void_matches(self, num_gone: int) -> None:
        self._version += num_gone
        self.num_changes += num_gone

    def _find(self, parent: _Entry | None, key: bytes) -> tuple[int, _Entry | None]:
        """Name of the block with these tokens behind ``parent``, and the entry if there is one."""
        name = self._hash_block(self._root_name if parent is None else parent.name, key)
        entry = self._entries.get(name)
        if entry is None:
            return name, None
        self._stats.num_compared += 1
        if entry.key != key or not self._follows(entry, parent):
            self._stats.num_collisions += 1
            return name, None
        return name, entry

    def _follows(self, entry: _Entry, parent: _Entry | None) -> bool:
        """Whether what stands before an entry equals ``parent`` and all before that."""
        ours, theirs = entry.parent, parent
        while ours is not theirs:
            if ours is None or theirs is None or ours.key != theirs.key:
                return False
            self._stats.num_compared += 1
            ours, theirs = ours.parent, theirs.parent
        entry.parent = parent  # an equal one that has taken its place: next time they are the same
        return True

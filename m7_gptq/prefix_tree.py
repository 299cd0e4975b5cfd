"""Finds the cached blocks that begin as a new prompt does: a radix tree over full KV blocks.

Keys and values of a token depend on the tokens before it and on nothing else. So two sequences that
begin alike have the same cache up to where they part, and whoever comes second may read the first
one's blocks instead of computing them. What it takes is a way to find them. A tree does it: walk
down from the root along the prompt; where the walk ends, the known prefix ends (RadixAttention:
Zheng et al., SGLang, 2024, section 3)::

    root ── [S1 S2 S3] ─┬─ [A1 A2]         S: a system prompt, three blocks long
                        └─ [B1 B2 B3 B4]   A, B: two conversations that go on from it

The letters of this tree are whole blocks of token ids, and an edge is a run of them, so a long
prompt costs one node and not one for every block. An edge is split only where sequences part, and
always between two blocks. Blocks that are still filling are not in the tree: they change.

Who holds a block. The tree is one holder of each of its blocks in the pool, sequences are others.
A block whose last sequence has let go stays, as idle room that may be taken: ``evict`` is called
when the pool runs dry and gives up the idle blocks that were let go of the longest ago. A block
goes only after everything that follows it, because without it nobody could walk there.

That order needs no clock and no heap. A sequence that holds a block holds all before it (``insert``
takes nothing behind a block of somebody else), so a node becomes idle after its children or
together with them. List the idle nodes in the order in which they became so, children first, and
the front of the list is a leaf, and the least recently used one: each eviction takes O(1).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from .hash_index import (
    TOKEN_BYTES,
    Match,
    PrefixStats,
    ReferenceCounts,
    block_keys,
    check_new_blocks,
    check_version,
    num_passed_over,
)


class _Node:
    """An edge of the tree, with the node at its lower end."""

    __slots__ = ("blocks", "children", "depth", "keys", "order", "parent", "pins")

    def __init__(
        self, parent: _Node | None, depth: int, keys: list[bytes], blocks: list[int]
    ) -> None:
        self.parent = parent
        self.depth = depth  # blocks on the way from the root to this edge
        self.keys = keys  # the token ids of each block
        self.blocks = blocks
        self.children: dict[bytes, _Node] = {}  # by their first key
        self.order: list[bytes] = []  # the same keys sorted, to find the most similar one
        self.pins = 0  # blocks of this edge that a sequence holds, and children with pins

    def add(self, child: _Node) -> None:
        self.children[child.keys[0]] = child
        insort(self.order, child.keys[0])

    def remove(self, first_key: bytes) -> None:
        del self.children[first_key]
        del self.order[bisect_left(self.order, first_key)]


class PrefixTree:
    """The radix tree; see ``PrefixIndex`` for what its methods promise.

    With T the tokens given: match and acquire take O(T), insert takes O(T) for the tokens behind
    the blocks it passes over, release O(1) and eviction O(1) for a block, amortised over nodes.
    (Beside that, finding the block to copy and adding a child take the logarithm of the number of
    siblings, and a split moves what is behind it in its edge, as two memory copies.)
    """

    def __init__(self, pool: ReferenceCounts, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._stats = PrefixStats()
        self._version = 0
        self.num_changes = 0
        self._reset()

    def _reset(self) -> None:
        self._root = _Node(None, 0, [], [])
        self._node_of: dict[int, _Node] = {}  # by block
        self._num_nodes = 0
        # Nodes without pins, in the order in which they lost the last one; a linked list, where
        # a plain dict would search for its front among all that it has lost.
        self._idle: OrderedDict[_Node, None] = OrderedDict()
        self._num_evictable = 0  # their blocks

    def match(
        self,
        token_ids: Sequence[int],
        max_tokens: int | None = None,
        keys: tuple[list[bytes], bytes] | None = None,
    ) -> Match:
        full_keys, left_over = keys or block_keys(token_ids[:max_tokens], self._block_size)
        node, offset, blocks = self._walk(self._root, 0, full_keys)
        rest = full_keys[len(blocks)] if len(blocks) < len(full_keys) else left_over
        partial_block, num_partial_tokens = self._most_similar(node, offset, rest)
        return Match(
            blocks=blocks,
            num_tokens=len(blocks) * self._block_size,
            num_asked=len(token_ids),
            version=self._version,
            partial_block=partial_block,
            num_partial_tokens=num_partial_tokens,
        )

    def acquire(self, match: Match) -> list[int]:
        check_version(match, self._version)
        self._stats.count_acquired(match)
        taken: list[int] = []
        if match.blocks:
            node = self._node_of[match.blocks[-1]]
            # What is behind the match in its edge stays evictable: it becomes a node of its own.
            node = self._cut(node, len(match.blocks) - node.depth)
            while node.parent is not None:
                taken += self._hold(node)
                node = node.parent
        if match.partial_block is not None:
            node = self._node_of[match.partial_block]
            self._hold(self._cut(node, len(match.blocks) + 1 - node.depth))
        return taken

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int]) -> int:
        size = self._block_size
        end = min(len(blocks), len(token_ids) // size)
        first = num_passed_over(blocks, end, self._node_of)
        # The block before the first tells by its tokens whether this sequence is what it says.
        begin = max(first - 1, 0)
        keys, _ = block_keys(token_ids[begin * size : end * size], size)
        node, offset = self._root, 0
        if first:
            node = self._node_of[blocks[begin]]
            offset = first - node.depth
            if not 0 < offset <= len(node.blocks) or node.keys[offset - 1] != keys.pop(0):
                raise RuntimeError(f"block {blocks[begin]} is in the index with other tokens")
        check_new_blocks(blocks[first:end], self._pool)
        node, offset, found = self._walk(node, offset, keys)
        if found and self._pool.ref_count(found[0]) > 1:
            self._stats.num_duplicates += end - first
            return first
        place = first + len(found)
        if place < end or found:
            node = self._cut(node, offset)
        if found:
            # Nobody holds the first of them, hence nobody any that comes behind it.
            self._replace(node, list(blocks[first:place]))
        if place < end:
            self._append(node, keys[len(found) :], list(blocks[place:end]), ours=place > 0)
            self._stats.num_inserted += end - place
            self.num_changes += 1
        return end

    def release(self, block: int) -> bool:
        return bool(self.release_all((block,)))

    def release_all(self, blocks: Sequence[int]) -> list[int]:
        unheld, ref_counts = self._pool.release_all(blocks), self._pool.ref_counts
        place = 0
        while place < len(blocks):
            node, run = self._node_of.get(blocks[place]), 1
            if node is not None:
                # Mostly a sequence lets go of a whole edge, whose blocks have the same holders.
                length = len(node.blocks)
                may_be = 1 < length <= len(blocks) - place and blocks[place] == node.blocks[-1]
                if may_be and list(blocks[place : place + length]) == node.blocks[::-1]:
                    run = length
                if ref_counts[blocks[place]] == 1:
                    self._unpin(node, run)
                    unheld += blocks[place : place + run]
            place += run
        return unheld

    def num_evictable(self, beside: Match | None = None) -> int:
        if beside is None:
            return self._num_evictable
        num_evictable, end = self._num_evictable, len(beside.blocks)
        held = beside.blocks[-1:]
        if beside.partial_block is not None:
            held, end = [beside.partial_block], end + 1
        node = self._node_of[held[0]] if held else self._root
        while node.parent is not None and not node.pins:
            num_evictable -= end - node.depth
            node, end = node.parent, node.depth
        return num_evictable

    def evict(self, num_blocks: int) -> list[int]:
        freed: list[int] = []
        while self._idle and len(freed) < num_blocks:
            node = next(iter(self._idle))  # a leaf: see the top of this file
            first_key = node.keys[0]
            for _ in range(min(num_blocks - len(freed), len(node.blocks))):
                node.keys.pop()
                block = node.blocks.pop()
                del self._node_of[block]
                self._pool.release(block)
                freed.append(block)
            if not node.blocks:
                del self._idle[node]
                node.parent.remove(first_key)
                self._num_nodes -= 1
        self._num_evictable -= len(freed)
        self._stats.num_evicted += len(freed)
        self._void_matches(len(freed))
        return freed

    def clear(self) -> list[int]:
        freed = [block for block in self._node_of if self._pool.release(block)]
        self._void_matches(1)
        self._reset()
        return freed

    def stats(self) -> PrefixStats:
        return replace(
            self._stats,
            num_blocks=len(self._node_of),
            num_nodes=self._num_nodes,
            num_evictable=self._num_evictable,
        )

    def snapshot(self) -> list[tuple[int | None, list[int]]]:
        nodes: list[tuple[int | None, list[int]]] = []
        below = list(self._root.children.values())
        while below:
            node = below.pop()
            upper = node.parent.blocks[0] if node.parent.blocks else None
            nodes.append((upper, list(node.blocks)))
            below += node.children.values()
        return nodes

    def _walk(
        self, node: _Node, offset: int, keys: Sequence[bytes]
    ) -> tuple[_Node, int, list[int]]:
        """Follow ``keys`` from behind the first ``offset`` blocks of a node, as far as they lead.

        Returns the node and offset where the walk ends, and the blocks on the way.
        """
        found: list[int] = []
        while len(found) < len(keys):
            if offset == len(node.blocks):
                child = node.children.get(keys[len(found)])
                self._stats.num_compared += 1
                if child is None:
                    break
                node, offset = child, 0
            length = _common_length(node.keys, offset, keys, len(found))
            self._stats.num_compared += length + 1
            found += node.blocks[offset : offset + length]
            offset += length
            if offset < len(node.blocks):
                break
        return node, offset, found

    def _most_similar(self, node: _Node, offset: int, rest: bytes) -> tuple[int | None, int]:
        """The block behind a place that begins with most of the tokens in ``rest``, and how many.

        Of sorted strings, one of the two between which another one belongs is most like it.
        """
        if offset < len(node.blocks):
            candidates = [(node.keys[offset], node.blocks[offset])]
        else:
            place = bisect_left(node.order, rest)
            near = node.order[max(place - 1, 0) : place + 1]
            candidates = [(key, node.children[key].blocks[0]) for key in near]
        best_block, most = None, 0
        for key, block in candidates:
            num_tokens = _num_common_tokens(key, rest)
            if num_tokens > most:
                best_block, most = block, num_tokens
        return best_block, most

    def _replace(self, node: _Node, blocks: list[int]) -> None:
        """Let a sequence's own blocks stand in place of idle ones, the last of which end ``node``.

        As in ``_append`` all blocks of an edge get the same holders.
        """
        ref_count = self._pool.ref_count
        self._stats.num_replaced += len(blocks)
        self._void_matches(len(blocks))
        while blocks:
            mine = blocks[-len(node.blocks) :]
            _, same = next(groupby(reversed(mine), ref_count))
            mine = mine[-len(list(same)) :]
            del blocks[-len(mine) :]
            self._cut(node, len(node.blocks) - len(mine))  # what is behind the cut is still `node`
            for old, new in zip(node.blocks, mine, strict=True):
                del self._node_of[old]
                self._pool.release(old)
                self._pool.share(new)
                self._node_of[new] = node
            node.blocks = mine
            self._pin(node, len(mine))
            node = node.parent

    def _void_matches(self, num_gone: int) -> None:
        self._version += num_gone
        self.num_changes += num_gone

    def _append(self, node: _Node, keys: list[bytes], blocks: list[int], *, ours: bool) -> None:
        """Take in blocks that a sequence holds, behind the end of a node's edge.

        All blocks of an edge have the same holders, so that none has to stay because of another one
        in its edge. Hence an edge grows only if it is ``ours``, the sequence's, and nobody else's;
        and where samples of a prompt hold but the first of these blocks, two edges follow.
        """
        ref_count = self._pool.ref_count
        begin = 0
        for _, same in groupby([ref_count(block) for block in blocks]):
            end = begin + len(list(same))
            run_keys, run = keys[begin:end], blocks[begin:end]
            self._pool.share_all(run)
            if ours and not node.children and ref_count(node.blocks[-1]) == 2:
                node.keys += run_keys
                node.blocks += run
                node.pins += len(run)
            else:
                parent = node
                node = _Node(parent, parent.depth + len(parent.blocks), run_keys, run)
                node.pins = len(run)
                parent.add(node)
                self._pin(parent, 1)
                self._num_nodes += 1
            self._node_of.update(dict.fromkeys(run, node))
            ours, begin = True, end

    def _cut(self, node: _Node, length: int) -> _Node:
        """Split an edge behind its first ``length`` blocks; returns the node which they are now.

        The lower part keeps its identity, and with it its children and its place among the idle.
        """
        if length in (0, len(node.blocks)):
            return node
        upper = _Node(node.parent, node.depth, node.keys[:length], node.blocks[:length])
        node.parent.children[upper.keys[0]] = upper
        del node.keys[:length], node.blocks[:length]
        node.parent = upper
        node.depth += length
        upper.add(node)
        self._node_of.update(dict.fromkeys(upper.blocks, upper))
        self._num_nodes += 1
        if not node.pins:
            self._idle[upper] = None
            return upper
        upper.pins = sum(self._pool.ref_count(block) > 1 for block in upper.blocks)
        node.pins -= upper.pins
        if node.pins:
            upper.pins += 1
        else:
            self._idle[node] = None
            self._num_evictable += len(node.blocks)
        return upper

    def _hold(self, node: _Node) -> list[int]:
        """Share all blocks of a node with a sequence; returns those that were idle."""
        ref_counts, idle = self._pool.ref_counts, list(node.blocks)
        if node.pins:
            idle = [block for block in idle if ref_counts[block] == 1]
        self._pool.share_all(node.blocks)
        if idle:
            self._pin(node, len(idle))
        return idle

    def _pin(self, node: _Node, count: int) -> None:
        while node.pins == 0 and node.parent is not None:
            del self._idle[node]
            self._num_evictable -= len(node.blocks)
            node.pins, count = count, 1
            node = node.parent
        node.pins += count

    def _unpin(self, node: _Node, count: int) -> None:
        node.pins -= count
        while node.pins == 0 and node.parent is not None:
            self._idle[node] = None
            self._num_evictable += len(node.blocks)
            node = node.parent
            node.pins -= 1


def _common_length(a: Sequence[bytes], a_begin: int, b: Sequence[bytes], b_begin: int) -> int:
    """How many items two sequences have in common from given places on."""
    length = min(len(a) - a_begin, len(b) - b_begin)
    ours, theirs = a[a_begin : a_begin + length], b[b_begin : b_begin + length]
    if ours == theirs:  # as it mostly is, and then there is no loop in Python
        return length
    return next(i for i, (x, y) in enumerate(zip(ours, theirs, strict=True)) if x != y)


def _num_common_tokens(a: bytes, b: bytes) -> int:
    length = min(len(a), len(b))
    for begin in range(0, length, TOKEN_BYTES):
        if a[begin : begin + TOKEN_BYTES] != b[begin : begin + TOKEN_BYTES]:
            return begin // TOKEN_BYTES
    return length // TOKEN_BYTES

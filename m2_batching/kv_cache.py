"""Which sequence owns which slot of the cache. Pure bookkeeping: no tensors here.

The cache is one piece of memory for ``num_tokens`` tokens, cut into equal slots of ``slot_len``
tokens, one per running sequence::

    |<- slot 0, slot_len ->|<- slot 1 ------------->|<- slot 2 ------------->| ...
    | A A A A A A . . . .  | B B B . . . . . . . .  | C C C C C C C C . . .  |

Two invariants make the model runner's life easy, and ``Move`` is what they cost:

* slots 0 to n-1 are the running sequences, without holes: the batch is a slice of the cache and
  attention reads it in place. When a sequence leaves, the last one moves into its slot.
* every sequence fits into ``slot_len``. When the longest is about to outgrow it, slots double, so
  half as many fit into the same memory; all sequences move, and some may have to be preempted.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.request import Request

_SHORTEST_SLOT = 16


@dataclass(frozen=True)
class Move:
    """Copy the cache of ``num_tokens`` tokens between two places, both in tokens from the start."""

    source: int
    target: int
    num_tokens: int


class SlotCache:
    """Slots of one common length that grows when a sequence does.

    Args:
        num_tokens: size of the cache in tokens.
        max_num_seqs: never more slots than this.
        max_model_len: no sequence is longer, so no slot needs to be. At most ``num_tokens``.
    """

    def __init__(self, num_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
        self.num_tokens = num_tokens
        self._max_num_seqs = max_num_seqs
        self._max_len = max_model_len
        self._shortest = max(num_tokens // max_num_seqs, _SHORTEST_SLOT)
        self.slot_len = self.slot_len_for(1)
        self.running: list[Request] = []  # index = slot
        self._slot_of: dict[str, int] = {}
        self._moves: list[Move] = []

    @property
    def num_slots(self) -> int:
        return self.num_slots_at(self.slot_len)

    def num_slots_at(self, slot_len: int) -> int:
        """How many slots of that length the memory holds."""
        return min(self._max_num_seqs, self.num_tokens // slot_len)

    def slot_len_for(self, num_tokens: int) -> int:
        """The shortest slot length on offer (doubling from the shortest) that holds a sequence."""
        slot_len = self._shortest
        while slot_len < num_tokens:
            slot_len *= 2
        return min(slot_len, self._max_len)

    def slot(self, request: Request) -> int:
        return self._slot_of[request.key]

    def allocate(self, request: Request) -> int:
        """Give a sequence the next slot. There must be one: ``len(running) < num_slots``."""
        slot = len(self.running)
        self.running.append(request)
        self._slot_of[request.key] = slot
        return slot

    def free(self, request: Request) -> None:
        """Take a sequence out; the last one closes the gap."""
        slot = self._slot_of.pop(request.key)
        last = self.running.pop()
        if last is not request:
            source = len(self.running) * self.slot_len
            self._moves.append(Move(source, slot * self.slot_len, last.num_computed_tokens))
            self.running[slot] = last
            self._slot_of[last.key] = slot

    def resize(self, slot_len: int) -> None:
        """Cut the memory anew. The running sequences must fit: ``num_slots_at(slot_len)``."""
        # Growing pushes sequences to the right, so the last goes first; shrinking, the first.
        order = range(len(self.running))
        for slot in reversed(order) if slot_len > self.slot_len else order:
            num_tokens = self.running[slot].num_computed_tokens
            self._moves.append(Move(slot * self.slot_len, slot * slot_len, num_tokens))
        self.slot_len = slot_len

    def take_moves(self) -> list[Move]:
        """The copies to make, in this order, before the next forward pass."""
        moves = [m for m in self._moves if m.num_tokens and m.source != m.target]
        self._moves = []
        return moves

    @property
    def num_used(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return sum(request.num_computed_tokens for request in self.running)

    @property
    def num_allocated(self) -> int:
        """Tokens' worth of memory that the running sequences keep from others."""
        return len(self.running) * self.slot_len

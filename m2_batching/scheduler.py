"""Decides, before every step, which sequences it computes.

Iteration-level scheduling (Orca, OSDI 2022, section 3): the batch is chosen anew at every step,
so a request joins as soon as there is room and leaves as soon as it is done, instead of waiting for
the slowest of its batch. A step either prefills newcomers or decodes everyone who runs; newcomers
go first, because a waiting user sees nothing while a running one merely sees a short pause.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from common.request import Request, RequestStatus

from .kv_cache import Move, SlotCache


@dataclass(frozen=True)
class SchedulerOutput:
    """One step's work: a slice of slots, and the copies to make before.

    ``requests[i]`` lives in slot ``first_slot + i`` and computes all its tokens that are not in the
    cache yet: its whole prompt in a prefill step, one token in a decode step.
    """

    requests: Sequence[Request]
    first_slot: int
    slot_len: int
    is_prefill: bool
    moves: list[Move]


class Scheduler:
    """Waiting and running queues over the slots of a cache."""

    def __init__(self, kv_cache: SlotCache, max_num_batched_tokens: int) -> None:
        self.kv_cache = kv_cache
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Request] = []  # sorted by Request.order
        self.num_preemptions = 0

    @property
    def running(self) -> list[Request]:
        return self.kv_cache.running

    def add(self, request: Request) -> None:
        """Put a request, new or preempted, in its place in the waiting queue."""
        bisect.insort(self.waiting, request, key=_order)

    def schedule(self) -> SchedulerOutput | None:
        """Choose the next step's sequences; None when nobody is there."""
        admitted = self._admit()
        if not admitted:
            self._make_room_to_grow()
        requests = admitted or list(self.running)
        if not requests:
            return None
        return SchedulerOutput(
            requests=requests,
            first_slot=len(self.running) - len(requests),
            slot_len=self.kv_cache.slot_len,
            is_prefill=bool(admitted),
            moves=self.kv_cache.take_moves(),
        )

    def update(self, step: SchedulerOutput, token_ids: Sequence[int]) -> None:
        """Take in what a step computed and sampled. Those it finishes stay until ``finish``."""
        for request, token_id in zip(step.requests, token_ids, strict=True):
            request.num_computed_tokens = request.num_tokens
            request.append_output(token_id)

    def finish(self, request: Request) -> None:
        """Forget a finished or aborted request, wherever it is, and give its slot back."""
        if request in self.running:
            self.kv_cache.free(request)
        else:
            self.waiting.remove(request)

    def requeue(self, request: Request) -> None:
        """Take a running request out of the batch and its cache away; it will start over."""
        self.kv_cache.free(request)
        request.num_computed_tokens = 0
        started = bool(request.output_token_ids)
        request.status = RequestStatus.PREEMPTED if started else RequestStatus.WAITING
        self.add(request)

    def _admit(self) -> list[Request]:
        """Move requests from the waiting queue into slots, in order, while they fit."""
        admitted: list[Request] = []
        longest = 0
        while self.waiting:
            request = self.waiting[0]
            longest = max(longest, request.num_tokens)
            padded_size = longest * (len(admitted) + 1)
            if admitted and padded_size > self.max_num_batched_tokens:
                break
            if not self._make_room_for(request, admitted):
                break
            self.waiting.remove(request)
            self.kv_cache.allocate(request)
            request.status = RequestStatus.RUNNING
            admitted.append(request)
        return admitted

    def _make_room_for(self, request: Request, admitted: list[Request]) -> bool:
        """Whether one more slot is free and long enough, if need be by preempting a less urgent."""
        if not self._fits([*self.running, request]):
            # Those of this step must stay the last slots: once one is admitted, nobody leaves.
            more_urgent = [r for r in self.running if r.priority <= request.priority]
            if admitted or not self._fits([*more_urgent, request]):
                return False
            while not self._fits([*self.running, request]):
                self._preempt(max(self.running, key=_order))
        cache = self.kv_cache
        slot_len = self._slot_len_for([*self.running, request])
        # Shorter slots only when that is what makes the room: cutting anew copies the cache.
        if slot_len > cache.slot_len or len(self.running) == cache.num_slots:
            cache.resize(slot_len)
        return True

    def _fits(self, requests: Sequence[Request]) -> bool:
        return len(requests) <= self.kv_cache.num_slots_at(self._slot_len_for(requests))

    def _slot_len_for(self, requests: Sequence[Request]) -> int:
        """Slots that hold all tokens of each of these and the one it is about to sample."""
        return self.kv_cache.slot_len_for(max(r.num_tokens for r in requests) + 1)

    def _make_room_to_grow(self) -> None:
        """Before a decode step: slots that hold one more token each, at whoever's expense."""
        cache = self.kv_cache
        while self.running:
            slot_len = cache.slot_len_for(max(r.num_tokens for r in self.running))
            if slot_len <= cache.slot_len:
                return
            if len(self.running) <= cache.num_slots_at(slot_len):
                cache.resize(slot_len)
                return
            self._preempt(max(self.running, key=_order))

    def _preempt(self, request: Request) -> None:
        """Take a slot away. The tokens are kept and recomputed when the request runs again."""
        self.requeue(request)
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1


def _order(request: Request) -> tuple[int, int, int]:
    return request.order

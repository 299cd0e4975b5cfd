"""Decides, before every step, which sequences it computes.

Iteration-level scheduling (Orca, OSDI 2022, section 3): the batch is chosen anew at every step,
so a request joins as soon as there is room and leaves as soon as it is done, instead of waiting for
the slowest of its batch. A step either prefills newcomers or decodes everyone who runs; newcomers
go first, because a waiting user sees nothing while a running one merely sees a short pause.

Room means free blocks now. A sequence takes one whenever its last is full, so the pool can run dry
in the middle of decoding; then the sequence that came last gives its blocks back.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from common.request import Request, RequestStatus

from .kv_cache import BlockCopy, PagedKVCache

# Share of the pool a newcomer leaves free, so that the next decode step does not preempt it again.
_WATERMARK = 0.02


@dataclass(frozen=True)
class SchedulerOutput:
    """One step's work, and the copies to make before.

    ``requests[i]`` computes all its tokens that are not in the cache yet: its whole prompt in a
    prefill step, one token in a decode step. ``block_tables[i]`` says where they go.
    """

    requests: Sequence[Request]
    is_prefill: bool
    block_tables: Sequence[Sequence[int]]
    copies: Sequence[BlockCopy] = ()
    # By Request.key of a prefilled request: the other samples of its prompt. They compute nothing
    # in this step and sample their first token from the same logits.
    forks: dict[str, list[Request]] = field(default_factory=dict)

    @cached_property
    def sampled(self) -> list[Request]:
        """Everyone who samples a token in this step, in the order of the sampler's rows."""
        if not self.forks:
            return list(self.requests)
        return [
            sample
            for request in self.requests
            for sample in (request, *self.forks.get(request.key, ()))
        ]


class Scheduler:
    """Waiting and running queues over the blocks of a cache."""

    def __init__(
        self, kv_cache: PagedKVCache, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.kv_cache = kv_cache
        self._max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._watermark = int(_WATERMARK * kv_cache.pool.num_blocks)
        self.waiting: list[Request] = []  # sorted by Request.order
        self.running: list[Request] = []  # sorted too: the most urgent first
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Put a request, new or preempted, in its place in the waiting queue."""
        bisect.insort(self.waiting, request, key=_order)

    def schedule(self) -> SchedulerOutput | None:
        """Choose the next step's sequences; None when nobody is there."""
        step = self._admit() or self._decode()
        return step if step.requests else None

    def update(self, step: SchedulerOutput, token_ids: Sequence[int]) -> None:
        """Take in what a step computed and sampled. Those it finishes stay until ``finish``."""
        for request, token_id in zip(step.sampled, token_ids, strict=True):
            request.num_computed_tokens = request.num_tokens
            request.append_output(token_id)

    def finish(self, request: Request) -> None:
        """Forget a finished or aborted request, wherever it is, and give its blocks back."""
        if request in self.running:
            self.running.remove(request)
            self.kv_cache.free(request)
        else:
            self.waiting.remove(request)

    def requeue(self, request: Request) -> None:
        """Take a running request out of the batch and its cache away; it will start over."""
        self.running.remove(request)
        self.kv_cache.free(request)
        request.num_computed_tokens = 0
        started = bool(request.output_token_ids)
        request.status = RequestStatus.PREEMPTED if started else RequestStatus.WAITING
        self.add(request)

    def _admit(self) -> SchedulerOutput | None:
        """Take requests from the waiting queue, in order, while there are blocks for them."""
        admitted: list[Request] = []
        forks: dict[str, list[Request]] = {}
        num_batched_tokens = 0
        while self.waiting:
            request = self.waiting[0]
            num_batched_tokens += request.num_tokens
            if admitted and num_batched_tokens > self.max_num_batched_tokens:
                break
            if not self._make_room_for(request, admitted):
                break
            self.kv_cache.allocate(request, request.num_tokens)
            self._run(request)
            admitted.append(request)
            forks[request.key] = self._fork_samples(request)
        if not admitted:
            return None
        return SchedulerOutput(admitted, True, self.kv_cache.tables(admitted), forks=forks)

    def _fork_samples(self, request: Request) -> list[Request]:
        """Admit the other samples of the same prompt: they share its blocks, prompt and all."""
        samples: list[Request] = []
        while (
            self.waiting
            and len(self.running) < self._max_num_seqs
            and self.waiting[0].request_id == request.request_id
            and not (request.output_token_ids or self.waiting[0].output_token_ids)
        ):
            sample = self.waiting[0]
            self.kv_cache.fork(request, sample)
            self._run(sample)
            samples.append(sample)
        return samples

    def _run(self, request: Request) -> None:
        self.waiting.remove(request)
        request.status = RequestStatus.RUNNING
        bisect.insort(self.running, request, key=_order)

    def _make_room_for(self, request: Request, admitted: list[Request]) -> bool:
        """Whether there is room for one more, if need be by preempting a less urgent one."""
        cache = self.kv_cache
        needed = cache.num_blocks_for(request.num_tokens)
        if self._fits(needed, len(self.running), cache.pool.num_free):
            return True
        # Who has been admitted in this step is about to be computed and must stay.
        if admitted or not self.running or self.running[-1].priority <= request.priority:
            return False
        more_urgent = [r for r in self.running if r.priority <= request.priority]
        held = {block for r in more_urgent for block in cache.table(r)}
        if not self._fits(needed, len(more_urgent), cache.pool.num_blocks - len(held)):
            return False
        while not self._fits(needed, len(self.running), cache.pool.num_free):
            self._preempt(self.running[-1])
        return True

    def _fits(self, num_blocks: int, num_running: int, num_free: int) -> bool:
        watermark = self._watermark if num_running else 0
        return num_running < self._max_num_seqs and num_blocks + watermark <= num_free

    def _decode(self) -> SchedulerOutput:
        """Everyone who runs computes one token, as far as the blocks go, the most urgent first."""
        cache, running = self.kv_cache, self.running
        copies: list[BlockCopy] = []
        num_served = 0  # these keep their blocks: their copies are under way
        while (num_served := cache.append(running, num_served)) < len(running):
            request = running[num_served]
            # One token takes one block at the most, so there is nothing to ask while one is free.
            if not cache.pool.num_free and cache.num_new_blocks(request, request.num_tokens):
                self._preempt(running[-1])  # the request itself, if nobody is less urgent
                continue
            copy = cache.allocate(request, request.num_tokens)
            if copy is not None:
                copies.append(copy)
            num_served += 1
        return SchedulerOutput(
            requests=list(running),
            is_prefill=False,
            block_tables=cache.tables(running),
            copies=copies,
        )

    def _preempt(self, request: Request) -> None:
        """Take all blocks away. The tokens are kept and recomputed when the request runs again."""
        self.requeue(request)
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1


def _order(request: Request) -> tuple[int, int, int]:
    return request.order

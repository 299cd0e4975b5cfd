"""Decides, before every step, which tokens it computes: one budget for decodes and for prompts.

Up to m4 a step was either a prefill or a decode, and a long prompt held up everyone who was
decoding. Here a step has room for a number of tokens (Sarathi-Serve, OSDI 2024, section 4). Every
running sequence computes its next token first; what is left of the budget goes to prompts, a
*chunk* of each, in order of urgency. So a decode never waits for a prompt, and as the budget is
larger than the number of sequences, a prompt always advances.

No two prompts can hold each other up. One is admitted only if all of it fits into what is free, and
it takes its blocks before less urgent ones may: when all who decode have ended, the most urgent
prompt goes on.

A prompt begins behind what the cache has of it (``PagedKVCache.match``): a hit is a shorter prompt,
and that is all. Blocks are entered into the index when their tokens are scheduled: whoever finds
them runs in this step or in a later one, and by then they are there. As nobody is admitted while a
more urgent prompt is only in part scheduled, those who begin alike compute their prefix once.

Steps overlap: this one is planned while the last one is still being computed, so the tokens that
it samples are not known yet. They need not be: that there will be one, and where its keys and
values go, is enough. ``Request.num_pending`` counts them. What cannot be foreseen is that a
sequence ends: it may have been given one step too many, whose token is then ignored.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from common.request import Request, RequestStatus

from .chunk_size import ChunkSize, StepRoom
from .hash_index import Match
from .kv_cache import BlockCopy, PagedKVCache

# Share of the pool a newcomer leaves free, so that the next decode step does not preempt it again.
_WATERMARK = 0.02


class ScheduledTokens(NamedTuple):
    """Tokens ``[start, end)`` of one sequence."""

    request: Request
    start: int
    end: int
    samples: bool  # whether the next token is sampled after the last of them
    joins: bool = False  # whether these are its first since it was admitted


@dataclass(frozen=True)
class SchedulerOutput:
    """One step's work, and the copies to make before.

    ``parts[i]`` says what a sequence computes, ``block_tables[i]`` where it goes. The first
    ``num_decodes`` compute one token each, the others a chunk of a prompt.
    """

    parts: Sequence[ScheduledTokens]
    num_decodes: int
    block_tables: Sequence[Sequence[int]]
    copies: Sequence[BlockCopy] = ()
    # By Request.key of one whose prompt ends in this step: the other samples of its prompt. They
    # compute nothing and sample their first token from the same logits.
    forks: dict[str, list[Request]] = field(default_factory=dict)

    @cached_property
    def requests(self) -> list[Request]:
        """Whose tokens are computed."""
        return [part.request for part in self.parts]

    @property
    def num_tokens(self) -> int:
        return sum(part.end - part.start for part in self.parts)

    @property
    def is_decode(self) -> bool:
        """Whether nobody computes more than one token."""
        return self.num_decodes == len(self.parts)

    @cached_property
    def sampled(self) -> list[Request]:
        """Everyone who samples a token in this step, in the order of the sampler's rows."""
        return [
            sample
            for part in self.parts
            if part.samples
            for sample in (part.request, *self.forks.get(part.request.key, ()))
        ]


class Scheduler:
    """Waiting and running queues over the blocks of a cache.

    Args:
        max_num_seqs: most sequences that run at a time.
        max_num_batched_tokens: the budget of a step, more than ``max_num_seqs``.
        chunk_size: limits the prompt tokens of a step with decodes.
    """

    def __init__(
        self,
        kv_cache: PagedKVCache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunk_size: ChunkSize | None = None,
    ) -> None:
        self.kv_cache = kv_cache
        self._max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._watermark = int(_WATERMARK * kv_cache.pool.num_blocks)
        self.waiting: list[Request] = []  # sorted by Request.order
        self.running: list[Request] = []  # sorted too: the most urgent first
        self.num_preemptions = 0
        self.chunk_size = chunk_size or ChunkSize(max_num_batched_tokens)
        # Why chunks were as long as they were: see ``EngineStats.chunk_reasons``.
        self.chunk_reasons: Counter[str] = Counter()

    def add(self, request: Request) -> None:
        """Put a request, new or preempted, in its place in the waiting queue."""
        bisect.insort(self.waiting, request, key=_order)

    def schedule(self) -> SchedulerOutput | None:
        """Choose the next step's tokens; None when there is nothing to compute."""
        self.kv_cache.begin_step()
        self._make_way()
        copies: list[BlockCopy] = []
        forks: dict[str, list[Request]] = {}
        num_preemptions = self.num_preemptions
        decoding, prompts = self._split()
        decodes = self._decode(decoding, copies)
        num_left = self.max_num_batched_tokens - len(decodes)
        room = StepRoom(num_left, self.chunk_size if decodes else None)
        # Who had to go in this step would be back at once, if it admitted anyone.
        may_admit = num_preemptions == self.num_preemptions
        chunks: list[ScheduledTokens] = []
        for request in prompts:
            if request.status is not RequestStatus.RUNNING:
                continue  # it had to go just now
            if may_admit:
                chunks += self._admit(room, copies, forks, before=request)
            chunks += self._continue(request, room, copies, forks)
        if may_admit:
            chunks += self._admit(room, copies, forks)
        parts = decodes + chunks
        if not parts:
            return None
        tables = self.kv_cache.tables([part.request for part in parts])
        return SchedulerOutput(parts, len(decodes), tables, copies, forks)

    def update(self, step: SchedulerOutput, token_ids: Sequence[int]) -> list[Request | None]:
        """Take in what a step sampled. Those it finishes stay until ``finish``.

        Returns:
            Who got a token, in the order of the sampler's rows; None for one that had ended before.
        """
        taken: list[Request | None] = []
        for request, token_id in zip(step.sampled, token_ids, strict=True):
            request.num_pending -= 1
            if request.is_finished:
                taken.append(None)
                continue
            request.append_output(token_id)
            taken.append(request)
        return taken

    def undo(self, step: SchedulerOutput) -> None:
        """Take a step back that could not be computed: its sequences start over."""
        self.kv_cache.forget_all()  # it counted on this step
        for request in step.sampled:
            request.num_pending -= 1
        for request in {r.key: r for r in (*step.sampled, *step.requests)}.values():
            if not request.is_finished:
                self.requeue(request)

    def finish(self, request: Request) -> None:
        """Forget a finished or aborted request, wherever it is, and give its blocks back."""
        if request in self.running:
            self.running.remove(request)
            self.kv_cache.enter(request)  # its last token was not known yet when it was scheduled
            self.kv_cache.free(request)
        else:
            self.waiting.remove(request)

    def requeue(self, request: Request) -> None:
        """Take a running request out of the batch and its cache away; it will start over."""
        self.running.remove(request)
        self.kv_cache.free(request)
        request.num_computed_tokens = 0
        started = request.output_token_ids or request.num_pending
        request.status = RequestStatus.PREEMPTED if started else RequestStatus.WAITING
        self.add(request)

    # ---- what a step is made of ----------------------------------------------------------------

    def _make_way(self) -> None:
        """Preempt less urgent sequences for a more urgent one that waits, if that lets it in."""
        if not self.waiting or not self.running:
            return
        request, cache = self.waiting[0], self.kv_cache
        more_urgent = [r for r in self.running if r.priority <= request.priority]
        if len(more_urgent) == len(self.running):
            return
        held = {block for r in more_urgent for block in cache.table(r)}
        num_shared = sum(block in held for block in cache.match(request).blocks)
        needed = cache.num_blocks_for(request.num_tokens) - num_shared
        num_left = cache.pool.num_blocks - len(held) - self._num_blocks_to_decode(more_urgent)
        if not self._fits(needed, len(more_urgent), num_left):
            return
        while self._find_room(request, self._num_blocks_to_decode(self.running)) is None:
            self._preempt(self.running[-1])

    def _num_blocks_to_decode(self, requests: Sequence[Request]) -> int:
        """Blocks that the next token of each will take, before any prompt gets some."""
        cache = self.kv_cache
        return sum(
            cache.num_new_blocks(request, request.num_computed_tokens + 1)
            for request in requests
            if _is_decoding(request)
        )

    def _split(self) -> tuple[list[Request], list[Request]]:
        """Of those who run, who decodes, and who has a prompt to compute."""
        decoding: list[Request] = []
        prompts: list[Request] = []
        for request in self.running:
            if _is_decoding(request):
                decoding.append(request)
            elif _num_left(request) > 0 and not _ends(request):
                prompts.append(request)
        return decoding, prompts

    def _decode(self, decoding: list[Request], copies: list[BlockCopy]) -> list[ScheduledTokens]:
        """One token of everyone who has one to compute, as far as the blocks go."""
        cache = self.kv_cache
        num_served = 0
        while (num_served := cache.append(decoding, num_served)) < len(decoding):
            request = decoding[num_served]
            end = request.num_computed_tokens + 1
            # One token takes one block at the most, so there is nothing to ask while one is free.
            if not cache.num_free and cache.num_new_blocks(request, end):
                least_urgent = self.running[-1]  # the request itself, if nobody is less urgent
                self._preempt(least_urgent)
                if least_urgent is decoding[-1]:
                    decoding.pop()
                continue
            copy = cache.allocate(request, end)
            if copy is not None:
                copies.append(copy)
            num_served += 1
        parts = []
        for request in decoding:
            start = request.num_computed_tokens
            request.num_computed_tokens = start + 1
            request.num_pending += 1
            parts.append(ScheduledTokens(request, start, start + 1, samples=True))
            if request.num_computed_tokens % cache.block_size == 0:
                cache.enter(request)
        return parts

    def _continue(
        self,
        request: Request,
        room: StepRoom,
        copies: list[BlockCopy],
        forks: dict[str, list[Request]],
    ) -> list[ScheduledTokens]:
        """The next chunk of a prompt that has begun, if limits and blocks leave one."""
        limits = room.limits(request.num_computed_tokens)
        num_tokens = self._chunk(request, {**limits, "blocks": self._num_that_fit(request)})
        if num_tokens <= 0:
            return []
        return [self._compute(request, num_tokens, copies, forks, room)]

    def _admit(
        self,
        room: StepRoom,
        copies: list[BlockCopy],
        forks: dict[str, list[Request]],
        before: Request | None = None,
    ) -> list[ScheduledTokens]:
        """First chunks of prompts that wait, in order, while there is room for all of each.

        Args:
            before: only those that are more urgent than this one.
        """
        parts = []
        for request in list(self.waiting):
            if before and request.order > before.order:
                break
            has_joined = request.status is RequestStatus.RUNNING  # as another one's sample
            if has_joined or request.num_pending or self._waits_for(request):
                continue
            if min(room.limits(0).values()) <= 0:
                break  # before anything is looked up
            match = self._find_room(request)
            if match is None:
                break
            start = match.num_tokens + match.num_partial_tokens
            if min(room.limits(start).values()) <= 0:
                break
            self._run(request)
            copy = self.kv_cache.begin(request, match)
            if copy is not None:
                copies.append(copy)
            num_tokens = self._chunk(request, room.limits(request.num_computed_tokens))
            parts.append(self._compute(request, num_tokens, copies, forks, room, joins=True))
        return parts

    def _chunk(self, request: Request, limits: dict[str, int]) -> int:
        """Prompt tokens to compute now: all that are left, or what the tightest limit allows."""
        all_limits = {"prompt": _num_left(request), **limits}
        reason = min(all_limits, key=all_limits.__getitem__)
        self.chunk_reasons[reason] += all_limits[reason] > 0
        return all_limits[reason]

    def _compute(
        self,
        request: Request,
        num_tokens: int,
        copies: list[BlockCopy],
        forks: dict[str, list[Request]],
        room: StepRoom,
        *,
        joins: bool = False,
    ) -> ScheduledTokens:
        """Count tokens as computed: by the time anybody looks at them they will be."""
        start = request.num_computed_tokens
        end = start + num_tokens
        room.use(start, end)
        samples = end == request.num_tokens + request.num_pending
        copy = self.kv_cache.allocate(request, end)
        if copy is not None:
            copies.append(copy)
        request.num_computed_tokens = end
        self.kv_cache.enter(request)
        if samples:
            request.num_pending += 1
            if end == request.num_prompt_tokens and (samples_of := self._fork_samples(request)):
                forks[request.key] = samples_of
        return ScheduledTokens(request, start, end, samples, joins)

    def _fork_samples(self, request: Request) -> list[Request]:
        """Admit the other samples of a prompt that is complete: they share its blocks."""
        samples: list[Request] = []
        if request.sampling_params.n == 1:
            return samples
        for sample in [r for r in self.waiting if r.request_id == request.request_id]:
            if len(self.running) >= self._max_num_seqs:
                break
            if sample.output_token_ids or sample.num_pending:
                continue
            self.kv_cache.fork(request, sample)
            sample.num_computed_tokens = request.num_computed_tokens
            sample.num_pending = 1
            self._run(sample)
            samples.append(sample)
        return samples

    def _run(self, request: Request) -> None:
        self.waiting.remove(request)
        request.status = RequestStatus.RUNNING
        bisect.insort(self.running, request, key=_order)

    # ---- room ------------------------------------------------------------------------------------

    def _fits(self, num_blocks: int, num_running: int, num_free: int) -> bool:
        watermark = self._watermark if num_running else 0
        return num_running < self._max_num_seqs and num_blocks + watermark <= num_free

    def _find_room(self, request: Request, num_set_aside: int = 0) -> Match | None:
        """What a waiting request can begin with; None if there is no room for it.

        Args:
            num_set_aside: blocks that are free and for others.
        """
        cache = self.kv_cache
        if len(self.running) >= self._max_num_seqs:
            return None  # before anything is looked up
        match = cache.match(request)
        needed = cache.num_blocks_for(request.num_tokens) - len(match.blocks) + num_set_aside
        # A block to copy is held for a moment too; there may be room without it.
        for begin in (match, match.without_partial()):
            if self._fits(needed, len(self.running), cache.num_free_beside(begin)):
                return begin
        return None

    def _num_that_fit(self, request: Request) -> int:
        """More tokens of a running request that the free blocks have room for."""
        cache, done = self.kv_cache, request.num_computed_tokens
        room = (len(cache.table(request)) + cache.num_free) * cache.block_size - done
        return room if cache.num_new_blocks(request, done + 1) <= cache.num_free else 0

    def _waits_for(self, request: Request) -> bool:
        """Whether another sample of the same prompt is computing it: better to share its blocks."""
        may_share = request.sampling_params.n > 1 and not request.output_token_ids
        return may_share and any(
            other.request_id == request.request_id
            and other.num_computed_tokens < other.num_prompt_tokens
            for other in self.running
        )

    def _preempt(self, request: Request) -> None:
        """Take all blocks away. The tokens are kept and recomputed when the request runs again."""
        self.kv_cache.enter(request)
        self.requeue(request)
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1


def _num_left(request: Request) -> int:
    """Tokens that are known, or about to be, and not computed yet."""
    return request.num_tokens + request.num_pending - request.num_computed_tokens


def _is_decoding(request: Request) -> bool:
    """Whether a sequence computes one sampled token after the other, and has one to compute.

    The last token of a prompt is none of these, even if it comes alone: with it the prompt's other
    samples join.
    """
    past_prompt = request.num_computed_tokens >= request.num_prompt_tokens
    return past_prompt and _num_left(request) == 1 and not _ends(request)


def _ends(request: Request) -> bool:
    """Whether the tokens that are about to be known are its last ones."""
    return len(request.output_token_ids) + request.num_pending >= request.max_tokens


def _order(request: Request) -> tuple[int, int, int]:
    return request.order

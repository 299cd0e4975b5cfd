"""m6's scheduler and cache: whoever begins behind a cached prefix finds its own tokens there.

They are checked by a fake cache of token ids: every sequence must find its own tokens, and nothing
else, wherever its block table points.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.request import Request, RequestStatus
from common.sampling_params import SamplingParams
from m6_prefix.kv_cache import PagedKVCache
from m6_prefix.scheduler import Scheduler, SchedulerOutput

EOS = 1
SIZE = 4  # tokens in a block
MAX_LEN = 40
PREFIXES = ([2] * MAX_LEN, [3] * MAX_LEN, [2] * 10 + [3] * MAX_LEN, [2] * 16 + [4] * MAX_LEN)
GARBAGE = -7


class PrefixMachine(RuleBasedStateMachine):
    """Arrivals, aborts, steps and failures in any order; a step's tokens come when they come.

    ``memory`` holds the token ids whose keys and values the cache would hold. The device has run
    all steps that were launched, so it knows tokens that the scheduler does not (``known``).
    """

    prefix_index: str

    @initialize(
        num_blocks=st.integers(10, 24),
        max_num_seqs=st.integers(1, 6),
        spare=st.integers(1, 30),
    )
    def start(self, num_blocks: int, max_num_seqs: int, spare: int) -> None:
        self.cache = PagedKVCache(num_blocks, SIZE, self.prefix_index)
        self.memory = np.full((num_blocks, SIZE), GARBAGE)
        self.budget, self.max_num_seqs = max_num_seqs + spare, max_num_seqs
        self.scheduler = Scheduler(self.cache, max_num_seqs, self.budget)
        self.launched: list[tuple[SchedulerOutput, list[int]]] = []
        self.alive: dict[str, Request] = {}
        self.known: dict[str, list[int]] = {}
        self.num_requests = 0

    @rule(
        prefix=st.integers(0, len(PREFIXES) - 1),
        num_shared=st.integers(0, MAX_LEN - 3),
        num_own=st.integers(1, 2),
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 1),
        n=st.integers(1, 3),
        scored=st.integers(0, 4),
    )
    def arrive(self, prefix, num_shared, num_own, max_tokens, priority, n, scored) -> None:
        prompt = [*PREFIXES[prefix][:num_shared], *[2 + priority] * num_own]
        params = SamplingParams(
            max_tokens=max_tokens, n=n, prompt_logprobs=None if scored else 0
        )
        self.num_requests += 1
        for index in range(n):
            request = Request(
                str(self.num_requests), prompt, params, eos_token_ids=(EOS,),
                max_model_len=MAX_LEN, priority=priority, arrival=self.num_requests, index=index,
            )  # fmt: skip
            self.alive[request.key] = request
            self.known[request.key] = list(prompt)
            self.scheduler.add(request)

    @rule(pick=st.randoms(use_true_random=False))
    def abort(self, pick) -> None:
        if self.alive:
            request = self.alive.pop(pick.choice(sorted(self.alive)))
            request.status = RequestStatus.FINISHED_ABORTED
            self.scheduler.finish(request)

    @rule(ends=st.booleans())
    def launch(self, ends: bool) -> None:
        if (step := self.plan()) is None:
            return
        self.compute(step)
        tokens = [
            EOS if ends and row == 0 else 2 + len(self.known[request.key]) % 8 // 7
            for row, request in enumerate(step.sampled)
        ]
        for request, token in zip(step.sampled, tokens, strict=True):
            self.known[request.key].append(token)
        self.launched.append((step, tokens))

    @rule()
    def fail(self) -> None:
        """A step that could not be computed; who knows what it has written."""
        if (step := self.plan()) is None:
            return
        self.copy(step)
        for block, offset in self.slots_written(step):
            self.memory[block, offset] = GARBAGE
        self.scheduler.undo(step)

    @rule()
    def read(self) -> None:
        if not self.launched:
            return
        step, tokens = self.launched.pop(0)
        wanted = [r if not r.is_finished else None for r in step.sampled]
        assert self.scheduler.update(step, tokens) == wanted
        for request in step.sampled:
            assert request.num_pending >= 0
            if request.is_finished and self.alive.pop(request.key, None):
                self.scheduler.finish(request)

    def plan(self) -> SchedulerOutput | None:
        """The next step, with what must hold of any."""
        if len(self.launched) > 1:  # one step ahead, no more
            self.read()
        ready = {r.key for r in self.scheduler.running if self.is_decoding(r)}
        preempted = self.scheduler.num_preemptions
        step = self.scheduler.schedule()
        if step is None:
            # Who decodes goes on, or gives its blocks up: all others are about to end.
            assert not ready or preempted < self.scheduler.num_preemptions
            assert self.launched or not self.alive  # nobody waits for what never comes
            return None
        assert 0 < step.num_tokens <= self.budget
        for place, part in enumerate(step.parts):
            request = part.request
            assert part.start < part.end <= request.num_tokens + request.num_pending
            assert place >= step.num_decodes or part.end == part.start + 1
            if part.joins and request.sampling_params.prompt_logprobs is not None:
                assert part.start == 0 or request.output_token_ids
            # What attention gathers is as wide as the longest table.
            assert part.end <= len(step.block_tables[place]) * SIZE < part.end + MAX_LEN
        if preempted == self.scheduler.num_preemptions:
            assert ready <= {r.key for r in step.requests}  # a decode never waits
        self.nobody_writes_what_others_read(step)
        return step

    def is_decoding(self, request: Request) -> bool:
        total = request.num_tokens + request.num_pending
        ends = len(request.output_token_ids) + request.num_pending >= request.max_tokens
        in_prompt = request.num_computed_tokens < request.num_prompt_tokens
        return total - request.num_computed_tokens == 1 and not ends and not in_prompt

    def nobody_writes_what_others_read(self, step: SchedulerOutput) -> None:
        """But who joins in this step finds what it fills, behind all of its writes."""
        tables = {r.key: self.cache.table(r) for r in self.scheduler.running}
        samples_of = {
            part.request.key: {
                part.request.key, *(r.key for r in step.forks.get(part.request.key, ()))
            }
            for part in step.parts
        }
        joined = [samples_of[part.request.key] for part in step.parts if part.joins]
        for part in step.parts:
            may_hold = samples_of[part.request.key].union(*joined)
            for block in tables[part.request.key][part.start // SIZE :]:
                assert {key for key, table in tables.items() if block in table} <= may_hold
        slots = self.slots_written(step)
        assert len(set(slots)) == len(slots)

    def slots_written(self, step: SchedulerOutput) -> list[tuple[int, int]]:
        return [
            (table[position // SIZE], position % SIZE)
            for part, table in zip(step.parts, step.block_tables, strict=True)
            for position in range(part.start, part.end)
        ]

    def copy(self, step: SchedulerOutput) -> None:
        """All sources are read before a target is written."""
        contents = [self.memory[copy.source].copy() for copy in step.copies]
        for copy, content in zip(step.copies, contents, strict=True):
            self.memory[copy.target] = content

    def compute(self, step: SchedulerOutput) -> None:
        """Copies, then everybody's writes, then everybody's reads: so it is in every layer."""
        self.copy(step)
        tokens = [
            token
            for part in step.parts
            for token in self.known[part.request.key][part.start : part.end]
        ]
        for (block, offset), token in zip(self.slots_written(step), tokens, strict=True):
            self.memory[block, offset] = token
        for part, table in zip(step.parts, step.block_tables, strict=True):
            assert self.memory[list(table)].ravel()[: part.end].tolist() == (
                self.known[part.request.key][: part.end]
            ), (part, table)

    @invariant()
    def queues_hold_everyone_once(self) -> None:
        if not hasattr(self, "alive"):
            return
        queued = [r.key for r in (*self.scheduler.waiting, *self.scheduler.running)]
        assert sorted(queued) == sorted(self.alive)
        assert len(self.scheduler.running) <= self.max_num_seqs

    @invariant()
    def blocks_are_held_by_whom_the_tables_say(self) -> None:
        if not hasattr(self, "alive"):
            return
        held = Counter(
            block for request in self.scheduler.running for block in self.cache.table(request)
        )
        assert self.cache.num_allocated == len(held) * SIZE
        for block in range(self.cache.pool.num_blocks):
            assert 0 <= self.cache.pool.ref_count(block) - held[block] <= 1  # the index's
        # What nobody holds can be had: the index keeps nothing for the sake of anything else.
        assert self.cache.num_free == self.cache.pool.num_blocks - len(held)

    def teardown(self) -> None:
        """From any state everyone gets to the end, and every block comes back."""
        if not hasattr(self, "alive"):
            return
        for _ in range(3000):
            if not self.alive:
                break
            if len(self.launched) < 2:
                self.launch(False)
            self.read()
        assert not self.alive
        while self.launched:
            self.read()
        cache = self.cache
        assert cache.num_used == cache.num_allocated == 0
        assert cache.num_free == cache.pool.num_blocks
        cache.forget_all()
        assert cache.pool.num_free == cache.pool.num_blocks


def machine(name: str) -> type:
    """The machine's test case with one of the indexes."""
    case = type(f"{name}Machine", (PrefixMachine,), {"prefix_index": name}).TestCase
    case.settings = settings(max_examples=60, stateful_step_count=40)
    return case


TestTree = machine("tree")
TestHash = machine("hash")
TestOff = machine("off")

"""How much of prompts a step may have beside its decodes.

All of it makes the step longer, and a step's length is what everyone who is decoding waits for the
next token: the inter-token latency (ITL). So there is a most, and it counts *work*: a token's
products with the weights are one, and its attention to what stands before it comes on top, by the
FLOPs it takes. Counted in tokens, the chunks of a long prompt would take longer and longer.

With a target for the latency the size is the most or less, and follows what steps are seen to take:
what a step had is scaled by target over measured time, and the limit becomes that, at most halved
and at most a quarter larger at once, so that one slow step does not throw it off. (A step's own
size, not the limit of today: with overlap the step was planned before the last correction, which
would be made twice.)
"""

from __future__ import annotations

import math

MIN_TOKENS = 16  # below it a prompt would hardly advance, whatever the target
FIRST_TOKENS = 512  # with a target, before any step was seen
_MOST_GROWTH = 1.25
_MOST_SHRINKING = 0.5


class ChunkSize:
    """The limit on the prompts of a step, in tokens whose attention is not worth mentioning.

    Args:
        most: of a step with decodes.
        target_itl: seconds a step with decodes should take at most; None: however long it takes.
        pairs_per_token: a query and a key that it sees, so many of them are as much work as a
            token's products; infinity: attention is not counted.
    """

    def __init__(
        self, most: int, target_itl: float | None = None, pairs_per_token: float = math.inf
    ) -> None:
        self._most = most
        self._target = target_itl
        self._pairs_per_token = pairs_per_token
        self._limit = float(most if target_itl is None else min(most, FIRST_TOKENS))

    @property
    def reason(self) -> str:
        """What the limit is there for: "itl", the target, or "chunk", the size that was given."""
        return "chunk" if self._target is None else "itl"

    @property
    def limit(self) -> int:
        """Work that a step with decodes may have in prompts at present."""
        return int(self._limit)

    def work(self, start: int, end: int) -> float:
        """Of the tokens ``[start, end)`` of a sequence."""
        pairs = (end * (end + 1) - start * (start + 1)) / 2
        return end - start + pairs / self._pairs_per_token

    def num_tokens(self, start: int, work: float) -> int:
        """How many tokens, from ``start`` on, are no more work than that."""
        if math.isinf(self._pairs_per_token):
            return max(int(work), 0)
        # n + (n start + n (n + 1) / 2) / p = work
        p = self._pairs_per_token
        b = p + start + 0.5
        return int(math.sqrt(b * b + 2 * p * max(work, 0.0)) - b)

    def observe(self, work: float, num_decodes: int, seconds: float) -> None:
        """Take in how long a step took. Only one with prompts and decodes says anything."""
        if self._target is None or not work or not num_decodes:
            return
        if seconds < self._target and work < self._limit / 2:
            return  # it was short because there was little to do
        wanted = work * self._target / seconds
        wanted = min(max(wanted, self._limit * _MOST_SHRINKING), self._limit * _MOST_GROWTH)
        self._limit = min(max(wanted, MIN_TOKENS), self._most)


class StepRoom:
    """What is left of a step for chunks of prompts.

    Args:
        num_tokens: of the step's budget.
        chunk_size: what else limits them; None if nobody decodes.
    """

    def __init__(self, num_tokens: int, chunk_size: ChunkSize | None) -> None:
        self._num_tokens = num_tokens
        self._size = chunk_size
        self._work = float(chunk_size.limit) if chunk_size else math.inf
        self._is_untouched = True

    def limits(self, start: int) -> dict[str, int]:
        """How many tokens of a sequence fit, from ``start`` on, by what limits them."""
        limits = {"budget": self._num_tokens}
        if self._size is not None:
            most = self._size.num_tokens(start, self._work)
            if self._is_untouched:
                # However much work a token far into its prompt is, the most urgent one goes on.
                most = max(most, min(MIN_TOKENS, self._size.limit))
            limits[self._size.reason] = most
        return limits

    def use(self, start: int, end: int) -> None:
        """A chunk ``[start, end)`` has been given its place."""
        self._num_tokens -= end - start
        self._is_untouched = False
        if self._size is not None:
            self._work -= self._size.work(start, end)

"""How many prompt tokens a step may have beside its decodes.

Every one of them makes the step longer, and a step's length is what everyone who is decoding waits
for the next token: the inter-token latency (ITL). So there is a most. With a target for the latency
the size is that or less, and follows what steps are seen to take: what a step had is scaled by
target over measured time, and the limit becomes that, at most halved and at most a quarter larger
at once, so that one slow step does not throw it off. (A step's own size, not the limit of today:
with overlap the step was planned before the last correction, which would be made twice.)
"""

from __future__ import annotations

MIN_TOKENS = 16  # below it a prompt would hardly advance, whatever the target
FIRST_TOKENS = 512  # with a target, before any step was seen
_MOST_GROWTH = 1.25
_MOST_SHRINKING = 0.5


class ChunkSize:
    """The limit on the prompt tokens of a step.

    Args:
        most: prompt tokens of a step with decodes.
        target_itl: seconds a step with decodes should take at most; None: however long it takes.
    """

    def __init__(self, most: int, target_itl: float | None = None) -> None:
        self._most = most
        self._target = target_itl
        self._limit = float(most if target_itl is None else min(most, FIRST_TOKENS))

    @property
    def reason(self) -> str:
        """What the limit is there for: "itl", the target, or "chunk", the size that was given."""
        return "chunk" if self._target is None else "itl"

    @property
    def limit(self) -> int:
        """Prompt tokens that a step with decodes may have at present."""
        return int(self._limit)

    def observe(self, num_prompt_tokens: int, num_decodes: int, seconds: float) -> None:
        """Take in how long a step took. Only one with prompt tokens and decodes says anything."""
        if self._target is None or not num_prompt_tokens or not num_decodes:
            return
        if seconds < self._target and num_prompt_tokens < self._limit / 2:
            return  # it was short because there was little to do
        wanted = num_prompt_tokens * self._target / seconds
        wanted = min(max(wanted, self._limit * _MOST_SHRINKING), self._limit * _MOST_GROWTH)
        self._limit = min(max(wanted, MIN_TOKENS), self._most)

"""What is asked of an engine: random prompts and how many tokens to generate for each.

    requests = random_requests(256, Lengths(100, 1024), Lengths(100, 1024), vocab_size=151_936)
    sum(request.output_len for request in requests)    # 133,966, on any machine

Token ids are random, because the time a token takes does not depend on which token it is; lengths
are what matters.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

_LARGEST_TOKEN_ID = 10_000


@dataclass(frozen=True)
class Lengths:
    """A range of lengths in tokens, both ends included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read ``100:1024``, or ``128`` for a fixed length. ValueError where it is neither."""
        low, colon, high = text.partition(":")
        try:
            lengths = cls(int(low), int(high if colon else low))
        except ValueError:
            raise ValueError(
                f"a length is a number (128) or a range (100:1024), got {text!r}"
            ) from None
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"a range of lengths goes up and starts at 1 or more, got {text!r}")
        return lengths

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True)
class BenchRequest:
    """One request: a prompt, exactly how many tokens to generate, and when it comes."""

    prompt_token_ids: list[int]
    output_len: int
    arrival_s: float = 0.0  # seconds after the start, where requests come one by one

    @property
    def input_len(self) -> int:
        return len(self.prompt_token_ids)


def random_requests(
    num_requests: int,
    input_len: Lengths,
    output_len: Lengths,
    *,
    vocab_size: int,
    seed: int = 0,
    run: int = 0,
) -> list[BenchRequest]:
    """Draw requests; the same arguments give the same requests everywhere.

    The order of the draws is that of nano-vllm's bench.py, so that figures compare: for each prompt
    its length, then its tokens (0 to 10,000, wrapped into a smaller vocabulary so that lengths do
    not depend on the model); then all output lengths.

    Args:
        run: runs other than 0 get fresh tokens at unchanged lengths: nothing that an earlier run
            left in a cache helps them, and all runs are the same amount of work.
    """
    draw = random.Random(seed)
    prompts = [random_tokens(draw, draw.randint(input_len.low, input_len.high))
               for _ in range(num_requests)]
    output_lens = [draw.randint(output_len.low, output_len.high) for _ in range(num_requests)]
    if run:
        draw = random.Random(f"{seed}, run {run}")
        prompts = [random_tokens(draw, len(prompt)) for prompt in prompts]
    return [
        BenchRequest([token % vocab_size for token in prompt], output_len)
        for prompt, output_len in zip(prompts, output_lens, strict=True)
    ]


def random_tokens(draw: random.Random, count: int) -> list[int]:
    """Token ids up to 10,000, not wrapped into any vocabulary."""
    return [draw.randint(0, _LARGEST_TOKEN_ID) for _ in range(count)]


def arrival_times(
    num_requests: int, rate: float, burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """When requests come, in seconds; the gaps between them are drawn from a gamma distribution.

    The definition is that of vLLM's serving benchmark: shape ``burstiness`` (1: exponential gaps, a
    Poisson process; less: bursts; more: evenly), mean ``1 / rate``, and the whole stretched so that
    the last request comes at ``num_requests / rate``, whatever was drawn.

    Args:
        rate: requests per second; infinite: all at 0.
    """
    if math.isinf(rate):
        return [0.0] * num_requests
    draw = random.Random(f"{seed}, arrivals")
    gaps = [draw.gammavariate(burstiness, 1.0 / (rate * burstiness)) for _ in range(num_requests)]
    times = list(itertools.accumulate(gaps))
    stretch = num_requests / rate / times[-1] if times[-1] > 0 else 1.0
    return [time * stretch for time in times]


def with_output_len(requests: Sequence[BenchRequest], output_len: int) -> list[BenchRequest]:
    """The same prompts, each with that many tokens to generate."""
    return [replace(request, output_len=output_len) for request in requests]


def check_fits(requests: Sequence[BenchRequest], max_model_len: int, who: str) -> None:
    """ValueError unless every request can run to its end: a shortened one would be less work."""
    longest = max(requests, key=lambda request: request.input_len + request.output_len)
    needed = longest.input_len + longest.output_len
    if needed > max_model_len:
        raise ValueError(
            f"{who} serves at most {max_model_len} tokens a sequence, but this work has a prompt "
            f"of {longest.input_len} with {longest.output_len} output tokens ({needed}): lower "
            "the lengths asked for, or give it more room (max_model_len, a larger KV cache)"
        )

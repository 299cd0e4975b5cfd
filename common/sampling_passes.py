"""What a request asks of the sampler: which passes over the logits, with which numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.sampling_params import SamplingParams

_FOREVER = 2**62


@dataclass(frozen=True)
class Passes:
    """Which parts of the work a request needs; a batch needs the largest of each field."""

    greedy: bool = False
    random: bool = False
    bias: bool = False
    penalties: bool = False
    min_p: bool = False
    top_k: int = 0
    top_p: bool = False
    num_logprobs: int = -1  # -1: none, not even the sampled token's

    @classmethod
    def of(cls, params: SamplingParams, vocab_size: int) -> Passes:
        random = not params.is_greedy
        top_k = params.top_k if 0 < params.top_k < vocab_size else 0
        return cls(
            greedy=not random,
            random=random,
            bias=bool(params.logit_bias) or params.min_tokens > 0,
            penalties=(
                params.repetition_penalty != 1.0
                or params.presence_penalty != 0.0
                or params.frequency_penalty != 0.0
            ),
            min_p=random and params.min_p > 0.0,
            top_k=top_k if random else 0,
            top_p=random and params.top_p < 1.0,
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
        )

    @classmethod
    def union(cls, passes: Iterable[Passes]) -> Passes:
        """What a batch with all of these needs."""
        fields = zip(*(vars(each).values() for each in (cls(), *passes)), strict=True)
        return cls(*map(max, fields))


@dataclass(frozen=True)
class Launches:
    """Which kernels ``Sampler.sample`` launches: the same for the most different requests."""

    edit: bool = False  # biases and penalties
    truncate: bool = False  # min-p, top-k, top-p
    select: bool = False  # top-k, top-p
    num_logprobs: int = -1

    @classmethod
    def of(cls, passes: Passes) -> Launches:
        select = passes.top_k > 0 or passes.top_p
        return cls(
            edit=passes.bias or passes.penalties,
            truncate=select or passes.min_p,
            select=select,
            num_logprobs=passes.num_logprobs,
        )


def float_columns(params: SamplingParams) -> tuple[float, ...]:
    """In the order of ``FloatColumn``; nothing is truncated for greedy requests."""
    greedy = params.is_greedy
    return (
        0.0 if greedy else math.log2(math.e) / params.temperature,
        math.log2(params.min_p) if params.min_p and not greedy else -math.inf,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        1.0 if greedy else params.top_p,
    )


def bias_entries(
    params: SamplingParams, eos_token_ids: Sequence[int]
) -> list[tuple[int, float, int]]:
    """``logit_bias`` and ``min_tokens`` in the form of ``SparseBias.write``."""
    entries = [(token, bias, _FOREVER) for token, bias in params.logit_bias.items()]
    if params.min_tokens:
        stops = dict.fromkeys((*eos_token_ids, *params.stop_token_ids))
        entries += [(token, -math.inf, params.min_tokens) for token in stops]
    return entries

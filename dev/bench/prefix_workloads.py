"""Requests that begin alike: what users of a prefix cache send, and what it could save at best.

A request may have to wait for another one, and may begin with all of its tokens: the next turn of a
conversation does. What the other one answers is known only then, but its length is known before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dev.bench.workloads import BenchRequest, random_tokens


@dataclass(frozen=True)
class PrefixRequest(BenchRequest):
    """One that comes when another one has finished; ``prompt_token_ids`` are its own tokens.

    after: place of the other one; None: comes at the start.
    context_len: how many tokens of prompt and answer of the other one stand before its own.
    """

    after: int | None = None
    context_len: int = 0

    @property
    def input_len(self) -> int:
        return self.context_len + len(self.prompt_token_ids)


@dataclass(frozen=True)
class Sizes:
    """How much of everything; lengths are in tokens."""

    users: int = 64
    system_len: int = 2048
    few_shot_len: int = 4096
    few_shot_question_len: int = 256
    conversations: int = 16
    turns: int = 8
    question_len: int = 128
    output_len: int = 128
    problem_len: int = 512
    depth: int = 4
    fan_out: int = 4
    thought_len: int = 64
    hit_len: int = 8192
    cached_len: int = 7936

    def scaled(self, factor: float) -> Sizes:
        """The same with other lengths, each at least 1; as many requests."""
        lengths = {name: value for name, value in vars(self).items() if name.endswith("_len")}
        return Sizes(
            **vars(self) | {name: max(1, int(value * factor)) for name, value in lengths.items()}
        )


class _Author:
    """Writes random token ids; no two stories begin alike."""

    def __init__(self, vocab_size: int, story: str) -> None:
        self._draw = random.Random(story)
        self._vocab_size = vocab_size

    def __call__(self, num_tokens: int) -> list[int]:
        return [token % self._vocab_size for token in random_tokens(self._draw, num_tokens)]


def _shared_system(sizes: Sizes, write: _Author) -> list[BenchRequest]:
    """Many users, all behind the same system prompt."""
    system = write(sizes.system_len)
    return [
        PrefixRequest(system + write(sizes.question_len), sizes.output_len)
        for _ in range(sizes.users)
    ]


def _few_shot(sizes: Sizes, write: _Author) -> list[BenchRequest]:
    """The same worked examples before every question, and short answers."""
    examples = write(sizes.few_shot_len)
    answer_len = max(1, sizes.output_len // 8)
    return [
        PrefixRequest(examples + write(sizes.few_shot_question_len), answer_len)
        for _ in range(sizes.users)
    ]


def _multi_turn(sizes: Sizes, write: _Author) -> list[BenchRequest]:
    """Conversations: each turn has all that was said before, and comes when it was answered."""
    requests: list[BenchRequest] = []
    turn_len = sizes.question_len + sizes.output_len
    for turn in range(sizes.turns):
        for _ in range(sizes.conversations):
            own = write(sizes.question_len)
            after = len(requests) - sizes.conversations if turn else None
            requests.append(PrefixRequest(own, sizes.output_len, 0.0, after, turn * turn_len))
    return requests


def _tree_of_thoughts(sizes: Sizes, write: _Author) -> list[BenchRequest]:
    """A problem, and ``fan_out`` ways to go on from every thought (Yao et al., 2023)."""
    problem = write(sizes.problem_len)
    hint_len = max(1, sizes.thought_len // 8)  # what tells one way from another
    requests: list[BenchRequest] = [
        PrefixRequest(problem + write(hint_len), sizes.thought_len) for _ in range(sizes.fan_out)
    ]
    parents = range(len(requests))
    for _ in range(1, sizes.depth):
        begin = len(requests)
        for parent in parents:
            context_len = requests[parent].input_len + sizes.thought_len
            requests += [
                PrefixRequest(write(hint_len), sizes.thought_len, 0.0, parent, context_len)
                for _ in range(sizes.fan_out)
            ]
        parents = range(begin, len(requests))
    return requests


def _hit(sizes: Sizes, write: _Author) -> list[BenchRequest]:
    """One after the other: a long prompt, the beginning of another one, and all of that."""
    cached = write(sizes.cached_len)
    rest = write(max(1, sizes.hit_len - sizes.cached_len))
    return [
        PrefixRequest(write(len(cached) + len(rest)), 1),
        PrefixRequest(cached, 1, after=0),
        PrefixRequest(cached + rest, 1, after=1),
    ]


def _none(sizes: Sizes, write: _Author) -> list[BenchRequest]:
    """As long as behind a shared system prompt, and nothing in common."""
    length = sizes.system_len + sizes.question_len
    return [PrefixRequest(write(length), sizes.output_len) for _ in range(sizes.users)]


WORKLOADS = {
    "shared-system": _shared_system,
    "few-shot": _few_shot,
    "multi-turn": _multi_turn,
    "tree-of-thoughts": _tree_of_thoughts,
    "hit": _hit,
    "none": _none,
}


def prefix_requests(
    workload: str, sizes: Sizes, *, vocab_size: int, seed: int = 0, run: int = 0
) -> list[BenchRequest]:
    """The requests of a workload; who comes after another stands behind it. Runs differ in tokens,
    so that nothing an earlier one left in a cache helps."""
    return WORKLOADS[workload](sizes, _Author(vocab_size, f"{seed}, {workload}, run {run}"))


@dataclass(frozen=True)
class BestHits:
    """What a cache without limits would find of some prompts."""

    num_tokens: int
    num_requests: int


def best_hits(served: Sequence[tuple[Sequence[int], Sequence[int]]], block_size: int) -> BestHits:
    """The most that whole blocks of earlier requests can save, if none is ever given up.

    Args:
        served: prompt and answer of each request, in the order in which they came. The last token
            of a prompt has to be computed, and the last one of an answer never is.
    """
    children: dict[tuple[int, tuple[int, ...]], int] = {}  # block behind another one: its number
    num_tokens = num_requests = 0
    for prompt, answer in served:
        sequence = [*prompt, *answer[:-1]]
        most = (len(prompt) - 1) // block_size  # blocks
        node, num_found, is_known = 0, 0, True
        for place in range(len(sequence) // block_size):
            block = tuple(sequence[place * block_size : (place + 1) * block_size])
            is_known = is_known and (node, block) in children
            num_found += is_known and place < most
            node = children.setdefault((node, block), len(children) + 1)
        num_tokens += num_found * block_size
        num_requests += num_found > 0
    return BestHits(num_tokens, num_requests)

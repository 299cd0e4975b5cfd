"""Counts what note 6 counts: m6's scheduler and cache on five kinds of work, without a model.

    PYTHONPATH=. python learn/images/06_experiments.py
    PYTHONPATH=. python learn/images/06_experiments.py pressure

Sampled tokens are random numbers, so that a fixed seed gives the same counts on every machine.
What there is: hits, cost, pressure, thrash, steps, cold, fresh, lookup.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from zlib import crc32

from common.request import Request
from common.sampling_params import SamplingParams
from m6_prefix.block_pool import BlockPool
from m6_prefix.hash_index import HashIndex, PrefixIndex, PrefixStats
from m6_prefix.kv_cache import PagedKVCache
from m6_prefix.prefix_tree import PrefixTree
from m6_prefix.scheduler import Scheduler, SchedulerOutput

VOCABULARY, SIZE = 50_000, 16


@dataclass
class Ask:
    """A request: what the one at ``parent`` asked and answered, then ``extra``."""

    parent: int | None
    extra: list[int]
    num_output: int


Round = list[Ask]  # sent at once, when all of the round before have ended


@dataclass
class Counts:
    """What a workload cost."""

    num_prompt: int = 0  # tokens of all prompts
    num_computed: int = 0  # of those, and of prompts that had to start over
    num_best: int = 0  # that a cache without end, exact to the token, would have to compute
    num_copies: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_blocks_peak: int = 0  # held by sequences at a time
    stats: PrefixStats | None = None

    @property
    def saved(self) -> float:
        return 1 - self.num_computed / self.num_prompt

    @property
    def best(self) -> float:
        return 1 - self.num_best / self.num_prompt


class Trie:
    """Every sequence so far, token by token: the yardstick."""

    def __init__(self) -> None:
        self.root: dict = {}

    def add(self, tokens: Sequence[int]) -> int:
        """Remember a sequence; returns how many of its tokens were known."""
        node, known, new = self.root, 0, False
        for token in tokens:
            new = new or token not in node
            known += not new
            node = node.setdefault(token, {})
        return known


def tokens(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(VOCABULARY) for _ in range(length)]


# ---- five kinds of work --------------------------------------------------------------------------


def system_prompt(seed: int = 0) -> list[Round]:
    """128 questions behind one system prompt of 1,000 tokens, 16 at a time."""
    g = random.Random(seed)
    system = tokens(g, 1000)
    return [
        [Ask(None, system + tokens(g, g.randint(20, 100)), 64) for _ in range(16)] for _ in range(8)
    ]


def few_shot(seed: int = 1) -> list[Round]:
    """Four tasks of eight examples, 150 tokens each; 32 questions of about 40 tokens on each."""
    g = random.Random(seed)
    tasks = [tokens(g, 8 * 150) for _ in range(4)]
    return [
        [Ask(None, g.choice(tasks) + tokens(g, g.randint(30, 50)), 8) for _ in range(16)]
        for _ in range(8)
    ]


def chat(seed: int = 2, num_users: int = 16, num_turns: int = 8) -> list[Round]:
    """Users who talk in turns: a system prompt of 500 tokens, questions of 60, answers of 150."""
    g = random.Random(seed)
    system = tokens(g, 500)
    return [
        [
            Ask(
                (turn - 1) * num_users + user if turn else None,
                (system if not turn else []) + tokens(g, g.randint(20, 100)),
                g.randint(100, 200),
            )
            for user in range(num_users)
        ]
        for turn in range(num_turns)
    ]


def thoughts(seed: int = 3, branches: int = 4, depth: int = 4) -> list[Round]:
    """A tree of thoughts: a problem of 400 tokens, each thought of 60 is thought on four times."""
    g = random.Random(seed)
    problem = tokens(g, 400)
    rounds, first, parents = [], 0, [None]
    for _ in range(depth):
        asks = [
            Ask(parent, (problem if parent is None else []) + tokens(g, 10), 60)
            for parent in parents
            for _ in range(branches)
        ]
        rounds.append(asks)
        parents = list(range(first, first + len(asks)))
        first += len(asks)
    return rounds


def unlike(seed: int = 4) -> list[Round]:
    """128 prompts that have nothing in common."""
    g = random.Random(seed)
    return [[Ask(None, tokens(g, g.randint(100, 1024)), 64) for _ in range(16)] for _ in range(8)]


WORKLOADS: dict[str, Callable[[], list[Round]]] = {
    "system prompt": system_prompt, "few-shot": few_shot, "chat": chat,
    "tree of thoughts": thoughts, "unlike": unlike,
}  # fmt: skip


# ---- the run -------------------------------------------------------------------------------------


def new_request(name: str, prompt: list[int], num_output: int, arrival: int = 0) -> Request:
    params = SamplingParams(max_tokens=num_output, ignore_eos=True)
    return Request(name, prompt, params, max_model_len=1 << 20, arrival=arrival)


class BeginningFirst(PagedKVCache):
    """Lets go of a sequence's first block first."""

    def free(self, request: Request) -> None:
        for block in self._tables.pop(request.key):
            self._release([block])
        del self._num_indexed[request.key]


def serve(
    rounds: Sequence[Round],
    index: str = "tree",
    num_blocks: int = 8192,
    cache_class: type[PagedKVCache] = PagedKVCache,
) -> Counts:
    cache = cache_class(num_blocks, SIZE, index)
    scheduler = Scheduler(cache, max_num_seqs=64, max_num_batched_tokens=2048)
    counts, trie, done = Counts(), Trie(), []
    for asks in rounds:
        requests = []
        for ask in asks:
            history = done[ask.parent].token_ids.tolist() if ask.parent is not None else []
            place = len(done) + len(requests)
            requests.append(new_request(str(place), history + ask.extra, ask.num_output, place))
            counts.num_prompt += requests[-1].num_prompt_tokens
            known = trie.add(requests[-1].token_ids)
            counts.num_best += requests[-1].num_prompt_tokens - min(
                known, requests[-1].num_prompt_tokens - 1
            )
            scheduler.add(requests[-1])
        while scheduler.running or scheduler.waiting:
            step = scheduler.schedule()
            assert step is not None, "nothing can go on"
            counts.num_steps += 1
            held = cache.num_allocated // SIZE
            counts.num_blocks_peak = max(counts.num_blocks_peak, held)
            counts.num_copies += len(step.copies)
            counts.num_computed += step.num_tokens - step.num_decodes
            sampled = [
                crc32(f"{request.key} {request.num_tokens}".encode()) % VOCABULARY
                for request in step.sampled
            ]
            for request in scheduler.update(step, sampled):
                if request.is_finished:
                    scheduler.finish(request)
        for request in requests:
            trie.add(request.token_ids[:-1])  # nobody has computed the last one
        done += requests
    counts.num_preemptions = scheduler.num_preemptions
    counts.stats = scheduler.kv_cache.prefix_stats()
    return counts


# ---- what is counted -----------------------------------------------------------------------------


def hits() -> None:
    """Prompt tokens computed, by index, on each workload."""
    for name, make in WORKLOADS.items():
        for index in ("off", "hash", "tree"):
            c = serve(make(), index)
            print(
                f"{name:17} {index:5} prompts {c.num_prompt:8,} computed {c.num_computed:8,} "
                f"saved {c.saved:6.1%} best {c.best:6.1%} copies {c.num_copies:4} "
                f"steps {c.num_steps} most blocks held {c.num_blocks_peak}"
            )


def cost() -> None:
    """Comparisons of a block by match and insert, against the blocks that were looked at."""
    for name, make in WORKLOADS.items():
        for index in ("hash", "tree"):
            c = serve(make(), index)
            blocks = c.num_prompt // SIZE
            print(
                f"{name:17} {index:5} compared {c.stats.num_compared:7,} for {blocks:7,} blocks of "
                f"prompts; entered {c.stats.num_inserted:6,}, nodes {c.stats.num_nodes:6,}, "
                f"duplicates {c.stats.num_duplicates}"
            )


def pressure() -> None:
    """The chat in smaller and smaller pools; in which order a sequence lets go of its blocks."""
    ways = (
        ("off", PagedKVCache), ("tree", PagedKVCache), ("tree", BeginningFirst),
        ("hash", PagedKVCache), ("hash", BeginningFirst),
    )  # fmt: skip
    for num_blocks in (2048, 1536, 1280, 1152, 1024, 896, 768, 640, 512):
        for index, cache_class in ways:
            c = serve(chat(), index, num_blocks, cache_class)
            evicted = c.stats.num_evicted if c.stats else 0
            print(
                f"{num_blocks:5} blocks {index:5} {cache_class.__name__:14} computed "
                f"{c.num_computed:7,} saved {c.saved:6.1%} evicted {evicted:6,} preempted "
                f"{c.num_preemptions} steps {c.num_steps}"
            )


def thrash() -> None:
    """Four users ask in turn; each prompt is 64 blocks, and nothing is shared between them."""
    for num_blocks in (280, 264, 256, 240, 192, 144):
        g = random.Random(7)
        prompts = [tokens(g, 64 * SIZE) for _ in range(4)]
        rounds = [[Ask(None, prompts[i % 4] + tokens(g, 8), 4)] for i in range(40)]
        c = serve(rounds, "tree", num_blocks)
        print(
            f"{num_blocks:4} blocks: computed {c.num_computed:6,} of {c.num_prompt:,}, "
            f"saved {c.saved:6.1%}, best {c.best:.1%}, evicted {c.stats.num_evicted:,}"
        )


def state(index: PrefixIndex) -> str:
    stats = index.stats()
    return f"{stats.num_compared} compared so far, {stats.num_nodes} nodes"


def steps() -> None:
    """Section 4's example, with the comparisons up to each call."""
    for index_class in (PrefixTree, HashIndex):
        g = random.Random(8)
        pool = BlockPool(16)
        index = index_class(pool, SIZE)
        s, a, b = tokens(g, 3 * SIZE), tokens(g, 2 * SIZE), tokens(g, 2 * SIZE)
        one = [pool.allocate() for _ in range(5)]
        index.insert(s + a, one)
        said = [f"insert A: {state(index)}"]
        for block in reversed(one):
            index.release(block)
        match = index.match(s + b)
        said.append(f"match B {match.blocks}: {state(index)}")
        index.acquire(match)
        said.append(f"acquire: {state(index)}")
        two = [*match.blocks, pool.allocate(), pool.allocate()]
        index.insert(s + b, two)
        said.append(f"insert B: {state(index)}")
        for block in reversed(two):
            index.release(block)
        said.append(f"evict 3 {index.evict(3)}: {state(index)}")
        print(index_class.__name__, *said, sep="\n    ")


def first_steps(scheduler: Scheduler, number: int) -> list[SchedulerOutput]:
    steps = []
    for _ in range(number):
        if (step := scheduler.schedule()) is None:
            break
        steps.append(step)
        for request in scheduler.update(step, [7] * len(step.sampled)):
            if request.is_finished:
                scheduler.finish(request)
    return steps


def cold() -> None:
    """Eight requests meet the same cold prefix of 4,096 tokens; a budget of 2,048."""
    for index in ("off", "tree"):
        g = random.Random(5)
        prefix = tokens(g, 4096)
        scheduler = Scheduler(PagedKVCache(8192, SIZE, index), 64, 2048)
        for i in range(8):
            scheduler.add(new_request(str(i), prefix + tokens(g, 50), 4, i))
        for number, step in enumerate(first_steps(scheduler, 30)):
            parts = ", ".join(f"{p.request.request_id}: {p.start}-{p.end}" for p in step.parts)
            print(f"{index:5} step {number:2}: {parts}")


def fresh() -> None:
    """Two new prompts that part inside a block, in one step: what is copied, if one lets it."""
    g = random.Random(6)
    common = tokens(g, 44)
    for careful in (True, False):
        cache = PagedKVCache(64, SIZE, "tree")
        scheduler = Scheduler(cache, 8, 2048)
        if not careful:
            cache._fresh = type("Nothing", (set,), {"update": lambda *_: None})()
        for i in range(2):
            scheduler.add(new_request(str(i), common + tokens(g, 10), 4, i))
        step = scheduler.schedule()
        print(f"careful {careful}: parts {[(p.start, p.end) for p in step.parts]}")
        print("   tables", [list(table) for table in step.block_tables], "copies", step.copies)


def lookup() -> None:
    """Time to find and to hold a cached prompt of 8,192 tokens; the best of 50."""
    prompt = tokens(random.Random(7), 8192)
    for index in ("tree", "hash"):
        cache = PagedKVCache(2048, SIZE, index)
        for i in range(51):
            request = new_request(str(i), prompt, 4, i)
            begin = perf_counter()
            match = cache.match(request)
            found = perf_counter()
            cache.begin(request, match)
            held = perf_counter()
            if i == 0:
                best = [held, held]
            else:
                best = [min(best[0], found - begin), min(best[1], held - found)]
            cache.allocate(request, len(prompt))
            request.num_computed_tokens = len(prompt)
            cache.enter(request)
            cache.free(request)
        print(f"{index}: match {best[0] * 1e3:.3f} ms, begin {best[1] * 1e3:.3f} ms")


EXPERIMENTS = {
    f.__name__: f for f in (hits, cost, pressure, thrash, steps, cold, fresh, lookup)
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or EXPERIMENTS:
        print(f"---- {wanted}: {EXPERIMENTS[wanted].__doc__}")
        EXPERIMENTS[wanted]()

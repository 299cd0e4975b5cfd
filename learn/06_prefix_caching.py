# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Prefix caching, rebuilt step by step
#
# This notebook goes with [note 6](06_prefix_caching.md). It starts from a conversation that is
# computed over and over, and ends with a radix tree that shares, evicts and refuses what it must.
# Plain Python, some seconds. Each step adds one idea, checks it, and ends with an exercise whose
# solution is the cell below it.
#
# ```bash
# make notebooks                                         # opens JupyterLab
# MPLBACKEND=Agg python learn/06_prefix_caching.py       # or as a plain script
# ```
#
# Tokens are integers. A block holds `SIZE` of them; in m6 it is 16, here 4, to have it on a page.

# %%
from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import matplotlib.pyplot as plt

SIZE = 4


def common_length(a: Sequence, b: Sequence) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def blocks_of(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """The full blocks of a sequence; what is left over is not in them."""
    return [tuple(tokens[i : i + SIZE]) for i in range(0, len(tokens) - SIZE + 1, SIZE)]


# %% [markdown]
# ## 1. What is computed again
#
# A chat without memory sends everything so far in every turn. We count prompt tokens, and those
# that no earlier request had at the same place behind the same tokens.

# %%
random.seed(0)


def words(length: int) -> list[int]:
    return [random.randrange(1000) for _ in range(length)]


system, turns = words(200), 8
history, sent, new, per_turn = list(system), 0, 0, []
known: list[int] = []
for _ in range(turns):
    history += words(40)  # the question
    sent, new = sent + len(history), new + len(history) - common_length(known, history)
    per_turn.append((len(history), len(history) - common_length(known, history)))
    history += words(100)  # the answer
    known = history[:-1]  # nobody has computed the last token: it was only drawn

print(f"sent {sent}, new {new}: {sent / new:.1f} times too much")
plt.figure(figsize=(6, 3))
plt.bar(range(1, turns + 1), [s for s, _ in per_turn], color="#d9dde4", label="prompt")
plt.bar(range(1, turns + 1), [n for _, n in per_turn], color="#2a9d8f", label="of it new")
plt.xlabel("turn")
plt.ylabel("tokens")
plt.legend()
plt.show()
assert (sent, new) == (5840, 527)

# %% [markdown]
# **Exercise 1.** Per turn q question and a answer tokens come, and the system prompt has s. What is
# sent in n turns, and what of it is new? How does the ratio grow?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 1. Turn i sends s + i q + (i - 1) a. In all n s + q n (n + 1) / 2 + a n (n - 1) / 2: with
# the square of n. New are s + n q, and one token of each answer but the last: linear. So the ratio
# grows like n (q + a) / (2 q), and long answers to short questions make it larger.
s, q, a, n = 200, 40, 100, turns
assert n * s + q * n * (n + 1) // 2 + a * n * (n - 1) // 2 == sent
assert s + n * q + (n - 1) == new

# %% [markdown]
# ## 2. Why sharing is allowed, and what not to share
#
# A toy model with two layers of causal attention, one number for a key, one for a value, one for a
# hidden state. What a token leaves in the cache depends on itself and on those before it. Nothing
# of what comes later can change it.


# %%
def cache_of(tokens: Sequence[int], layers: int = 2) -> list[list[tuple[float, float]]]:
    """(key, value) of every token in every layer."""
    hidden = [math.sin(token + 1) + 0.1 * place for place, token in enumerate(tokens)]
    cache = []
    for layer in range(layers):
        keys = [math.tanh(1.3 * h + layer) for h in hidden]
        values = [math.cos(h - layer) for h in hidden]
        cache.append(list(zip(keys, values, strict=True)))
        out = []
        for i, h in enumerate(hidden):
            weights = [math.exp(h * keys[j]) for j in range(i + 1)]  # the causal mask: j <= i
            mixed = sum(w * values[j] for j, w in enumerate(weights)) / sum(weights)
            out.append(h + mixed)
        hidden = out
    return cache


one, two = cache_of([5, 6, 7, 8, 1, 2]), cache_of([5, 6, 7, 8, 3, 4])
other = cache_of([9, 9, 9, 9, 1, 2])
for layer in range(2):
    assert one[layer][:4] == two[layer][:4]  # the same prefix: the same numbers, bit for bit
    assert one[layer][4:] != two[layer][4:]
print("layer 0, token 1 behind 5 6 7 8:", one[0][4], "behind 9 9 9 9:", other[0][4])
print("layer 1, token 1 behind 5 6 7 8:", one[1][4], "behind 9 9 9 9:", other[1][4])
assert one[0][4] == other[0][4]
assert one[1][4] != other[1][4]

# %% [markdown]
# **Exercise 2.** A document of 1,000 tokens is pasted behind different questions. May its blocks be
# shared? And if it stands in front of the questions? In layer 0 the two prefixes above gave equal
# numbers: is that worth anything?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 2. Behind different questions: no, from layer 1 on its keys depend on the question, and
# its positions are others when the questions differ in length. In front: yes, all of it. So put
# what is common first: system prompt, examples, documents, then what differs (and no timestamp at
# the top!). Layer 0 alone is worth nothing: the other layers need the whole forward pass.
question_first = [cache_of([*question, 7, 7, 7, 7])[1][-4:] for question in ([1, 2], [3, 4])]
question_last = [cache_of([7, 7, 7, 7, *question])[1][:4] for question in ([1, 2], [3, 4])]
assert question_first[0] != question_first[1]
assert question_last[0] == question_last[1]

# %% [markdown]
# ## 3. A chain of hashes
#
# Give each full block a name made of the name before it and its own tokens. Then a dictionary from
# names to blocks finds any prefix. It is vLLM's way.


# %%
def names_of(tokens: Sequence[int], name_of: Callable = hash, root: object = 0) -> list:
    names, name = [], root
    for block in blocks_of(tokens):
        name = name_of((name, block))
        names.append(name)
    return names


class HashTable:
    """From names to blocks. Here a block's number also stands for the memory it names."""

    def __init__(self, name_of: Callable = hash, root: object = 0) -> None:
        self.name_of, self.root = name_of, root
        self.blocks: dict = {}

    def match(self, tokens: Sequence[int]) -> list[int]:
        found = []
        for name in names_of(tokens, self.name_of, self.root):
            if name not in self.blocks:
                break
            found.append(self.blocks[name])
        return found

    def insert(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        names = names_of(tokens, self.name_of, self.root)
        for name, block in zip(names, blocks, strict=False):
            self.blocks.setdefault(name, block)


S, A, B = words(12), words(8), words(8)  # a system prompt and two questions
index = HashTable()
index.insert(S + A, [0, 1, 2, 3, 4])
assert index.match(S + B) == [0, 1, 2]
assert index.match(S + A + B) == [0, 1, 2, 3, 4]
assert index.match(B + S) == []

# %% [markdown]
# **Exercise 3.** Make two faulty versions and show a prompt that gets wrong blocks: (a) the name
# does not contain the one before it; (b) names have 6 bits. What would you do about (b)?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 3. (a) A block is found behind any prefix: exercise 2's wrong numbers. (b) Two blocks get
# the same name, and the second prompt continues somebody else's text. Against (b): a cryptographic
# hash (vLLM's default is SHA-256), or keep the tokens and compare them on every hit (m6): then a
# collision costs a hit and never a wrong token.
faulty = HashTable(lambda pair: hash(pair[1]))
faulty.insert(S + A, [0, 1, 2, 3, 4])
print("(a)", A[:4] + B[:4], "is given", faulty.match(A[:4] + B[:4]), "computed behind S")
assert faulty.match(A[:4]) == [3]

narrow = HashTable(lambda pair: hash(pair) % 64)
narrow.insert(S + A, [0, 1, 2, 3, 4])
strangers = [words(4) for _ in range(1000)]
wrong = sum(bool(narrow.match(stranger)) for stranger in strangers)
print(f"(b) of 1,000 prompts unlike all others {wrong} are given blocks")
assert wrong > 20

# %% [markdown]
# ## 4. A radix tree
#
# The same, with names replaced by places. An edge holds a run of blocks; it is cut where two
# sequences part. A walk ends where the prompt differs, and it knows *what* stands there instead.


# %%
@dataclass(eq=False)
class Node:
    parent: Node | None
    keys: list[tuple[int, ...]]
    blocks: list[int]
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


class Tree:
    def __init__(self) -> None:
        self.root = Node(None, [], [])
        self.compared = 0

    def walk(self, keys: Sequence[tuple[int, ...]]) -> tuple[Node, int, list[int]]:
        """Where a walk along keys ends (node, how far into it), and the blocks on the way."""
        node, offset, found = self.root, 0, []
        while len(found) < len(keys):
            if offset == len(node.blocks):
                self.compared += 1
                child = node.children.get(keys[len(found)])
                if child is None:
                    break
                node, offset = child, 0
            length = common_length(node.keys[offset:], keys[len(found) :])
            self.compared += length + 1
            found += node.blocks[offset : offset + length]
            offset += length
            if offset < len(node.blocks):
                break
        return node, offset, found

    def match(self, tokens: Sequence[int]) -> list[int]:
        return self.walk(blocks_of(tokens))[2]

    def cut(self, node: Node, length: int) -> Node:
        """The first blocks of an edge as a node of their own."""
        if length == len(node.blocks):
            return node
        upper = Node(node.parent, node.keys[:length], node.blocks[:length])
        node.parent.children[upper.keys[0]] = upper
        node.keys, node.blocks, node.parent = node.keys[length:], node.blocks[length:], upper
        upper.children[node.keys[0]] = node
        return upper

    def insert(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        keys = blocks_of(tokens)
        node, offset, found = self.walk(keys)
        if len(found) < len(keys):
            node = self.cut(node, offset)
            rest = slice(len(found), len(keys))
            node.children[keys[len(found)]] = Node(node, keys[rest], list(blocks[rest]))

    def nodes(self) -> list[Node]:
        found, queue = [], [self.root]
        while queue:
            node = queue.pop()
            found.append(node)
            queue += node.children.values()
        return found[1:]

    def show(self) -> None:
        def line(node: Node, depth: int) -> None:
            print("    " * depth + f"{node.blocks}")
            for child in node.children.values():
                line(child, depth + 1)

        for child in self.root.children.values():
            line(child, 0)


tree = Tree()
tree.insert(S + A, [0, 1, 2, 3, 4])
tree.show()
assert tree.match(S + B) == [0, 1, 2]
tree.insert(S + B, [0, 1, 2, 5, 6])
print("after the second one:")
tree.show()
assert tree.match(S + B) == [0, 1, 2, 5, 6]

# Both indexes find the same, whatever comes.
table, tree, number = HashTable(), Tree(), 0
for _ in range(300):
    tokens = [random.randrange(2) for _ in range(random.randrange(40))]
    assert table.match(tokens) == tree.match(tokens)
    found = tree.match(tokens)
    fresh = list(range(number, number + len(tokens) // SIZE - len(found)))
    number += len(fresh)
    tree.insert(tokens, found + fresh)
    table.insert(tokens, found + fresh)
print(f"{len(table.blocks)} names, {len(tree.nodes())} nodes")

# %% [markdown]
# **Exercise 4.** 50 conversations of 100 blocks share the first 40. How many names has the table,
# how many nodes the tree? And how many comparisons costs a match of the whole of one of them?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 4. Both have 40 + 50 x 60 = 3,040 blocks, so the table has 3,040 names. The tree has 51
# nodes. A match compares each of 100 blocks once, and a few more at the two nodes: 104. The table
# makes 100 names, looks up each, and compares as many.
tree, shared, number = Tree(), words(40 * SIZE), 0
for _ in range(50):
    tokens = shared + words(60 * SIZE)
    tree.insert(tokens, range(number, number + 100))
    number += 100
tree.compared = 0
assert len(tree.match(tokens)) == 100
print(f"{len(tree.nodes())} nodes, {tree.compared} comparisons")
assert (len(tree.nodes()), tree.compared) == (51, 104)

# %% [markdown]
# ## 5. Who holds a block
#
# A block is free, held by sequences, or *idle*: only the index holds it. One count does for all
# three. The index holds each of its blocks once; so a count of 1 in the index means idle.


# %%
class Pool:
    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = list(range(num_blocks))[::-1]

    def allocate(self) -> int:
        block = self.free.pop()
        assert self.counts[block] == 0, "a block with a holder was free"
        self.counts[block] = 1
        return block

    def share(self, block: int) -> None:
        assert self.counts[block] > 0, "a free block was shared"
        self.counts[block] += 1

    def release(self, block: int) -> None:
        assert self.counts[block] > 0, "a block was released twice"
        self.counts[block] -= 1
        if self.counts[block] == 0:
            self.free.append(block)


pool = Pool(4)
block = pool.allocate()  # a sequence computes it
pool.share(block)  # and the index takes it in
pool.share(block)  # another sequence finds it
pool.release(block)
pool.release(block)  # both have ended
assert pool.counts[block] == 1
assert len(pool.free) == 3
pool.release(block)  # the index gives it up
assert len(pool.free) == 4

# %% [markdown]
# **Exercise 5.** Four blocks are all idle. A prompt of four blocks finds the first two of them. May
# it run, if we ask "does what it lacks (2) fit into what is free or idle (4)"? And with a prompt
# of five blocks?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 5. It lacks 2 and may run: its own two matched blocks are held from then on, and 4 - 2
# idle ones are left, just enough. With five blocks it lacks 3, which is less than 4, and it fails
# in the middle: two of the four are those that it holds itself. Ask for what is left *beside* the
# match (`num_free_beside` in m6).
idle, matched = 4, 2
for length in (4, 5):
    lacks = length - matched
    print(f"{length} blocks: naive {lacks <= idle}, right {lacks <= idle - matched}")

# %% [markdown]
# ## 6. Which block goes first
#
# A queue of idle blocks in the order in which they became so is all that LRU takes: no clock. But
# the order *within* a sequence matters. A prefix is read from its beginning, so its end must go
# first.


# %%
class Cache:
    """A hash table over a pool, with eviction. ``end_first``: how a sequence lets go."""

    def __init__(self, num_blocks: int, end_first: bool = True) -> None:
        self.pool, self.table, self.end_first = Pool(num_blocks), HashTable(), end_first
        self.name_of: dict[int, object] = {}  # of a block in the table
        self.idle: OrderedDict[int, None] = OrderedDict()

    def take(self) -> int:
        if not self.pool.free:
            block, _ = self.idle.popitem(last=False)
            del self.table.blocks[self.name_of.pop(block)]  # or a later prompt finds its new owner
            self.pool.release(block)
        return self.pool.allocate()

    def serve(self, tokens: Sequence[int]) -> int:
        """Compute a sequence and let go of it; returns how many of its blocks were found."""
        found = self.table.match(tokens)
        for block in found:
            self.idle.pop(block, None)
            self.pool.share(block)
        names = names_of(tokens)
        blocks = found + [self.take() for _ in names[len(found) :]]
        for name, block in list(zip(names, blocks, strict=True))[len(found) :]:
            self.table.blocks[name] = block
            self.name_of[block] = name
            self.pool.share(block)
        for block in reversed(blocks) if self.end_first else blocks:
            self.pool.release(block)
            self.idle[block] = None
        return len(found)


long = words(10 * SIZE)
for end_first in (True, False):
    cache = Cache(12, end_first)
    cache.serve(long)
    cache.serve(words(4 * SIZE))  # needs four blocks: two are free, two must go
    print(f"end first {end_first}: {cache.serve(long)} of 10 blocks are found again")

# %% [markdown]
# **Exercise 6.** How many are found in each case, and why? What would happen without the `del` in
# `take`?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 6. 8 and 0. Beginning first: the two blocks that went are the first two, and without them
# the walk ends at once. The other eight are in memory, in the table, and of no use to anybody. A
# tree cannot make this mistake if it evicts leaves. Without the `del` the old name leads to a block
# that holds somebody else's tokens now: the stale hash, the classic of all prefix caches.
counts = []
for end_first in (True, False):
    cache = Cache(12, end_first)
    cache.serve(long)
    cache.serve(words(4 * SIZE))
    counts.append(cache.serve(long))
assert counts == [8, 0]

# %% [markdown]
# ## 7. The last token, and a block that is shared in part
#
# A prompt that is cached to its end has no token left to compute, and then nothing to draw the next
# token from. So the match may cover all but the last one. In full blocks that costs up to a whole
# block; a copy of the block whose beginning fits gives it back. The tree knows which one is most
# alike.


# %%
def most_alike(node: Node, offset: int, rest: Sequence[int]) -> tuple[int | None, int]:
    """The block behind a place that begins as ``rest`` does, and how many tokens of it do."""
    if offset < len(node.blocks):
        candidates = [(node.keys[offset], node.blocks[offset])]
    else:
        candidates = [(key, child.blocks[0]) for key, child in node.children.items()]
    lengths = [(common_length(key, rest), block) for key, block in candidates]
    length, block = max(lengths, default=(0, None))
    return (block, length) if length else (None, 0)


def match_partly(tree: Tree, tokens: Sequence[int]) -> tuple[list[int], int | None, int]:
    """(shared blocks, a block to copy, tokens of it); at least one token is left to compute."""
    asked = tokens[:-1]
    node, offset, found = tree.walk(blocks_of(asked))
    return found, *most_alike(node, offset, asked[len(found) * SIZE :])


tree = Tree()
tree.insert(S + A, [0, 1, 2, 3, 4])
print("all of it:       ", match_partly(tree, S + A))
print("parts in block 3:", match_partly(tree, S + A[:2] + [1001, 1002, 1003]))
print("continues:       ", match_partly(tree, S + A + B))
assert match_partly(tree, S + A) == ([0, 1, 2, 3], 4, 3)
assert match_partly(tree, S + A[:2] + [1001, 1002, 1003]) == ([0, 1, 2], 3, 2)

# %%
memory = [[None] * SIZE for _ in range(8)]  # what each block really holds


def play(parts: list[tuple[Sequence[int], int, list[int]]], copies: list[tuple[int, int]]) -> None:
    """A step: copies first, then every part writes its tokens from ``start`` on."""
    for source, target in copies:
        memory[target] = list(memory[source])
    for tokens, start, blocks in parts:
        for place in range(start, len(tokens)):
            memory[blocks[place // SIZE]][place % SIZE] = tokens[place]


first, second = [*range(10), 50, 51, 52], [*range(10), 60, 61, 62]

# %% [markdown]
# **Exercise 7.** Copies are made *before* a step. Two requests arrive together: both begin with the
# same 10 tokens (two and a half blocks), nothing is cached, and blocks are entered when their
# tokens are scheduled. Play the step with the memory below and find what the second one reads.

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 7. The first request's third block is entered when it is scheduled, so the second one
# finds two shared blocks and two tokens of a third one to copy. Sharing is safe: who reads comes
# behind who writes, in every layer. The copy is not: it is made before the step that fills its
# source. Tokens 8 and 9 of the second request are never there. m6 remembers which blocks the step
# being planned fills, and does not copy from them.
play([(first, 0, [0, 1, 2, 3]), (second, 10, [0, 1, 4, 5])], copies=[(2, 4)])
print("the second one's third block:", memory[4], "expected", second[8:12])
assert memory[4] == [None, None, 60, 61]
play([(second, 8, [0, 1, 4, 5])], copies=[])  # the cure: compute from the block's beginning
assert memory[4] == second[8:12]

# %% [markdown]
# ## 8. When it does not help
#
# Two loads that are hard on any LRU cache: prompts that have nothing in common, and users who ask
# in turn while the cache is a little too small for all of them.


# %%
def hit_rate(num_blocks: int, requests: Sequence[Sequence[int]]) -> float:
    cache = Cache(num_blocks)
    return sum(cache.serve(r) for r in requests) / sum(len(r) // SIZE for r in requests)


users = [words(25 * SIZE) for _ in range(8)]
in_turn = [users[i % 8] for i in range(80)]
popular = [users[min(int(random.expovariate(0.7)), 7)] for _ in range(80)]
unlike = [words(25 * SIZE) for _ in range(80)]
sizes = range(25, 226, 5)
plt.figure(figsize=(7, 3.6))
for name, requests in (("in turn", in_turn), ("some more popular", popular), ("unlike", unlike)):
    plt.plot(sizes, [hit_rate(n, requests) for n in sizes], label=name)
plt.xlabel("blocks in the cache (all users together: 200)")
plt.ylabel("share of blocks found")
plt.legend()
plt.show()
assert hit_rate(200, in_turn) == 0.9
assert hit_rate(175, in_turn) == 0.0
assert hit_rate(225, unlike) == 0.0

# %% [markdown]
# **Exercise 8.** "In turn" falls from 90 % to 0 between 200 and 175 blocks. Why so steep, what
# would the best possible policy reach at 175, and what helps in practice?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 8. The least recently used user is the one who asks next, so LRU evicts exactly what is
# needed; with blocks for 7 of 8 users each one's is gone by its turn. Whoever knows the future
# (Belady 1966) evicts what is needed last: it keeps six users and sacrifices the rest, 6 / 7 of
# all blocks in the long run, 78 % here with the first round. In practice: more room (smaller
# weights, an 8-bit cache, host memory as a second level), or requests of one user sent to the
# engine that has them.
def best_possible(capacity: int, requests: Sequence[int]) -> float:
    """Whole users instead of blocks; evict who is asked for last."""
    held: set[int] = set()
    hits = 0
    for now, user in enumerate(requests):
        hits += user in held
        if user not in held:
            if len(held) == capacity:
                later = {u: next((t for t in range(now, len(requests)) if requests[t] == u), 10**9)
                         for u in held}
                held.remove(max(later, key=later.__getitem__))
            held.add(user)
    return hits / len(requests)


print(f"LRU with 175 blocks {hit_rate(175, in_turn):.0%}, "
      f"best {best_possible(7, [i % 8 for i in range(80)]):.0%}")
assert best_possible(7, [i % 8 for i in range(80)]) > 0.7

# %% [markdown]
# ## 9. What a hit tells others
#
# A hit is fast, and time can be measured. Who shares a cache with you can ask whether a prompt
# begins as one of yours did. Here the attacker sees only how many blocks were computed, and guesses
# a secret of four digits behind a known beginning.

# %%
known_part = words(2 * SIZE)
secret = [random.randrange(10) for _ in range(4)]  # fills a block of its own
cache = Cache(64 * 1024)
cache.serve(known_part + secret)  # the victim


def seems_cached(tokens: Sequence[int]) -> bool:
    return cache.serve(tokens) == len(tokens) // SIZE


guesses = 0
for number in range(10_000):
    guess = [int(digit) for digit in f"{number:04d}"]
    guesses += 1
    if seems_cached(known_part + guess):
        break
print(f"the secret {guess} after {guesses} guesses")
assert guess == secret

# %% [markdown]
# **Exercise 9.** Blocks of four tokens made the attacker guess all four digits at once. What
# changes if partly shared blocks are copied, as in step 7? And how does a salt help?

# %% jupyter={"source_hidden": true} tags=["solution", "hide-input"]
# Solution 9. Then hits are exact to the token, and the digits can be guessed one by one: at most 40
# guesses instead of 10,000 (a copy only from half a block on makes it two digits at once, then one
# by one). A salt goes into the root's name: prompts of different tenants have no name in common,
# so nothing can be asked; those of one tenant still share.
mine, theirs = HashTable(root="salt of tenant 1"), HashTable(root="salt of tenant 2")
one_table: dict = {}
mine.blocks = theirs.blocks = one_table  # one memory for both
mine.insert(known_part + secret, [0, 1, 2])
assert mine.match(known_part + secret) == [0, 1, 2]
assert theirs.match(known_part + secret) == []

tree, asked = Tree(), 0
tree.insert(known_part + secret, [0, 1, 2])
guess = []
for _ in range(4):
    for digit in range(10):
        asked += 1
        node, offset, found = tree.walk(blocks_of(known_part))
        if most_alike(node, offset, [*guess, digit])[1] == len(guess) + 1:
            guess.append(digit)
            break
print(f"token by token: {guess} after {asked} guesses")
assert guess == secret
assert asked <= 40

# %% [markdown]
# ## What is missing
#
# m6 does the same with blocks of 16 and a scheduler around it: chunks of prompts in one budget with
# decodes, requests that wait for a prefix that is being computed, a tree whose order of eviction
# needs no search, counters, and no block lost when requests are aborted or preempted.
# [Note 6](06_prefix_caching.md) goes through it.

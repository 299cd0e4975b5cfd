"""Draws the pictures of note 6. Needs nothing but Python.

    python learn/images/06_figures.py

Every picture has a light panel of its own, so it reads the same on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence

from canvas import BLUE, CORAL, GREY, INK, LINE, PANEL, SAND, SOFT, TEAL, Canvas


def blocks(c: Canvas, x: float, y: float, names: Sequence[str], fill: str, w: float = 38) -> None:
    """A run of blocks, each with its name."""
    for i, name in enumerate(names):
        c.box(x + i * w, y, w - 2, 26, fill)
        c.text(x + i * w + (w - 2) / 2, y + 18, name, anchor="middle", size=12)


def table(c: Canvas, x: float, y: float, rows: Sequence[tuple[str, str, str]]) -> None:
    """Names, what they are computed from, and the block each leads to."""
    for i, (name, made_of, block) in enumerate(rows):
        top = y + i * 26
        c.box(x, top, 46, 22, PANEL, LINE)
        c.text(x + 23, top + 16, name, anchor="middle", size=12, mono=True)
        c.text(x + 54, top + 16, made_of, size=12, mono=True, fill=SOFT)
        c.arrow(x + 178, top + 11, x + 204, top + 11)
        fill = BLUE if block[0] == "S" else TEAL if block[0] == "A" else SAND
        blocks(c, x + 210, top - 2, [block], fill)


def both() -> None:
    """The same three sequences in the tree and in the table."""
    c = Canvas("06_both", "The same three sequences, found in two ways", 860, 372)
    c.text(24, 62, "the radix tree: what a block follows is where it hangs", bold=True)
    blocks(c, 60, 160, ["S1", "S2", "S3"], BLUE)
    c.dot(38, 173, INK)
    c.line([(38, 173), (60, 173)], INK)
    for y, names, fill in ((104, ["A1", "A2"], TEAL), (216, ["B1", "B2", "B3", "B4"], SAND)):
        c.line([(172, 173), (200, y + 13)], INK)
        blocks(c, 200, y, names, fill)
    c.text(60, 212, "one edge", size=12, fill=SOFT)
    c.text(200, 150, "its first key is how one finds it", size=12, fill=SOFT)
    for i, line in enumerate((
        "3 nodes for 9 blocks; a new one only where sequences part",
        "neighbours are known: what is like B2, what follows S3",
    )):
        c.text(24, 290 + i * 20, line, size=12)
    c.text(460, 62, "the table: what a block follows is in its name", bold=True)
    table(c, 460, 78, [
        ("h1", "(root, S1)", "S1"), ("h2", "(h1, S2)", "S2"), ("h3", "(h2, S3)", "S3"),
        ("h4", "(h3, A1)", "A1"), ("h5", "(h4, A2)", "A2"), ("h6", "(h3, B1)", "B1"),
        ("h7", "(h6, B2)", "B2"), ("h8", "(h7, B3)", "B3"), ("h9", "(h8, B4)", "B4"),
    ])
    c.text(460, 336, "9 names for 9 blocks; nothing to split, nothing to walk;", size=12)
    c.text(460, 356, "a name says nothing about its neighbours", size=12)
    c.save()


def steps() -> None:
    """Insert, match, split, evict on both."""
    c = Canvas("06_steps", "Insert A, match B, insert B, take three blocks back", 860, 560)
    c.text(24, 60, "the tree", bold=True)
    c.text(500, 60, "the table of hashes", bold=True)
    rows = (
        ("1  insert A: one edge; five names", 76),
        ("2  match B: five comparisons, or four names and three comparisons", 192),
        ("3  insert B: the edge is cut behind S3; two more names", 308),
        ("4  evict three: A is idle for longest and goes from its end; then B's end", 440),
    )
    for text, y in rows:
        c.line([(24, y), (836, y)], LINE, 1)
        c.text(24, y + 20, text, size=12, bold=True)
    s, a, b = ["S1", "S2", "S3"], ["A1", "A2"], ["B1", "B2"]
    names = ["h1", "h2", "h3", "h4", "h5"]
    c.dot(38, 130, INK)
    blocks(c, 52, 117, s, BLUE)
    blocks(c, 52 + 3 * 38, 117, a, TEAL)
    blocks(c, 500, 117, names, GREY)
    c.text(24, 166, "1 comparison: the root has no such child", size=12, fill=SOFT)
    c.text(500, 166, "5 hashes, 0 comparisons", size=12, fill=SOFT)

    c.dot(38, 244, INK)
    blocks(c, 52, 231, s, BLUE)
    blocks(c, 52 + 3 * 38, 231, a, GREY)
    c.line([(52 + 3 * 38 - 1, 224), (52 + 3 * 38 - 1, 264)], CORAL, 2.4)
    c.text(52 + 3 * 38 + 6, 278, "B1 is not A1: here they part", size=12, fill=CORAL)
    blocks(c, 500, 231, ["h1", "h2", "h3"], BLUE)
    blocks(c, 500 + 3 * 38, 231, ["h6"], PANEL)
    c.text(500 + 4 * 38 + 6, 249, "hash(h3, B1): no such name", size=12, fill=CORAL)

    c.dot(38, 374, INK)
    blocks(c, 52, 361, s, BLUE)
    for y, run, fill in ((342, a, TEAL), (384, b, SAND)):
        c.line([(164, 374), (190, y + 13)], INK)
        blocks(c, 190, y, run, fill)
    c.text(290, 360, "keeps its identity: only its", size=12, fill=SOFT)
    c.text(290, 376, "beginning became another node", size=12, fill=SOFT)
    blocks(c, 500, 361, [*names, "h6", "h7"], GREY)
    c.text(500, 408, "nothing of what was there is touched", size=12, fill=SOFT)

    c.dot(38, 505, INK)
    blocks(c, 52, 492, s, BLUE)
    c.line([(164, 505), (190, 505)], INK)
    blocks(c, 190, 492, b[:1], SAND)
    c.text(52, 542, "order: A2, A1, then B2; B1 and S stay, and can be reached", size=12, fill=SOFT)
    blocks(c, 500, 492, ["h1", "h2", "h3"], GREY)
    blocks(c, 500 + 3 * 38, 492, ["h6"], GREY)
    c.text(500, 542, "the same order, if sequences let go of their end first", size=12, fill=SOFT)
    c.save()


def partial() -> None:
    """A block that two prompts share in part."""
    c = Canvas("06_partial", "Two prompts part inside a block: copy it, compute the rest", 860, 316)
    w = 18
    for y, label, block_ids, cached in (
        (70, "cached", (7, 2, 9), 48), (180, "new prompt", (7, 2, 12), 42),
    ):
        c.text(24, y + 20, label, bold=True)
        for i in range(48):
            x = 130 + i * (w - 4) + (i // 16) * 12
            old = i < cached
            fill = (BLUE if i < 32 else TEAL) if old else SAND
            c.box(x, y, w - 5, 26, fill if y < 100 or i < 44 else PANEL)
        for j, block in enumerate(block_ids):
            x = 130 + j * (16 * (w - 4) + 12)
            c.text(x, y - 8, f"block {block}", size=12, fill=SOFT)
    x = 130 + 2 * (16 * (w - 4) + 12)
    c.arrow(x + 60, 100, x + 60, 162, CORAL)
    c.text(x + 70, 128, "copied before the step;", size=12, fill=CORAL)
    c.text(x + 70, 144, "10 tokens of it are ours", size=12, fill=CORAL)
    c.text(130, 128, "shared: the same blocks,", size=12)
    c.text(130, 144, "one more holder each", size=12)
    c.text(24, 240, "42 of 44 tokens are not computed again. Without the copy it would be 32. With "
           "a prompt of 42 tokens it would be 41:", size=12)
    c.text(24, 260, "the last one is always computed, because the next token is drawn from its "
           "result.", size=12)
    for i, (label, color) in enumerate((
        ("shared", BLUE), ("copied", TEAL), ("computed", SAND), ("free", PANEL),
    )):
        c.box(24 + i * 110, 280, 14, 14, color)
        c.text(44 + i * 110, 292, label, size=12)
    c.save()


# From 06_experiments.py cold: (step, request, first token, end) of what is computed of prompts.
COLD_OFF = (
    (0, 0, 0, 2048), (1, 0, 2048, 4096), (2, 0, 4096, 4146), (2, 1, 0, 1998), (3, 1, 1998, 4045),
    (4, 1, 4045, 4146), (4, 2, 0, 1946), (5, 2, 1946, 3992), (6, 2, 3992, 4146), (6, 3, 0, 1893),
    (7, 3, 1893, 3939), (8, 3, 3939, 4146), (8, 4, 0, 1840), (9, 4, 1840, 3886),
    (10, 4, 3886, 4146), (10, 5, 0, 1787), (11, 5, 1787, 3833), (12, 5, 3833, 4146),
    (12, 6, 0, 1734), (13, 6, 1734, 3780), (14, 6, 3780, 4146), (14, 7, 0, 1681),
    (15, 7, 1681, 3727), (16, 7, 3727, 4146),
)
COLD_ON = (
    (0, 0, 0, 2048), (1, 0, 2048, 4096), *((2, i, 4096, 4146) for i in range(8)),
)


def waiting() -> None:
    """Eight requests behind the same cold prefix, step by step."""
    c = Canvas("06_waiting", "Eight requests meet the same cold prefix of 4,096 tokens", 860, 400)
    for x0, name, parts, last in (
        (70, "m5: each computes it", COLD_OFF, 16), (640, "m6: one does, seven wait", COLD_ON, 2),
    ):
        c.text(x0 - 46, 62, name, bold=True)
        step = 30
        for request in range(8):
            y = 84 + request * 32
            c.text(x0 - 12, y + 17, str(request), anchor="end", size=12, fill=SOFT)
            c.line([(x0, y + 13), (x0 + (last + 1) * step, y + 13)], LINE, 1)
        for at, request, first, end in parts:
            height = max(24 * (end - first) / 2048, 4)
            y = 84 + request * 32 + 13 - height / 2
            fill = TEAL if end <= 4096 else SAND
            c.box(x0 + at * step + 2, y, step - 5, height, fill)
        for at in range(last + 1):
            c.text(x0 + at * step + step / 2, 84 + 8 * 32 + 14, str(at), anchor="middle", size=11,
                   fill=SOFT)
        c.text(x0 + (last + 1) * step / 2, 84 + 8 * 32 + 32, "step", anchor="middle", size=12,
               fill=SOFT)
    c.text(24, 388, "Height: tokens in this step, at most 2,048. Sand: what reaches a request's "
           "own 50. In all: 33,168 tokens against 4,496.", size=12)
    c.save()


# From 06_experiments.py pressure: blocks of the pool, share of prompt tokens not computed.
POOLS = (512, 640, 768, 896, 1024, 1152, 1280, 1536, 2048)
SAVED = (43.9, 47.1, 52.8, 59.8, 67.8, 75.3, 81.0, 92.2, 94.5)
SAVED_BEGINNING_FIRST = (42.7, 43.4, 49.7, 58.7, 63.0, 73.9, 79.3, 91.0, 94.5)
THRASH_POOLS = (144, 192, 240, 256, 264, 280)
THRASH = (0.0, 0.0, 65.6, 87.9, 89.3, 89.3)


def pressure() -> None:
    """What is saved as the pool gets smaller."""
    c = Canvas("06_pressure", "What is saved when the pool is too small", 860, 360)
    top, height = 84, 210

    def panel(
        x0: float, width: float, name: str, low: int, high: int, marks: Sequence[int]
    ) -> None:
        c.text(x0, 64, name, bold=True)
        for share in (0, 25, 50, 75, 100):
            y = top + height * (1 - share / 100)
            c.line([(x0, y), (x0 + width, y)], LINE, 1)
            c.text(x0 - 8, y + 4, f"{share} %", anchor="end", size=11, fill=SOFT)
        for mark in marks:
            x = x0 + width * (mark - low) / (high - low)
            c.text(x, top + height + 18, f"{mark:,}", anchor="middle", size=11, fill=SOFT)
        c.text(x0 + width / 2, top + height + 36, "blocks in the pool", anchor="middle", size=12,
               fill=SOFT)

    def curve(
        x0: float, width: float, low: int, high: int, pools: Sequence[int],
        shares: Sequence[float], color: str, dashed: bool = False,
    ) -> None:
        points = [
            (x0 + width * (pool - low) / (high - low), top + height * (1 - share / 100))
            for pool, share in zip(pools, shares, strict=True)
        ]
        c.line(points, color, 2.2, dashed)
        for x, y in points:
            c.dot(x, y, color)

    panel(74, 390, "a chat of 16 users, 8 turns each", 512, 2048, (512, 1024, 1536, 2048))
    curve(74, 390, 512, 2048, POOLS, SAVED_BEGINNING_FIRST, CORAL, True)
    curve(74, 390, 512, 2048, POOLS, SAVED, TEAL)
    c.text(200, 240, "tree, and hashes released end first", size=12, fill=TEAL, bold=True)
    c.text(200, 260, "hashes released beginning first", size=12, fill=CORAL, bold=True)
    panel(560, 260, "4 users in turn, 65 blocks each", 130, 290, (144, 192, 240, 280))
    curve(560, 260, 130, 290, THRASH_POOLS, THRASH, TEAL)
    c.text(574, 130, "LRU throws away", size=12)
    c.text(574, 146, "what is needed next", size=12)
    c.save()


if __name__ == "__main__":
    both()
    steps()
    partial()
    waiting()
    pressure()

"""Draws the pictures of note 3 that are not charts. Needs nothing but Python.

    python learn/images/03_figures.py

Every picture has a light panel of its own, so it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import math

from canvas import BLUE, CORAL, GREY, PANEL, SAND, SOFT, TEAL, Canvas


def block_tables() -> None:
    """Two sequences, their tables, and the pool: the example of m3_paged/kv_cache.py."""
    c = Canvas("03_block_tables", "Block tables over one pool (block size 16)", 860, 470)
    rows, cell, left, top = 10, 16, 440, 74
    filled = {7: (16, TEAL), 2: (16, BLUE), 9: (5, BLUE), 4: (5, SAND)}
    holders = {7: "A and B: count 2", 2: "A", 9: "A, 11 slots empty", 4: "B, 11 slots empty"}
    c.text(left, 60, "pool: slot = block x 16 + offset", size=12, fill=SOFT)
    for block in range(rows):
        y = top + block * 30
        count, color = filled.get(block, (0, GREY))
        c.text(left - 10, y + 15, str(block), anchor="end", mono=True)
        for i in range(16):
            c.box(left + i * cell, y, cell - 1.5, 20, color if i < count else GREY, "none")
        c.text(left + 16 * cell + 8, y + 15, holders.get(block, "free"), size=11, fill=SOFT)
    tables = (
        ("A", 37, (7, 2, 9), (TEAL, BLUE, BLUE), 96),
        ("B", 21, (7, 4), (TEAL, SAND), 258),
    )
    for name, num_tokens, blocks, colors, y in tables:
        c.text(40, y - 10, f"sequence {name}: {num_tokens} tokens", bold=True)
        for i, (block, color) in enumerate(zip(blocks, colors, strict=True)):
            row, last = y + i * 36, min(16 * i + 15, num_tokens - 1)
            c.text(130, row + 20, f"tokens {16 * i}-{last}", anchor="end", size=12, fill=SOFT)
            c.box(142, row, 60, 30, color)
            c.text(172, row + 20, str(block), anchor="middle", bold=True, mono=True)
            c.arrow(204, row + 15, left - 28, top + block * 30 + 10)
    c.text(40, 400, "token 36 of A", bold=True)
    c.text(40, 420, "table[36 // 16] = table[2] = 9,  36 % 16 = 4", mono=True, size=12)
    c.text(40, 440, "slot = 9 x 16 + 4 = 148", mono=True, size=12)
    c.text(left, 400, "free list, a stack:", size=12, fill=SOFT)
    for i, block in enumerate((8, 6, 5, 3, 1, 0)):
        c.box(left + i * 34, 412, 28, 26, GREY)
        c.text(left + i * 34 + 14, 430, str(block), anchor="middle", mono=True)
    c.text(left + 6 * 34 + 6, 430, "next: 0", size=12, fill=SOFT)
    c.save()


def copy_on_write() -> None:
    """Three samples of a prompt of 20 tokens in blocks of 8, before and after the first write."""
    title = "Copy-on-write: three samples of a prompt of 20 tokens, blocks of 8"
    c = Canvas("03_copy_on_write", title, 860, 400)

    def block(x: float, y: float, name: str, count: int, prompt: int, note: str) -> None:
        c.text(x, y - 6, name, size=12, bold=True, mono=True)
        c.text(x + 30, y - 6, note, size=11, fill=SOFT)
        for i in range(8):
            fill = TEAL if i < prompt else CORAL if i < count else GREY
            c.box(x + i * 15, y, 13.5, 22, fill, "none")

    def table(x: float, y: float, name: str, blocks: tuple[int, ...], changed: bool) -> None:
        c.text(x, y + 17, name, size=12)
        for i, each in enumerate(blocks):
            c.box(x + 62 + i * 32, y, 28, 24, SAND if changed and i == 2 else PANEL)
            c.text(x + 76 + i * 32, y + 17, str(each), anchor="middle", mono=True)

    c.text(40, 68, "after the prefill: one computation, two forks", bold=True)
    for i in range(3):
        table(40, 84 + i * 34, f"sample {i}", (0, 1, 2), False)
    block(240, 104, "0", 8, 8, "count 3")
    block(240, 150, "1", 8, 8, "count 3")
    block(240, 196, "2", 4, 4, "count 3")
    c.text(40, 250, "3 blocks. A fork takes none: it copies", size=12, fill=SOFT)
    c.text(40, 267, "the table and raises three counts.", size=12, fill=SOFT)

    c.text(450, 68, "the first decode step: everyone writes token 20", bold=True)
    for i, last in enumerate((3, 4, 2)):
        table(450, 84 + i * 34, f"sample {i}", (0, 1, last), True)
    block(660, 104, "0", 8, 8, "count 3, never written again")
    block(660, 150, "1", 8, 8, "count 3, never written again")
    block(660, 214, "3", 5, 4, "copy of 2: sample 0")
    block(660, 260, "4", 5, 4, "copy of 2: sample 1")
    block(660, 306, "2", 5, 4, "count 1 by now: sample 2")
    c.text(450, 214, "copies, before the step:", size=12, fill=SOFT)
    c.text(450, 234, "2 -> 3", mono=True, size=12)
    c.text(450, 252, "2 -> 4", mono=True, size=12)
    c.text(450, 282, "The last to write is alone", size=12, fill=SOFT)
    c.text(450, 299, "with the original: no copy.", size=12, fill=SOFT)
    for i, (label, color) in enumerate((("prompt", TEAL), ("the sample's own", CORAL),
                                        ("empty", GREY))):
        c.box(40 + i * 150, 362, 14, 14, color, "none")
        c.text(60 + i * 150, 374, label, size=12)
    c.text(450, 374, "5 blocks; three separate prompts would take 9.", size=12, fill=SOFT)
    c.save()


def split_kv() -> None:
    """Two sequences of different length, each cut in four by its own length, and the merge."""
    c = Canvas("03_split_kv", "Decode attention: split over the context, then combined", 860, 440)
    colors = (TEAL, BLUE, SAND, CORAL)
    c.text(40, 62, "grid: KV head x sequence x split (one KV head shown); B = 2, 4 splits", size=12,
           fill=SOFT)
    for place, (name, length, width) in enumerate((
        ("sequence 0", 4096, 640), ("sequence 1", 1000, 160),
    )):
        top = 96 + place * 168
        tile = math.ceil(math.ceil(length / 4) / 64) * 64
        c.text(40, top - 8, f"{name}: {length} tokens, {tile} a split (whole tiles of 64)")
        for i in range(4):
            tokens = min(tile, length - i * tile)
            x, w = 40 + width * i * tile / length, width * tokens / length
            c.box(x, top, w, 26, colors[i])
            c.text(x + w / 2, top + 18, str(tokens), anchor="middle", size=11)
            target = 40 + i * 168
            c.arrow(x + w / 2, top + 26, target + 72, top + 54)
            c.box(target, top + 56, 146, 34, PANEL)
            c.box(target, top + 56, 6, 34, colors[i])
            c.text(target + 14, top + 70, f"program {i}", size=11)
            c.text(target + 14, top + 84, "out [G, D], log-sum [G]", size=10.5, fill=SOFT)
            c.arrow(target + 72, top + 90, 704, top + 116)
        c.box(706, top + 104, 120, 26, GREY)
        c.text(766, top + 121, "combine: [G, D]", anchor="middle", size=12)
    c.text(40, 418, "Every token weighs what it would weigh without splits: the merge scales "
           "each part by its sum of exponentials.", size=12, fill=SOFT)
    c.save()


if __name__ == "__main__":
    block_tables()
    copy_on_write()
    split_kv()

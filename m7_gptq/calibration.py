"""Text that quantization looks at, and text that its quality is judged by.

    text = read_text("builtin")                                    # or the name of a file
    samples = token_windows(tokenizer, text, count=128, length=512, seed=0)    # [N, 512]

The built-in text is the standard library's help on Python (`pydoc_data.topics`), so it is there on
any machine; it varies with the version of Python. Sections of it occur under several topics; each
paragraph is taken once, so that the half for calibration and the half for evaluation share none.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common.tokenizer import Tokenizer

BUILTIN = "builtin"
CALIBRATION, EVALUATION = "calibration", "evaluation"


def read_text(source: str, half: str = CALIBRATION) -> str:
    """The named half of the built-in text, or a whole file of UTF-8.

    Raises ValueError for a file that cannot be read, or that is empty.
    """
    if source == BUILTIN:
        return _builtin_halves()[half]
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"can't read text from {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{source} is empty")
    return text


def token_windows(
    tokenizer: Tokenizer, text: str, *, count: int, length: int, seed: int = 0
) -> Tensor:
    """Up to `count` windows of the text that do not overlap, in random order: int64 [N, length].

    A text with fewer windows gives all it has. Raises ValueError if it has not a single one.
    """
    if count < 1 or length < 2:
        raise ValueError(f"need at least 1 window of 2 tokens, asked for {count} of {length}")
    tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    available = len(tokens) // length
    if not available:
        raise ValueError(
            f"the text has {len(tokens)} tokens, too few for one window of {length}; give more "
            "text or ask for shorter windows"
        )
    windows = tokens[: available * length].view(available, length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


@cache
def _builtin_halves() -> dict[str, str]:
    """Topics in alphabetical order go to the two halves by turns."""
    from pydoc_data.topics import topics  # half a megabyte that few runs need

    seen: set[str] = set()
    halves: dict[str, list[str]] = {CALIBRATION: [], EVALUATION: []}
    for index, name in enumerate(sorted(topics)):
        half = (CALIBRATION, EVALUATION)[index % 2]
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                halves[half].append(paragraph)
    return {half: "\n\n".join(paragraphs) for half, paragraphs in halves.items()}

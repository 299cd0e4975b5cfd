"""The sampler's memory: tensors on the device with one row for each running request.

Rows are written when a request comes, read by index at every step, and given to the next request
when theirs has finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

# In place of a token where there is none to choose: the logits held NaN or +inf, or every token
# was banned. The other rows are not affected. Clamp it to 0 before it is used as an index.
INVALID_TOKEN = -1

# A row with neutral parameters that belongs to no request: fills a batch up to a fixed size.
PADDING_ROW = 0

# A row's first biases (most requests have none) come without a wider table at another address.
_FIRST_BIASES = 8


class FloatColumn(IntEnum):
    """The columns of the table of float64 parameters, one row for each request."""

    SCALE = 0  # log2(e) / temperature: logits times this are exponents of 2; 0 = greedy
    LOG2_MIN_P = 1  # -inf = none
    REPETITION = 2
    PRESENCE = 3
    FREQUENCY = 4
    TOP_P = 5


class IntegerColumn(IntEnum):
    """The columns of the table of int64 parameters, one row for each request."""

    TOP_K = 0  # 0 = none
    SEED = 1


@dataclass(frozen=True)
class DeviceRows:
    """All of the sampler's memory as a kernel sees it."""

    floats: Tensor  # [rows, float columns] float64
    integers: Tensor  # [rows, integer columns] int64
    num_sampled: Tensor  # [rows] int64: tokens sampled so far
    bias_tokens: Tensor  # [rows, entries] int64
    biases: Tensor  # [rows, entries] float32
    bias_until: Tensor  # [rows, entries] int64
    in_prompt: Tensor | None  # [rows, V] bool; None before the first request with a penalty
    in_output: Tensor | None  # [rows, V] int32; the same


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values on ``device``, without waiting for the work queued there."""
    return _staged(torch.tensor(values, dtype=dtype), device).to(device, non_blocking=True)


def _staged(tensor: Tensor, device: torch.device) -> Tensor:
    # A fresh pinned copy each time: torch reuses its memory only after the transfer is done.
    return tensor if device.type == "cpu" else tensor.pin_memory()


class RowTable:
    """Parameters written on the host, row by row, and read on the device as one tensor.

    ``tensor`` [rows, columns] is what was last sent to the device.

    Args:
        num_rows: rows to begin with; ``grow`` adds more.
        num_columns: columns to begin with; a longer row widens the table.
        dtype: of all entries.
        device: where it is read.
        empty: fills what no request has written.
    """

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        dtype: torch.dtype,
        device: torch.device,
        empty: float = 0,
    ) -> None:
        self._empty = empty
        self._device = device
        host = torch.full((num_rows, num_columns), empty, dtype=dtype)
        self._host = host.numpy()  # an assignment takes a tenth of the time it takes in torch
        self._written: dict[int, tuple] = {}  # by row
        self._changed = False
        self.tensor = _staged(host, device).to(device, non_blocking=True)  # on the CPU: the host's

    def write(self, row: int, values: Sequence) -> None:
        """Replace a row; entries beyond ``values`` become empty."""
        # Often a request asks for what the row's last one did, and then there is nothing to send.
        if self._written.get(row, ()) == (written := tuple(values)):
            return
        if len(values) > self._host.shape[1]:
            self._resize(self._host.shape[0], max(len(values), 2 * self._host.shape[1]))
        self._host[row, : len(values)] = values
        self._host[row, len(values) :] = self._empty
        self._written[row] = written
        self._changed = True

    def grow(self, num_rows: int) -> None:
        """Add empty rows at the end."""
        self._resize(num_rows, self._host.shape[1])

    def send(self) -> bool:
        """Bring ``tensor`` up to date; True if it had to move to another address."""
        if not self._changed:
            return False
        current = torch.from_numpy(self._host)
        moves = current.shape != self.tensor.shape
        if moves:
            self.tensor = _staged(current, self._device).to(self._device, non_blocking=True)
        elif self._device.type != "cpu":
            self.tensor.copy_(_staged(current, self._device), non_blocking=True)
        self._changed = False  # not before: had that failed, it would be left to do
        return moves

    def _resize(self, num_rows: int, num_columns: int) -> None:
        old = self._host
        self._host = np.full((num_rows, num_columns), self._empty, dtype=old.dtype)
        self._host[: old.shape[0], : old.shape[1]] = old
        self._changed = True


class SparseBias:
    """What is added to a few logits of each row, some of it only up to a number of tokens.

    Serves ``logit_bias`` (for ever) and ``min_tokens`` (-inf on the stop tokens, until enough have
    been sampled). Unused entries add 0 to token 0, until 0 tokens have been sampled.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.tokens = RowTable(num_rows, _FIRST_BIASES, torch.int64, device)
        self.biases = RowTable(num_rows, _FIRST_BIASES, torch.float32, device)
        self.until = RowTable(num_rows, _FIRST_BIASES, torch.int64, device)
        self._written: set[int] = set()

    def write(self, row: int, entries: Sequence[tuple[int, float, int]]) -> None:
        """Replace a row's (token id, bias, applies while fewer tokens than this are sampled)."""
        if not entries and row not in self._written:
            return  # spares most requests three transfers
        tokens, biases, until = zip(*entries, strict=True) if entries else ((), (), ())
        self.tokens.write(row, tokens)
        self.biases.write(row, biases)
        self.until.write(row, until)
        (self._written.add if entries else self._written.discard)(row)

    def grow(self, num_rows: int) -> None:
        for table in (self.tokens, self.biases, self.until):
            table.grow(num_rows)

    def send(self) -> bool:
        """Bring the tensors up to date; True if they had to move to other addresses."""
        moved = [table.send() for table in (self.tokens, self.biases, self.until)]
        return any(moved)

    def add_to_(self, scores: Tensor, rows: Tensor, steps: Tensor) -> None:
        """Add the biases in place to ``scores`` [B, V] of ``rows`` [B] at their ``steps`` [B]."""
        applies = steps[:, None] < self.until.tensor[rows]  # [B, entries]
        biases = torch.where(applies, self.biases.tensor[rows], 0.0)
        scores.scatter_add_(1, self.tokens.tensor[rows], biases)


class TokenCounts:
    """Which tokens each row's prompt holds and how often its output holds each.

    Two tensors, ``in_prompt`` [rows, V] bool and ``in_output`` [rows, V] int32. They take 5 bytes a
    token of the vocabulary and row, so they come to be at the first request with a penalty.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.in_prompt = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        self.in_output = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)

    def write(self, row: int, prompt_token_ids: Sequence[int], output: Sequence[int]) -> None:
        """Begin a row with the tokens its request has so far."""
        device = self.in_prompt.device
        prompt = to_device(prompt_token_ids, torch.int64, device)
        self.in_prompt[row].zero_().index_fill_(0, prompt, True)
        self.in_output[row].zero_()
        if output:
            tokens = to_device(output, torch.int64, device)
            self.in_output[row].index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))

    def grow(self, num_rows: int) -> None:
        self.in_prompt = grown(self.in_prompt, num_rows)
        self.in_output = grown(self.in_output, num_rows)

    def record(self, rows: Tensor, token_ids: Tensor) -> None:
        """Count one more sampled token [B] for each of ``rows`` [B]."""
        positions = rows * self.in_output.shape[1] + token_ids
        ones = torch.ones_like(rows, dtype=torch.int32)
        self.in_output.view(-1).index_add_(0, positions, ones)

    def penalize(
        self,
        scores: Tensor,
        rows: Tensor,
        repetition: Tensor,
        presence: Tensor,
        frequency: Tensor,
    ) -> Tensor:
        """Logits [B, V] after the three penalties, each [B, 1]; ``rows`` [B].

        Repetition (Keskar et al., CTRL, section 4.1) moves the logit of a token of the prompt or
        the output towards less likely by a factor; presence and frequency (OpenAI's API) subtract,
        once or per occurrence, for tokens of the output alone.
        """
        counts = self.in_output[rows]
        in_output = counts > 0
        seen = self.in_prompt[rows] | in_output
        repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(seen, repeated, scores)
        return scores.sub_(counts * frequency).sub_(in_output * presence)


def grown(tensor: Tensor, num_rows: int) -> Tensor:
    """A copy of ``tensor`` with rows of zeros added at the end."""
    result = tensor.new_zeros(num_rows, *tensor.shape[1:])
    result[: tensor.shape[0]] = tensor
    return result

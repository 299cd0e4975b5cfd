"""The sampler's memory: tensors on the device with one row for each running request.

Rows are written when a request comes, read by index at every step, and given to the next request
when theirs has finished.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values on ``device``, without waiting for the work queued there."""
    tensor = torch.tensor(values, dtype=dtype)
    return _send(tensor, device)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    # A fresh pinned copy each time: torch reuses its memory only after the transfer is done.
    return tensor.pin_memory().to(device, non_blocking=True)


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
        self._host = torch.full((num_rows, num_columns), empty, dtype=dtype)
        self._changed = False
        self.tensor = _send(self._host, device)  # on the CPU the very same tensor

    def write(self, row: int, values: Sequence) -> None:
        """Replace a row; entries beyond ``values`` become empty."""
        if len(values) > self._host.shape[1]:
            self._resize(self._host.shape[0], max(len(values), 2 * self._host.shape[1]))
        unused = self._host.shape[1] - len(values)
        self._host[row] = torch.tensor((*values, *[self._empty] * unused), dtype=self._host.dtype)
        self._changed = True

    def grow(self, num_rows: int) -> None:
        """Add empty rows at the end."""
        self._resize(num_rows, self._host.shape[1])

    def send(self) -> None:
        """Bring ``tensor`` up to date; it keeps its address unless the table has grown."""
        if not self._changed:
            return
        self._changed = False
        current = _send(self._host, self._device)
        if current.shape == self.tensor.shape and current is not self.tensor:
            self.tensor.copy_(current)
        else:
            self.tensor = current

    def _resize(self, num_rows: int, num_columns: int) -> None:
        old = self._host
        self._host = torch.full((num_rows, num_columns), self._empty, dtype=old.dtype)
        self._host[: old.shape[0], : old.shape[1]] = old
        self._changed = True


class SparseBias:
    """What is added to a few logits of each row, some of it only up to a number of tokens.

    Serves ``logit_bias`` (for ever) and ``min_tokens`` (-inf on the stop tokens, until enough have
    been sampled). Unused entries add 0 to token 0.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._tokens = RowTable(num_rows, 0, torch.int64, device)
        self._biases = RowTable(num_rows, 0, torch.float32, device)
        self._until = RowTable(num_rows, 0, torch.int64, device)

    def write(self, row: int, entries: Sequence[tuple[int, float, int]]) -> None:
        """Replace a row's (token id, bias, applies while fewer tokens than this are sampled)."""
        tokens, biases, until = zip(*entries, strict=True) if entries else ((), (), ())
        self._tokens.write(row, tokens)
        self._biases.write(row, biases)
        self._until.write(row, until)

    def grow(self, num_rows: int) -> None:
        for table in (self._tokens, self._biases, self._until):
            table.grow(num_rows)

    def send(self) -> None:
        for table in (self._tokens, self._biases, self._until):
            table.send()

    def add_to_(self, scores: Tensor, rows: Tensor, steps: Tensor) -> None:
        """Add the biases in place to ``scores`` [B, V] of ``rows`` [B] at their ``steps`` [B]."""
        applies = steps[:, None] < self._until.tensor[rows]  # [B, entries]
        biases = torch.where(applies, self._biases.tensor[rows], 0.0)
        scores.scatter_add_(1, self._tokens.tensor[rows], biases)


class TokenCounts:
    """Which tokens each row's prompt holds and how often its output holds each: [rows, V] tensors.

    They take 5 bytes a token of the vocabulary and row, so they come to be at the first request
    with a penalty.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._in_prompt = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        self._in_output = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)

    def write(self, row: int, prompt_token_ids: Sequence[int], output: Sequence[int]) -> None:
        """Begin a row with the tokens its request has so far."""
        device = self._in_prompt.device
        prompt = to_device(prompt_token_ids, torch.int64, device)
        self._in_prompt[row].zero_().index_fill_(0, prompt, True)
        self._in_output[row].zero_()
        if output:
            tokens = to_device(output, torch.int64, device)
            self._in_output[row].index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))

    def grow(self, num_rows: int) -> None:
        self._in_prompt = grown(self._in_prompt, num_rows)
        self._in_output = grown(self._in_output, num_rows)

    def record(self, rows: Tensor, token_ids: Tensor) -> None:
        """Count one more sampled token [B] for each of ``rows`` [B]."""
        positions = rows * self._in_output.shape[1] + token_ids
        ones = torch.ones_like(rows, dtype=torch.int32)
        self._in_output.view(-1).index_add_(0, positions, ones)

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
        counts = self._in_output[rows]
        in_output = counts > 0
        seen = self._in_prompt[rows] | in_output
        repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(seen, repeated, scores)
        return scores.sub_(counts * frequency).sub_(in_output * presence)


def grown(tensor: Tensor, num_rows: int) -> Tensor:
    """A copy of ``tensor`` with rows of zeros added at the end."""
    result = tensor.new_zeros(num_rows, *tensor.shape[1:])
    result[: tensor.shape[0]] = tensor
    return result

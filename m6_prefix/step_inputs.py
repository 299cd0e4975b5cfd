"""The integers of one step: made on the host for packed tokens, padded if asked, then uploaded."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from common.ops.layout import power_of_2
from common.sampling import PADDING_ROW

from .attention import AttentionBatch, Upload
from .scheduler import SchedulerOutput

UNKNOWN = -1  # in place of a token id that only the device knows so far
_UNKNOWN_BITS = 2**32 - 1  # the same, where bits are not a sign


class TokenField(IntEnum):
    """What a step says of each token: rows of ``StepArrays.tokens`` and ``StepInputs.tokens``."""

    ID = 0  # UNKNOWN where the token is the one last sampled in its row
    ROW = 1  # the sampler's
    POSITION = 2
    ROPE_LEN = 3  # see ``RotaryEmbedding.forward``
    SLOT = 4  # of the cache, where its keys and values go; -1 for nowhere


@dataclass(frozen=True)
class StepInputs:
    """What one forward pass reads, on the device.

    Attributes:
        tokens: ``[fields, T]`` int64 by ``TokenField``, rows at multiples of 16 bytes.
        last: ``[samples]`` int64, the token each sample is drawn after.
        rows: ``[samples]`` int64, of the sampler.
        batch: for attention.
    """

    tokens: Tensor
    last: Tensor
    rows: Tensor
    batch: AttentionBatch

    @property
    def positions(self) -> Tensor:
        """``[T]`` int64."""
        return self.tokens[TokenField.POSITION]

    @property
    def rope_lens(self) -> Tensor:
        """``[T]`` int64, see ``RotaryEmbedding.forward``."""
        return self.tokens[TokenField.ROPE_LEN]

    def input_ids(self, token_pool: Tensor) -> Tensor:
        """``[T]`` int64, given the token last sampled in each row of the sampler."""
        token_ids, rows = self.tokens[TokenField.ID], self.tokens[TokenField.ROW]
        sampled = token_pool[rows].clamp(min=0)  # of unusable logits: any token will do
        return torch.where(token_ids < 0, sampled, token_ids)


# A token that changes nothing: stored nowhere, and its row belongs to no request.
_NO_TOKEN = np.array([[0], [PADDING_ROW], [0], [1], [-1]])


@dataclass(frozen=True)
class StepArrays:
    """The same on the host: B sequences, T tokens packed behind each other.

    What is padded and sent in the same way stands in one array: with short steps it is the calls
    that take time, not the numbers.
    """

    tokens: np.ndarray  # [fields, T] int64, by TokenField
    samples: np.ndarray  # [2, samples] int64: the token each is drawn after, its row
    tables: np.ndarray  # [B, width] int32
    query_lens: list[int]  # [B], new tokens of each sequence
    cached_lens: list[int]  # [B], tokens of each that are in the cache already
    num_decodes: int  # sequences at the front that compute one token

    @classmethod
    def of(
        cls,
        step: SchedulerOutput,
        part_rows: np.ndarray,
        rows: np.ndarray,
        tables: np.ndarray,
        block_size: int,
    ) -> StepArrays:
        """All tokens of a step.

        Args:
            part_rows: ``[B]`` int64, the sampler's row of each part; any where it has none yet.
            rows: ``[samples]`` int64, of those who sample.
        """
        token_ids = array("I")
        starts, lens, shifts, prompt_lens, last = [], [], [], [], []
        for request, start, end, samples, *_ in step.parts:
            starts.append(start)
            lens.append(end - start)
            shifts.append(start - len(token_ids))  # from place in the step to position
            # Only dynamic rope looks at this: which length a token's frequencies are for.
            prompt_lens.append(request.num_prompt_tokens)
            known = request.token_ids[start:end]
            token_ids += known
            if len(known) < end - start:
                token_ids.append(_UNKNOWN_BITS)
            if samples:  # after its last token, once for every sample drawn from it
                num_samples = 1 + len(step.forks.get(request.key, ()))
                last += [len(token_ids) - 1] * num_samples
        of_part = np.array((range(len(lens)), part_rows, shifts, prompt_lens))
        part, token_rows, shift, prompt_len = of_part.repeat(lens, axis=1)
        tokens = np.empty((len(TokenField), len(token_ids)), np.int64)
        tokens[TokenField.ID] = np.frombuffer(token_ids, np.int32)
        tokens[TokenField.ROW] = token_rows
        positions = np.add(shift, np.arange(len(shift)), out=tokens[TokenField.POSITION])
        np.maximum(positions + 1, prompt_len, out=tokens[TokenField.ROPE_LEN])
        place, offset = np.divmod(positions, block_size)
        tokens[TokenField.SLOT] = tables[part, place] * np.int64(block_size) + offset
        return cls(
            tokens,
            np.array((last, rows), np.int64),
            tables,
            query_lens=lens,
            cached_lens=starts,
            num_decodes=step.num_decodes,
        )

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[1]

    @property
    def num_samples(self) -> int:
        return self.samples.shape[1]

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        lens = zip(self.query_lens, self.cached_lens, strict=True)
        return sum(length * cached + length * (length + 1) // 2 for length, cached in lens)

    @property
    def seq_lens(self) -> list[int]:
        """``[B]``, tokens of each sequence that the step attends to."""
        return [sum(lens) for lens in zip(self.query_lens, self.cached_lens, strict=True)]

    def padded(self, num_decodes: int, num_tokens: int, num_samples: int) -> StepArrays:
        """The same step with more decodes, tokens and samples, which change nothing.

        Decodes that are added have no token to attend to. The tokens form one more sequence at the
        end, so that every row of the batch is computed and finite; it is stored nowhere. The
        samples belong to no request.
        """
        front = self.num_decodes
        decodes = num_decodes - front
        end = self.num_tokens + decodes
        tokens = np.empty((len(TokenField), num_tokens), np.int64)
        tokens[:, :front] = self.tokens[:, :front]
        tokens[:, front:num_decodes] = _NO_TOKEN
        tokens[:, num_decodes:end] = self.tokens[:, front:]
        tokens[:, end:] = _NO_TOKEN
        tokens[TokenField.POSITION, end:] = np.arange(num_tokens - end)

        samples = np.empty((2, num_samples), np.int64)
        samples[:, : self.num_samples] = self.samples
        samples[:, self.num_samples :] = [[0], [PADDING_ROW]]
        last = samples[0, : self.num_samples]
        last[last >= front] += decodes

        height, width = self.tables.shape
        shape = power_of_2(height + decodes + 1), power_of_2(width)
        tables = np.zeros(shape, dtype=np.int32)
        tables[:front, :width] = self.tables[:front]
        tables[num_decodes : height + decodes, :width] = self.tables[front:]

        # One token, less than none cached: nothing to attend to.
        query_lens, cached_lens = (
            [*lens[:front], *[value] * decodes, *lens[front:], last_value]
            for lens, value, last_value in (
                (self.query_lens, 1, num_tokens - end),
                (self.cached_lens, -1, 0),
            )
        )
        return StepArrays(tokens, samples, tables, query_lens, cached_lens, num_decodes)

    def upload(self, add: Upload) -> StepInputs:
        """Take all arrays along with ``add``; they are filled when the step begins."""
        if self.num_tokens % 2 == 0:
            tokens = add(self.tokens)
        else:  # else rows would not start at multiples of 16 bytes
            tokens = add(np.concatenate([self.tokens, _NO_TOKEN], axis=1))[:, :-1]
        all_decode = self.num_decodes == len(self.query_lens)
        return StepInputs(
            tokens=tokens,
            last=add(self.samples[0]),
            rows=add(self.samples[1]),
            batch=AttentionBatch(
                slot_mapping=tokens[TokenField.SLOT],
                block_tables=add(self.tables),
                seq_lens=add(np.array(self.seq_lens, np.int32)),
                query_lens=() if all_decode else self.query_lens,
                cached_lens=() if all_decode else self.cached_lens,
                num_decodes=self.num_decodes,
            ),
        )

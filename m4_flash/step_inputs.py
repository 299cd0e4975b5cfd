"""The integers of one step: made on the host for packed tokens, padded if asked, then uploaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from torch import Tensor

from common.ops.layout import power_of_2
from common.sampling import PADDING_ROW

from .attention import AttentionBatch, Upload
from .scheduler import SchedulerOutput


@dataclass(frozen=True)
class StepInputs:
    """What one forward pass reads, on the device.

    Attributes:
        input_ids, positions: ``[T]`` int64.
        rope_lens: ``[T]`` int64, see ``RotaryEmbedding.forward``.
        last: ``[samples]`` int64, the token each sample is drawn after.
        rows: ``[samples]`` int64, of the sampler.
        batch: for attention.
    """

    input_ids: Tensor
    positions: Tensor
    rope_lens: Tensor
    last: Tensor
    rows: Tensor
    batch: AttentionBatch


@dataclass(frozen=True)
class StepArrays:
    """The same on the host: B sequences, T tokens packed behind each other."""

    token_ids: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    rope_lens: np.ndarray  # [T] int64
    slots: np.ndarray  # [T] int64
    last: np.ndarray  # [samples] int64
    rows: np.ndarray  # [samples] int64
    tables: np.ndarray  # [B, width] int32
    query_lens: np.ndarray  # [B] int64, new tokens of each sequence
    cached_lens: np.ndarray  # [B] int64, tokens of each that are in the cache already

    @classmethod
    def of(
        cls, step: SchedulerOutput, rows: np.ndarray, tables: np.ndarray, block_size: int
    ) -> StepArrays:
        """All tokens of the step's requests that are not in the cache yet."""
        requests = step.requests
        starts = np.array([request.num_computed_tokens for request in requests])
        lens = np.array([request.num_tokens for request in requests]) - starts
        # Which request each packed token belongs to, and where in its sequence it stands: [T]
        owners = np.repeat(np.arange(len(lens)), lens)
        positions = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens - starts, lens)
        blocks = tables[owners, positions // block_size].astype(np.int64)
        new = (request.token_ids[request.num_computed_tokens :] for request in requests)
        # Only dynamic rope looks at this: which length each token's frequencies are for.
        prompt_lens = np.array([request.num_prompt_tokens for request in requests])
        # The last token of each sequence, once for every sample that is drawn from it.
        num_samples = [1 + len(step.forks.get(request.key, ())) for request in requests]
        return cls(
            token_ids=np.fromiter(chain.from_iterable(new), dtype=np.int64, count=len(positions)),
            positions=positions,
            rope_lens=np.maximum(positions + 1, prompt_lens[owners]),
            slots=blocks * block_size + positions % block_size,
            last=np.repeat(np.cumsum(lens) - 1, num_samples),
            rows=rows,
            tables=tables,
            query_lens=lens,
            cached_lens=starts,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        lens, ends = self.query_lens, self.query_lens + self.cached_lens
        return int((lens * ends - lens * (lens - 1) // 2).sum())

    def padded(self, num_tokens: int, num_samples: int) -> StepArrays:
        """The same step with more tokens and samples, which change nothing.

        The tokens form one more sequence, so that every row of the batch is computed and finite;
        it is stored nowhere. The samples belong to no request.
        """
        more = num_tokens - self.num_tokens
        samples = num_samples - len(self.last)
        height, width = (power_of_2(size) for size in (len(self.tables) + 1, self.tables.shape[1]))
        tables = np.zeros((height, width), dtype=np.int32)
        tables[: self.tables.shape[0], : self.tables.shape[1]] = self.tables
        return replace(
            self,
            token_ids=_extended(self.token_ids, more, 0),
            positions=np.concatenate([self.positions, np.arange(more)]),
            rope_lens=_extended(self.rope_lens, more, 1),
            slots=_extended(self.slots, more, -1),
            last=_extended(self.last, samples, 0),
            rows=_extended(self.rows, samples, PADDING_ROW),
            tables=tables,
            query_lens=_extended(self.query_lens, 1, more),
            cached_lens=_extended(self.cached_lens, 1, 0),
        )

    def upload(self, add: Upload, *, is_prefill: bool) -> StepInputs:
        """Take all arrays along with ``add``; they are filled when the step begins."""
        seq_lens = (self.query_lens + self.cached_lens).astype(np.int32)
        return StepInputs(
            input_ids=add(self.token_ids),
            positions=add(self.positions),
            rope_lens=add(self.rope_lens),
            last=add(self.last),
            rows=add(self.rows),
            batch=AttentionBatch(
                slot_mapping=add(self.slots),
                block_tables=add(self.tables),
                seq_lens=add(seq_lens),
                query_lens=self.query_lens.tolist() if is_prefill else (),
                cached_lens=self.cached_lens.tolist() if is_prefill else (),
            ),
        )


def _extended(array: np.ndarray, count: int, value: int) -> np.ndarray:
    return np.concatenate([array, np.full(count, value, dtype=array.dtype)])

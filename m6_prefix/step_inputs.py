"""The integers of one step: made on the host for packed tokens, padded if asked, then uploaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.ops.layout import power_of_2
from common.sampling import PADDING_ROW

from .attention import AttentionBatch, Upload
from .scheduler import SchedulerOutput

UNKNOWN = -1  # in place of a token id that only the device knows so far


@dataclass(frozen=True)
class StepInputs:
    """What one forward pass reads, on the device.

    Attributes:
        token_ids: ``[T]`` int64; ``UNKNOWN`` where the token is the one last sampled in its row.
        token_rows: ``[T]`` int64, the sampler's row of each such token.
        positions: ``[T]`` int64.
        rope_lens: ``[T]`` int64, see ``RotaryEmbedding.forward``.
        last: ``[samples]`` int64, the token each sample is drawn after.
        rows: ``[samples]`` int64, of the sampler.
        batch: for attention.
    """

    token_ids: Tensor
    token_rows: Tensor
    positions: Tensor
    rope_lens: Tensor
    last: Tensor
    rows: Tensor
    batch: AttentionBatch

    def input_ids(self, token_pool: Tensor) -> Tensor:
        """``[T]`` int64, given the token last sampled in each row of the sampler."""
        sampled = token_pool[self.token_rows].clamp(min=0)  # of unusable logits: any token will do
        return torch.where(self.token_ids < 0, sampled, self.token_ids)


@dataclass(frozen=True)
class StepArrays:
    """The same on the host: B sequences, T tokens packed behind each other."""

    token_ids: np.ndarray  # [T] int64
    token_rows: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    rope_lens: np.ndarray  # [T] int64
    slots: np.ndarray  # [T] int64
    last: np.ndarray  # [samples] int64
    rows: np.ndarray  # [samples] int64
    tables: np.ndarray  # [B, width] int32
    query_lens: np.ndarray  # [B] int64, new tokens of each sequence
    cached_lens: np.ndarray  # [B] int64, tokens of each that are in the cache already
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
        parts = step.parts
        starts = np.array([part.start for part in parts])
        lens = np.array([part.end for part in parts]) - starts
        # Which part each packed token belongs to, and where in its sequence it stands: [T]
        owners = np.repeat(np.arange(len(lens)), lens)
        positions = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens - starts, lens)
        blocks = tables[owners, positions // block_size].astype(np.int64)
        token_ids: list[int] = []
        for part in parts:
            known = part.request.token_ids[part.start : part.end]
            token_ids += known if len(known) == part.end - part.start else [*known, UNKNOWN]
        # Only dynamic rope looks at this: which length each token's frequencies are for.
        prompt_lens = np.array([part.request.num_prompt_tokens for part in parts])
        # The last token of each sequence that samples, once for every sample drawn from it.
        num_samples = [
            1 + len(step.forks.get(part.request.key, ())) if part.samples else 0 for part in parts
        ]
        return cls(
            token_ids=np.array(token_ids, dtype=np.int64),
            token_rows=part_rows[owners],
            positions=positions,
            rope_lens=np.maximum(positions + 1, prompt_lens[owners]),
            slots=blocks * block_size + positions % block_size,
            last=np.repeat(np.cumsum(lens) - 1, num_samples),
            rows=rows,
            tables=tables,
            query_lens=lens,
            cached_lens=starts,
            num_decodes=step.num_decodes,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        lens, ends = self.query_lens, self.query_lens + self.cached_lens
        return int((lens * ends - lens * (lens - 1) // 2).sum())

    def padded(self, num_decodes: int, num_tokens: int, num_samples: int) -> StepArrays:
        """The same step with more decodes, tokens and samples, which change nothing.

        Decodes that are added have no token to attend to. The tokens form one more sequence at the
        end, so that every row of the batch is computed and finite; it is stored nowhere. The
        samples belong to no request.
        """
        front = self.num_decodes
        decodes = num_decodes - front
        more = num_tokens - self.num_tokens - decodes
        samples = num_samples - len(self.last)

        def tokens(array: np.ndarray, value: int) -> np.ndarray:
            return np.concatenate([_inserted(array, front, decodes, value), np.full(more, value)])

        height, width = (
            power_of_2(size) for size in (len(self.tables) + decodes + 1, self.tables.shape[1])
        )
        tables = np.zeros((height, width), dtype=np.int32)
        inserted = _inserted(self.tables, front, decodes, 0)
        tables[: len(inserted), : inserted.shape[1]] = inserted
        positions = tokens(self.positions, 0)
        positions[num_tokens - more :] = np.arange(more)
        return replace(
            self,
            token_ids=tokens(self.token_ids, 0),
            token_rows=tokens(self.token_rows, PADDING_ROW),
            positions=positions,
            rope_lens=tokens(self.rope_lens, 1),
            slots=tokens(self.slots, -1),
            last=_extended(np.where(self.last < front, self.last, self.last + decodes), samples, 0),
            rows=_extended(self.rows, samples, PADDING_ROW),
            tables=tables,
            query_lens=_extended(_inserted(self.query_lens, front, decodes, 1), 1, more),
            # One token, less than none cached: nothing to attend to.
            cached_lens=_extended(_inserted(self.cached_lens, front, decodes, -1), 1, 0),
            num_decodes=num_decodes,
        )

    @property
    def seq_lens(self) -> np.ndarray:
        """``[B]`` int64, tokens of each sequence that the step attends to."""
        return self.query_lens + self.cached_lens

    def upload(self, add: Upload) -> StepInputs:
        """Take all arrays along with ``add``; they are filled when the step begins."""
        all_decode = self.num_decodes == len(self.query_lens)
        return StepInputs(
            token_ids=add(self.token_ids),
            token_rows=add(self.token_rows),
            positions=add(self.positions),
            rope_lens=add(self.rope_lens),
            last=add(self.last),
            rows=add(self.rows),
            batch=AttentionBatch(
                slot_mapping=add(self.slots),
                block_tables=add(self.tables),
                seq_lens=add(self.seq_lens.astype(np.int32)),
                query_lens=() if all_decode else self.query_lens.tolist(),
                cached_lens=() if all_decode else self.cached_lens.tolist(),
                num_decodes=self.num_decodes,
            ),
        )


def _extended(array: np.ndarray, count: int, value: int) -> np.ndarray:
    return np.concatenate([array, np.full(count, value, dtype=array.dtype)])


def _inserted(array: np.ndarray, place: int, count: int, value: int) -> np.ndarray:
    rows = np.full((count, *array.shape[1:]), value, dtype=array.dtype)
    return np.concatenate([array[:place], rows, array[place:]])

"""Decode steps from CUDA graphs: one for each bucket of batch sizes."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import torch

from common.model import Transformer
from common.sampling import Sampler, SamplerOutput

from .attention import Attention, AttentionBatch
from .cuda_graphs import CapturedStep, StepGraphs
from .kernels.decode_inputs import COLUMNS, HEADER, DecodeInputs, unpack


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that graphs are captured for; the last one is ``max_num_seqs``.

    From 24 on a batch grows by a third at the most, and by 31 sequences.
    """
    sizes = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """The decode steps of one engine.

    Args:
        max_num_seqs: most sequences of a step.
        max_blocks: most blocks of a sequence.
        block_size: tokens in a block.
    """

    def __init__(
        self,
        model: Transformer,
        attention: Attention,
        sampler: Sampler,
        graphs: StepGraphs,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
    ) -> None:
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._graphs = graphs
        self._block_size = block_size
        self._buckets = bucket_sizes(max_num_seqs)
        device = model.device
        self._inputs = DecodeInputs.allocate(max_num_seqs, max_blocks, device)
        size = HEADER + max_num_seqs * (COLUMNS + max_blocks)
        self._host_packed = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        self._packed = torch.zeros(size, dtype=torch.int32, device=device)
        self._packed_array = self._host_packed.numpy()
        self._host_token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, pin_memory=True)
        self._done = torch.cuda.Event()
        self._replayed: CapturedStep | None = None
        self._batch = 0

    def replay(self, columns: np.ndarray, tables: np.ndarray) -> None:
        """Have one token of each of B sequences computed and sampled; ``read`` waits for it.

        Args:
            columns: ``[4, B]`` int32: token ids, sequence lengths with the new token, rows of the
                sampler, prompt lengths.
            tables: ``[B, width]`` int32 block tables.
        """
        self._batch = columns.shape[1]
        bucket = next(size for size in self._buckets if size >= self._batch)
        variant = self._attention.decode_variant(float(columns[1].sum()) / self._batch)
        key = ("decode", bucket, variant, self._sampler.graph_key)
        self._replayed = self._graphs.get(key)
        if self._replayed is None:
            # The run before the capture computes nothing but padding: no sequence notices.
            self._packed[:HEADER].zero_()
            self._step(bucket, variant)
            self._replayed = self._graphs.capture(key, lambda: self._step(bucket, variant))
        self._send(bucket, columns, tables)
        self._replayed.graph.replay()
        self._done.record()

    def read(self) -> SamplerOutput:
        """What the last ``replay`` sampled; the token ids are on the host until the next one."""
        self._done.synchronize()
        logprobs = self._replayed.sampled.logprobs
        return SamplerOutput(
            self._host_token_ids[: self._batch],
            None if logprobs is None else logprobs.first(self._batch),
        )

    def _send(self, bucket: int, columns: np.ndarray, tables: np.ndarray) -> None:
        batch, width = tables.shape
        packed = self._packed_array
        packed[:2] = batch, width
        first_table = HEADER + COLUMNS * bucket
        packed[HEADER:first_table].reshape(COLUMNS, bucket)[:, :batch] = columns
        end = first_table + tables.size
        packed[first_table:end] = tables.reshape(-1)
        self._packed[:end].copy_(self._host_packed[:end], non_blocking=True)

    def _step(self, bucket: int, variant: Hashable) -> SamplerOutput:
        """What a graph holds. The packed integers are on the device, the ids go to the host."""
        inputs = self._inputs.first(bucket)
        unpack(self._packed, inputs, self._block_size)
        self._attention.plan_decode(
            AttentionBatch(inputs.slot_mapping, inputs.block_tables, inputs.seq_lens), variant
        )
        hidden = self._model(inputs.input_ids, inputs.positions, self._attention, inputs.rope_lens)
        sampled = self._sampler.sample(self._model.compute_logits(hidden), inputs.rows)
        self._host_token_ids[:bucket].copy_(sampled.token_ids, non_blocking=True)
        return sampled

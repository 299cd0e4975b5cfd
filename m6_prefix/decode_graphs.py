"""Decode steps from CUDA graphs: one for each bucket of batch sizes."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import torch

from common.model import Transformer
from common.sampling import Sampler, SamplerOutput

from .attention import Attention, AttentionBatch
from .cuda_graphs import StepGraphs
from .kernels.decode_inputs import COLUMNS, HEADER, DecodeInputs, unpack
from .token_pool import TokenPool


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
        pool: TokenPool,
        graphs: StepGraphs,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
    ) -> None:
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._pool = pool
        self._graphs = graphs
        self._block_size = block_size
        self._buckets = bucket_sizes(max_num_seqs)
        device = model.device
        self._inputs = DecodeInputs.allocate(max_num_seqs, max_blocks, device)
        size = HEADER + max_num_seqs * (COLUMNS + max_blocks)
        self._packed = torch.zeros(size, dtype=torch.int32, device=device)
        # Two of them: one may still be on its way to the device when the next is written.
        self._on_host = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(2)]

    def replay(self, columns: np.ndarray, tables: np.ndarray) -> SamplerOutput:
        """Have one token of each of B sequences computed and sampled.

        Args:
            columns: ``[4, B]`` int32: token ids (negative: the one last sampled), sequence lengths
                with the new token, rows of the sampler, prompt lengths.
            tables: ``[B, width]`` int32 block tables.

        Returns:
            What is sampled, on the device until the next replay.
        """
        batch = columns.shape[1]
        bucket = next(size for size in self._buckets if size >= batch)
        variant = self._attention.decode_variant(float(columns[1].sum()) / batch)
        key = ("decode", bucket, variant, self._sampler.graph_key)
        captured = self._graphs.get(key)
        if captured is None:
            # The run before the capture computes nothing but padding: no sequence notices.
            self._packed[:HEADER].zero_()
            self._step(bucket, variant)
            captured = self._graphs.capture(key, lambda: self._step(bucket, variant))
        self._send(bucket, columns, tables)
        captured.graph.replay()
        logprobs = captured.sampled.logprobs
        return SamplerOutput(
            captured.sampled.token_ids[:batch],
            None if logprobs is None else logprobs.first(batch),
        )

    def _send(self, bucket: int, columns: np.ndarray, tables: np.ndarray) -> None:
        batch, width = tables.shape
        self._on_host.reverse()
        packed = self._on_host[0].numpy()
        packed[:2] = batch, width
        first_table = HEADER + COLUMNS * bucket
        packed[HEADER:first_table].reshape(COLUMNS, bucket)[:, :batch] = columns
        end = first_table + tables.size
        packed[first_table:end] = tables.reshape(-1)
        self._packed[:end].copy_(self._on_host[0][:end], non_blocking=True)

    def _step(self, bucket: int, variant: Hashable) -> SamplerOutput:
        """What a graph holds. The packed integers are on the device, the ids go to the pool."""
        inputs = self._inputs.first(bucket)
        unpack(self._packed, self._pool.tokens, inputs, self._block_size)
        self._attention.plan_decode(
            AttentionBatch(
                inputs.slot_mapping, inputs.block_tables, inputs.seq_lens, num_decodes=bucket
            ),
            variant,
        )
        hidden = self._model(inputs.input_ids, inputs.positions, self._attention, inputs.rope_lens)
        sampled = self._sampler.sample(self._model.compute_logits(hidden), inputs.rows)
        self._pool.write(inputs.rows, sampled.token_ids)
        return sampled

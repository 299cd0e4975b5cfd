"""A decode step's packed integers become the tensors that its CUDA graph reads.

A graph reads the same addresses in every replay, and its tables are as wide as the longest
sequence may become. Sending such tables whole would cost more than the step, so the host packs only
what is in use, and the first kernel of the graph spreads it out::

    packed, int32: [ num_seqs, width | token ids | lengths | rows | prompt lengths | tables ]
                                       each as long as the bucket                   num_seqs x width

A negative token id stands for the token last sampled in the row, which the host may not know yet.
"""

# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers; comments give shapes)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.launch import launch
from common.sampling import PADDING_ROW

HEADER = 4  # integers before the first column: num_seqs, width, and two unused
COLUMNS = 4  # token ids, lengths, rows of the sampler, prompt lengths
_CHUNK = 256


@dataclass(frozen=True)
class DecodeInputs:
    """What a decode step of B sequences reads, padding included.

    Attributes:
        input_ids: ``[B]`` int64, the token each sequence computes; 0 in padding.
        positions: ``[B]`` int64, where it stands.
        rope_lens: ``[B]`` int64, see ``RotaryEmbedding.forward``.
        slot_mapping: ``[B]`` int64, where its keys and values go; -1 in padding.
        seq_lens: ``[B]`` int32, tokens to attend to, the new one included; 0 in padding.
        rows: ``[B]`` int64, of the sampler; ``PADDING_ROW`` in padding.
        block_tables: ``[B, max_blocks]`` int32; what lies past a sequence's end is garbage.
    """

    input_ids: Tensor
    positions: Tensor
    rope_lens: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor
    rows: Tensor
    block_tables: Tensor

    @classmethod
    def allocate(cls, batch: int, max_blocks: int, device: torch.device) -> DecodeInputs:
        """Room for ``batch`` sequences of at most ``max_blocks`` blocks."""
        long = [torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(4)]
        ids, positions, rope_lens, slots = long
        lens = torch.zeros(batch, dtype=torch.int32, device=device)
        rows = torch.zeros_like(ids)
        tables = torch.zeros(batch, max_blocks, dtype=torch.int32, device=device)
        return cls(ids, positions, rope_lens, slots, lens, rows, tables)

    def first(self, batch: int) -> DecodeInputs:
        """The same memory, for a smaller batch."""
        return DecodeInputs(*(tensor[:batch] for tensor in vars(self).values()))


@triton.jit
def unpack_kernel(
    packed,  # int32, see above
    token_pool,  # [rows of the sampler] int64, the token last sampled in each
    input_ids,  # [B] int64
    positions,  # [B] int64
    rope_lens,  # [B] int64
    slot_mapping,  # [B] int64
    seq_lens,  # [B] int32
    rows,  # [B] int64
    block_tables,  # [B, MAX_BLOCKS] int32
    BATCH: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDING_ROW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program spreads one sequence's integers; those past ``num_seqs`` write padding."""
    sequence = tl.program_id(0)
    num_seqs = tl.load(packed)
    width = tl.load(packed + 1)
    used = sequence < num_seqs
    columns = packed + HEADER + sequence
    token = tl.load(columns, mask=used, other=0)
    length = tl.load(columns + BATCH, mask=used, other=0)
    row = tl.load(columns + 2 * BATCH, mask=used, other=PADDING_ROW)
    prompt_len = tl.load(columns + 3 * BATCH, mask=used, other=0)
    sampled = tl.load(token_pool + row)
    # Of unusable logits the pool has a negative one: any token will do.
    token = tl.where(token < 0, tl.maximum(sampled, 0), token.to(tl.int64))
    position = tl.maximum(length - 1, 0)
    table = packed + HEADER + COLUMNS * BATCH + sequence * width
    block = tl.load(table + position // BLOCK_SIZE, mask=used, other=0).to(tl.int64)
    slot = block * BLOCK_SIZE + position % BLOCK_SIZE

    tl.store(input_ids + sequence, token)
    tl.store(positions + sequence, position.to(tl.int64))
    tl.store(rope_lens + sequence, tl.maximum(length, prompt_len).to(tl.int64))
    tl.store(slot_mapping + sequence, tl.where(used, slot, -1))
    tl.store(seq_lens + sequence, length)
    tl.store(rows + sequence, row.to(tl.int64))
    for start in range(0, width, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = used & (column < width)
        blocks = tl.load(table + column, mask=inside, other=0)
        tl.store(block_tables + sequence.to(tl.int64) * MAX_BLOCKS + column, blocks, mask=inside)


def unpack(packed: Tensor, token_pool: Tensor, inputs: DecodeInputs, block_size: int) -> None:
    """Fill ``inputs`` from ``packed``, whose columns are as long as the batch of ``inputs``."""
    batch, max_blocks = inputs.block_tables.shape
    if packed.device.type != "cuda":
        unpack_reference(packed, token_pool, inputs, block_size)
        return
    constants = (batch, max_blocks, block_size, HEADER, COLUMNS, PADDING_ROW, _CHUNK)
    launch(
        unpack_kernel,
        (batch, 1, 1),
        (packed, token_pool, *vars(inputs).values()),
        constants,
        num_warps=4,
    )


def unpack_reference(
    packed: Tensor, token_pool: Tensor, inputs: DecodeInputs, block_size: int
) -> None:
    """The twin of ``unpack_kernel``."""
    batch = len(inputs.input_ids)
    num_seqs, width = packed[:2].tolist()
    columns = packed[HEADER : HEADER + COLUMNS * batch].view(COLUMNS, batch).long()
    tokens, lengths, rows, prompt_lens = columns[:, :num_seqs]
    tables = packed[HEADER + COLUMNS * batch :][: num_seqs * width].view(num_seqs, width)
    tokens = torch.where(tokens < 0, token_pool[rows].clamp(min=0), tokens)
    positions = lengths - 1
    blocks = tables.gather(1, (positions // block_size)[:, None])[:, 0]
    for target, values, padding in (
        (inputs.input_ids, tokens, 0),
        (inputs.positions, positions, 0),
        (inputs.rope_lens, lengths.maximum(prompt_lens), 0),
        (inputs.slot_mapping, blocks * block_size + positions % block_size, -1),
        (inputs.seq_lens, lengths, 0),
        (inputs.rows, rows, PADDING_ROW),
    ):
        target.fill_(padding)
        target[:num_seqs] = values
    inputs.block_tables[:num_seqs, :width] = tables

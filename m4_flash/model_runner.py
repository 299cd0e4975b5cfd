"""Runs one step: lists of requests become packed tensors, and come back as token ids.

    prefill: [ a a a a a a | b b | c c c c ]     all prompts behind each other, nothing is padding
    decode:  [ a | b | c ]                       one token each; block tables say where the rest is

A decode step on a GPU is a CUDA graph from the first kernel to the last, and so is a short prefill
step (``cuda_graphs``). All others, and everything with ``enforce_eager``, are launched from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.metrics import EngineStats
from common.model import Transformer
from common.outputs import LogprobLists, ModelRunnerOutput
from common.request import Request
from common.sampling import Sampler, SamplerOutput, gather_logprobs

from .attention import Attention
from .block_tables import BlockTableArray
from .cuda_graphs import StepGraphs
from .prefill_graphs import MAX_TOKENS, PrefillGraphs
from .scheduler import SchedulerOutput
from .step_buffers import StepBuffers
from .step_inputs import StepArrays

if TYPE_CHECKING:
    from .decode_graphs import DecodeGraphs


@dataclass
class _DecodeBatch:
    """The batch of a decode step. The next one is mostly the same, a token later."""

    requests: list[Request]
    rows: np.ndarray  # [B] int64
    columns: np.ndarray  # [4, B] int32, see ``DecodeGraphs.replay``

    def goes_on(self, requests: Sequence[Request]) -> bool:
        """Whether these are the same, each a token longer: not so if the last step broke off."""
        last = int(self.columns[1, -1])
        return self.requests == requests and last + 1 == requests[-1].num_tokens


class ModelRunner:
    """The model, the cache's tensors, the sampler and the graphs of one engine.

    Args:
        graphs: of this engine's steps; None to launch every kernel from Python.
        max_num_seqs: most sequences of a decode step.
        max_blocks: most blocks of a sequence.
        block_size: tokens in a block.
    """

    def __init__(
        self,
        model: Transformer,
        attention: Attention,
        sampler: Sampler,
        graphs: StepGraphs | None,
        stats: EngineStats,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
    ) -> None:
        self.model = model
        self.attention = attention
        self.sampler = sampler
        self._stats = stats
        self._block_size = block_size
        self._tables = BlockTableArray(max_blocks)
        self._buffers = StepBuffers(1 << 20, model.device)
        self._batch: _DecodeBatch | None = None  # of the last step, if that came from a graph
        self._sampled: SamplerOutput | None = None  # in it
        self._decode_graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        if graphs is not None and attention.supports_graphs:
            from .decode_graphs import DecodeGraphs  # not without Triton

            self._decode_graphs = DecodeGraphs(
                model, attention, sampler, graphs, max_num_seqs, max_blocks, block_size
            )
        if graphs is not None and attention.supports_prefill_graphs:
            self._prefill_graphs = PrefillGraphs(model, attention, sampler, graphs)

    def prepare(self, step: SchedulerOutput) -> None:
        """Copy in the cache what the scheduler has moved; it holds whatever becomes of the step."""
        if step.copies:
            self._batch = None  # its tables are not those any more
            with torch.inference_mode():
                self.attention.copy_blocks(step.copies)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Compute one step's tokens and sample one for each of its samples."""
        if step.is_prefill:
            self._join(step)
            self.sampler.upload()
        if step.is_prefill or self._decode_graphs is None:
            self._batch = None
            sampled, prompt_logprobs = self._launch(step)
        else:
            sampled, prompt_logprobs = self._replay(step), {}
        logprobs = sampled.logprobs
        return ModelRunnerOutput(
            token_ids=sampled.token_ids.tolist(),
            logprobs=LogprobLists(*logprobs.tolist()) if logprobs else None,
            prompt_logprobs=prompt_logprobs,
        )

    def finish(self, request: Request) -> None:
        """Forget a request's sampling state, if it ever ran."""
        self.sampler.remove_request(request.key)

    def _join(self, step: SchedulerOutput) -> None:
        """Give newcomers their rows; one that was preempted has kept its sampling state."""
        for request, table in zip(step.requests, step.block_tables, strict=True):
            for sample in (request, *step.forks.get(request.key, ())):
                if not sample.output_token_ids:
                    self.sampler.add_request(
                        sample.key,
                        sample.sampling_params,
                        sample.prompt_token_ids,
                        sample.output_token_ids,
                        sample.eos_token_ids,
                        sample.index,
                    )
                self._tables.write(self.sampler.row_of(sample.key), table)

    def _replay(self, step: SchedulerOutput) -> SamplerOutput:
        """A decode step from a CUDA graph."""
        batch = self._batch
        if batch is not None and batch.goes_on(step.requests):
            batch.columns[0] = self._sampled.token_ids.numpy()
            batch.columns[1] += 1
            # Whoever has begun a block has a new one in its table; the other tables are as before.
            changed: Sequence[int]
            changed = np.flatnonzero(batch.columns[1] % self._block_size == 1).tolist()
        else:
            batch = self._batch = self._new_batch(step)
            changed = range(len(step.requests))
        tables = [step.block_tables[place] for place in changed]
        self._tables.update_last(batch.rows[changed], tables)
        self._decode_graphs.replay(batch.columns, self._tables.gather(batch.rows))
        # The GPU is busy from here on: what needs no tokens is done meanwhile.
        self._stats.num_graph_steps += 1
        num_seqs = len(step.requests)
        self._count(step, num_seqs, int(batch.columns[1].sum()), num_seqs)
        self._sampled = self._decode_graphs.read()
        return self._sampled

    def _new_batch(self, step: SchedulerOutput) -> _DecodeBatch:
        requests = step.requests
        rows = self._rows(requests)
        columns = [
            [request.token_ids[-1] for request in requests],
            [request.num_tokens for request in requests],
            rows,
            [request.num_prompt_tokens for request in requests],
        ]
        return _DecodeBatch(list(requests), rows, np.array(columns, dtype=np.int32))

    def _rows(self, requests: Sequence[Request]) -> np.ndarray:
        """Of the sampler, and of the block tables: int64."""
        return np.array([self.sampler.row_of(request.key) for request in requests], dtype=np.int64)

    def _launch(
        self, step: SchedulerOutput
    ) -> tuple[SamplerOutput, dict[str, LogprobLists]]:
        """A prefill step, or any other whose kernels are launched one by one."""
        computed = self._rows(step.requests)
        for row, table in zip(computed.tolist(), step.block_tables, strict=True):
            self._tables.update(row, table)
        rows = self._rows(step.sampled)
        arrays = StepArrays.of(step, rows, self._tables.gather(computed), self._block_size)
        self._count(step, arrays.num_tokens, arrays.pairs, len(rows))
        if self._may_replay(step, arrays):
            sampled, replayed = self._prefill_graphs.run(arrays)
            self._stats.num_graph_steps += replayed
            return sampled, {}
        self._buffers.begin()
        inputs = arrays.upload(self._buffers.add, is_prefill=step.is_prefill)
        if step.is_prefill:
            self.attention.plan_prefill(inputs.batch, self._buffers.add)
        self._buffers.send()
        if not step.is_prefill:
            self.attention.plan_decode(inputs.batch)
        hidden = self.model(
            inputs.input_ids, inputs.positions, self.attention, inputs.rope_lens
        )  # [T, H]
        prompt_logprobs = self._score_prompts(step, hidden, inputs.input_ids, arrays.query_lens)
        logits = self.model.compute_logits(hidden[inputs.last])  # [samples, V]
        return self.sampler.sample(logits, inputs.rows), prompt_logprobs

    def _may_replay(self, step: SchedulerOutput, arrays: StepArrays) -> bool:
        """Whether a prefill step is one for the graphs: short, and only its samples wanted."""
        return (
            self._prefill_graphs is not None
            and step.is_prefill
            and arrays.num_tokens <= MAX_TOKENS
            and all(r.sampling_params.prompt_logprobs is None for r in step.requests)
        )

    def _score_prompts(
        self, step: SchedulerOutput, hidden: Tensor, input_ids: Tensor, query_lens: np.ndarray
    ) -> dict[str, LogprobLists]:
        """Log-probabilities of the prompts of those who asked, when they are first computed."""
        scores = {}
        offsets = np.cumsum(query_lens) - query_lens
        for row, request in enumerate(step.requests if step.is_prefill else ()):
            wanted = request.sampling_params.prompt_logprobs
            if wanted is None or request.index > 0 or request.output_token_ids:
                continue
            # Position i predicts token i + 1, so the last position has no prompt token to score.
            first = int(offsets[row])
            last = first + request.num_prompt_tokens - 1
            logits = self.model.compute_logits(hidden[first:last])
            scored = gather_logprobs(logits, input_ids[first + 1 : last + 1], wanted)
            scores[request.key] = LogprobLists(*scored.tolist())
            self._stats.flops += self.model.config.batch_flops(0, 0, last - first)
        return scores

    def _count(self, step: SchedulerOutput, num_tokens: int, pairs: int, num_logits: int) -> None:
        """Note a step's work; ``pairs`` are those of a query and a key that it sees."""
        stats = self._stats
        stats.num_steps += 1
        stats.num_forward_tokens += num_tokens
        stats.num_prompt_tokens += num_tokens if step.is_prefill else 0
        stats.num_generated_tokens += len(step.sampled)
        stats.flops += self.model.config.batch_flops(num_tokens, pairs, num_logits)


def profile_step(model: Transformer, attention: type[Attention], num_tokens: int) -> None:
    """Run a prefill of that many tokens without a cache, to see what memory a step takes."""
    positions = torch.arange(num_tokens, device=model.device)
    with torch.inference_mode():
        input_ids = torch.zeros_like(positions)
        hidden = model(
            input_ids, positions, lambda _, q, k, v: attention.self_attention(q, k, v)
        )
        model.compute_logits(hidden[-1:])

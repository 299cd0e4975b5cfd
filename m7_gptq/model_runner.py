"""Launches steps and reads their tokens, the one while the other is still being computed.

    tokens: [ a | b | c | d d d d d | e e e ]     decodes first, then chunks, in one forward pass

``launch`` gives a step to the device and returns at once. What it samples goes to the *token pool*,
one place for each row of the sampler, and the next step takes its tokens from there: they need not
pass by the host in between. They are copied to the host too, and ``LaunchedStep.read`` waits for
that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.metrics import EngineStats
from common.model import Transformer
from common.outputs import LogprobLists, ModelRunnerOutput
from common.request import Request
from common.sampling import LogprobsTensors, Sampler, SamplerOutput, gather_logprobs

from .attention import Attention
from .block_tables import BlockTableArray
from .cuda_graphs import StepGraphs
from .mixed_graphs import MAX_TOKENS, MixedGraphs
from .scheduler import SchedulerOutput
from .step_buffers import StepBuffers
from .step_inputs import UNKNOWN, StepArrays
from .token_pool import TokenPool

if TYPE_CHECKING:
    from .decode_graphs import DecodeGraphs


@dataclass
class LaunchedStep:
    """A step under way."""

    step: SchedulerOutput
    sampled: SamplerOutput  # on the host once `done` has happened
    done: torch.cuda.Event | None  # None on the CPU, where nothing is under way
    prompt_logprobs: dict[str, LogprobLists] = field(default_factory=dict)

    def read(self) -> ModelRunnerOutput:
        """Wait for the step's tokens."""
        if self.done is not None:
            self.done.synchronize()
        logprobs = self.sampled.logprobs
        return ModelRunnerOutput(
            token_ids=self.sampled.token_ids.tolist(),
            logprobs=LogprobLists(*logprobs.tolist()) if logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclass
class _DecodeBatch:
    """The batch of a decode step. The next one is mostly the same, a token later."""

    requests: list[Request]
    rows: np.ndarray  # [B] int64
    columns: np.ndarray  # [4, B] int32, see ``DecodeGraphs.replay``


class ModelRunner:
    """The model, the cache's tensors and the sampler of one engine.

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
        self._pool = TokenPool(sampler)
        self._batch: _DecodeBatch | None = None  # of the last step, if that came from a graph
        self._decode_graphs: DecodeGraphs | None = None
        self._mixed_graphs: MixedGraphs | None = None
        if graphs is not None and attention.supports_graphs:
            from .decode_graphs import DecodeGraphs  # not without Triton

            self._decode_graphs = DecodeGraphs(
                model, attention, sampler, self._pool, graphs, max_num_seqs, max_blocks, block_size
            )
        if graphs is not None and attention.supports_prefill_graphs:
            self._mixed_graphs = MixedGraphs(model, attention, sampler, self._pool, graphs)
        self._scored: dict[str, LogprobLists] = {}  # of prompts that are computed in part

    def prepare(self, step: SchedulerOutput) -> None:
        """Copy in the cache what the scheduler has moved; it holds whatever becomes of the step."""
        if step.copies:
            with torch.inference_mode():
                self.attention.copy_blocks(step.copies)

    @torch.inference_mode()
    def launch(self, step: SchedulerOutput) -> LaunchedStep:
        """Have one step's tokens computed, and one sampled for each of its samples."""
        batch = self._batch
        if batch is not None and step.is_decode and batch.requests == step.requests:
            self._go_on(batch, step)
        else:
            self._batch = None
            self._join(step)
        self.sampler.upload()
        self._pool.grow()
        if step.is_decode and self._decode_graphs is not None:
            return self._under_way(step, self._replay(step), {})
        rows = self._rows(step.requests)
        tables = self._tables.gather(rows)
        arrays = StepArrays.of(step, rows, self._rows(step.sampled), tables, self._block_size)
        self._count(step, arrays.num_tokens, arrays.pairs)
        if self._may_replay(step):
            sampled, replayed = self._mixed_graphs.run(arrays)
            self._stats.num_graph_steps += replayed
            return self._under_way(step, sampled, {})
        self._buffers.begin()
        inputs = arrays.upload(self._buffers.add)
        if inputs.batch.query_lens:
            self.attention.plan_prefill(inputs.batch, self._buffers.add)
        self._buffers.send()
        if step.num_decodes:
            self.attention.plan_decode(inputs.batch)
        hidden = self.model(
            inputs.input_ids(self._pool.tokens), inputs.positions, self.attention, inputs.rope_lens
        )  # [T, H]
        prompt_logprobs = self._score_prompts(step, hidden)
        sampled = self._pool.sample(self.model, hidden, inputs)
        return self._under_way(step, sampled, prompt_logprobs)

    def finish(self, request: Request) -> None:
        """Forget a request's sampling state, if it ever ran."""
        self.sampler.remove_request(request.key)
        self._scored.pop(request.key, None)

    def _join(self, step: SchedulerOutput) -> None:
        """Give newcomers their rows, and bring the block tables of all up to date."""
        for part, table in zip(step.parts, step.block_tables, strict=True):
            for request in (part.request, *step.forks.get(part.request.key, ())):
                is_new = request.key not in self.sampler
                if is_new:
                    self._start_sampling(request)
                row = self.sampler.row_of(request.key)
                if is_new or part.joins or request is not part.request:
                    self._tables.write(row, table)
                else:
                    self._tables.update(row, table)

    def _go_on(self, batch: _DecodeBatch, step: SchedulerOutput) -> None:
        """The same sequences decode again: each is a token longer."""
        batch.columns[0] = UNKNOWN
        batch.columns[1] += 1
        # Whoever has begun a block has a new one in its table; the other tables are as before.
        changed = np.flatnonzero(batch.columns[1] % self._block_size == 1).tolist()
        if step.copies:
            changed = range(len(step.parts))
        tables = [step.block_tables[place] for place in changed]
        self._tables.update_last(batch.rows[changed], tables)

    def _replay(self, step: SchedulerOutput) -> SamplerOutput:
        """A step of decodes alone, from a CUDA graph."""
        batch = self._batch = self._batch or self._new_batch(step)
        sampled = self._decode_graphs.replay(batch.columns, self._tables.gather(batch.rows))
        self._stats.num_graph_steps += 1
        self._count(step, len(step.parts), int(batch.columns[1].sum()))
        return sampled

    def _new_batch(self, step: SchedulerOutput) -> _DecodeBatch:
        requests = step.requests
        rows = self._rows(requests)
        known = [part.request.token_ids[part.start : part.end] for part in step.parts]
        columns = [
            [token_ids[0] if token_ids else UNKNOWN for token_ids in known],
            [part.end for part in step.parts],
            rows,
            [request.num_prompt_tokens for request in requests],
        ]
        return _DecodeBatch(requests, rows, np.array(columns, dtype=np.int32))

    def _may_replay(self, step: SchedulerOutput) -> bool:
        """Whether a step with chunks is one for the graphs: short, and only its samples wanted."""
        return (
            self._mixed_graphs is not None
            and not step.is_decode
            and step.num_tokens <= MAX_TOKENS
            and all(r.sampling_params.prompt_logprobs is None for r in step.requests)
        )

    def _start_sampling(self, request: Request) -> None:
        self.sampler.add_request(
            request.key,
            request.sampling_params,
            request.prompt_token_ids,
            request.output_token_ids,
            request.eos_token_ids,
            request.index,
        )

    def _rows(self, requests: Sequence[Request]) -> np.ndarray:
        """Of the sampler, and of the block tables: int64."""
        return np.array([self.sampler.row_of(request.key) for request in requests], dtype=np.int64)

    def _under_way(
        self,
        step: SchedulerOutput,
        sampled: SamplerOutput,
        prompt_logprobs: dict[str, LogprobLists],
    ) -> LaunchedStep:
        """Start to bring to the host what a step samples."""
        if self.model.device.type != "cuda":
            return LaunchedStep(step, sampled, None, prompt_logprobs)
        logprobs = sampled.logprobs
        if logprobs is not None:
            fields = (logprobs.token_ids, logprobs.logprobs, logprobs.ranks)
            logprobs = LogprobsTensors(*map(_to_host, fields))
        on_host = SamplerOutput(_to_host(sampled.token_ids), logprobs)
        done = torch.cuda.Event()
        done.record()
        return LaunchedStep(step, on_host, done, prompt_logprobs)

    def _score_prompts(self, step: SchedulerOutput, hidden: Tensor) -> dict[str, LogprobLists]:
        """Log-probabilities of the prompts of those who asked, when the last chunk is computed."""
        scores = {}
        first = 0  # row of the part's first token
        for part in step.parts:
            request, num_tokens = part.request, part.end - part.start
            wanted = request.sampling_params.prompt_logprobs
            begin, first = first, first + num_tokens
            if wanted is None or request.index > 0 or request.output_token_ids:
                continue
            if part.start >= request.num_prompt_tokens:
                continue
            # Position i predicts token i + 1, so the last position has no prompt token to score.
            last = min(part.end, request.num_prompt_tokens - 1)
            targets = request.prompt_token_ids[part.start + 1 : last + 1]
            logits = self.model.compute_logits(hidden[begin : begin + len(targets)])
            on_device = torch.tensor(targets, dtype=torch.int64, device=logits.device)
            scored = gather_logprobs(logits, on_device, wanted).tolist()
            if part.start == 0:
                self._scored[request.key] = LogprobLists([], [], [])
            whole = self._scored[request.key]
            for mine, new in zip(vars(whole).values(), scored, strict=True):
                mine.extend(new)
            self._stats.flops += self.model.config.batch_flops(0, 0, len(targets))
            if part.end == request.num_prompt_tokens:
                scores[request.key] = self._scored.pop(request.key)
        return scores

    def _count(self, step: SchedulerOutput, num_tokens: int, pairs: int) -> None:
        """Note a step's work; ``pairs`` are those of a query and a key that it sees."""
        stats, num_samples = self._stats, len(step.sampled)
        stats.num_steps += 1
        stats.num_forward_tokens += num_tokens
        stats.num_prompt_tokens += num_tokens - step.num_decodes
        stats.num_generated_tokens += num_samples
        stats.flops += self.model.config.batch_flops(num_tokens, pairs, num_samples)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory that is there once what is queued has happened."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def profile_step(
    model: Transformer, attention: type[Attention], num_tokens: int, longest: int
) -> None:
    """Run a prefill of that many tokens without a cache, to see what memory a step takes.

    Args:
        longest: tokens of a sequence at most. A long chunk may have what is cached before it copied
            next to its own keys and values (``plan_prefill``), in one layer after the other.
    """

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gathered = k.new_empty(2, longest, *k.shape[1:])
        out = attention.self_attention(q, k, v)
        del gathered  # not before attention has taken its own memory
        return out

    positions = torch.arange(num_tokens, device=model.device)
    with torch.inference_mode():
        input_ids = torch.zeros_like(positions)
        hidden = model(input_ids, positions, attend)
        model.compute_logits(hidden[-1:])

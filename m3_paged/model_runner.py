"""Runs one step: lists of requests become packed tensors, and come back as token ids.

    prefill: [ a a a a a a | b b | c c c c ]     all prompts behind each other, nothing is padding
    decode:  [ a | b | c ]                       one token each; block tables say where the rest is
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from common.attention import causal_self_attention
from common.metrics import EngineStats
from common.model import Transformer
from common.outputs import LogprobLists, ModelRunnerOutput
from common.request import Request
from common.sampling import Sampler, gather_logprobs

from .attention import PagedAttention
from .scheduler import SchedulerOutput


class ModelRunner:
    """The model, the cache's tensors and the sampler of one engine."""

    def __init__(
        self,
        model: Transformer,
        attention: PagedAttention,
        sampler: Sampler,
        stats: EngineStats,
        block_size: int,
    ) -> None:
        self.model = model
        self.attention = attention
        self.sampler = sampler
        self._stats = stats
        self._block_size = block_size

    def prepare(self, step: SchedulerOutput) -> None:
        """Copy in the cache what the scheduler has moved; it holds whatever becomes of the step."""
        if step.copies:
            with torch.inference_mode():
                self.attention.copy_blocks(step.copies)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Compute one step's tokens and sample one for each of its samples."""
        for request in step.sampled if step.is_prefill else ():
            if not request.output_token_ids:  # a preempted one has kept its sampling state
                self._start_sampling(request)

        starts = np.array([request.num_computed_tokens for request in step.requests])
        ends = np.array([request.num_tokens for request in step.requests])
        lens = ends - starts
        # Which request each packed token belongs to, and where in its sequence it stands: [T]
        owners = np.repeat(np.arange(len(lens)), lens)
        positions = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens - starts, lens)
        tables = _padded(step.block_tables)  # [B, max_blocks]
        blocks = tables[owners, positions // self._block_size]
        slot_mapping = self._send(blocks.astype(np.int64) * self._block_size
                                  + positions % self._block_size)
        if step.is_prefill:
            self.attention.plan_prefill(slot_mapping, lens.tolist())
        else:
            context_lens = self._send(ends.astype(np.int32))
            self.attention.plan_decode(slot_mapping, self._send(tables), context_lens)

        input_ids = self._send(self._new_token_ids(step.requests, len(positions)))  # [T]
        # Only dynamic rope looks at this: which length each token's frequencies are for.
        prompt_lens = np.array([request.num_prompt_tokens for request in step.requests])
        rope_lens = np.maximum(positions + 1, prompt_lens[owners])
        # The last token of each sequence, once for every sample that is drawn from it. Sent before
        # the model runs: a copy from ordinary memory waits until the GPU has nothing left to do.
        num_samples = [1 + len(step.forks.get(request.key, ())) for request in step.requests]
        last = self._send(np.repeat(np.cumsum(lens) - 1, num_samples))
        hidden = self.model(
            input_ids, self._send(positions), self.attention, self._send(rope_lens)
        )  # [T, H]

        prompt_logprobs = self._score_prompts(step, hidden, input_ids, np.cumsum(lens) - lens)
        logits = self.model.compute_logits(hidden[last])  # [samples, V]
        sampled = self.sampler(logits, [request.key for request in step.sampled])

        self._count(step, starts, ends, sum(num_samples), prompt_logprobs)
        return ModelRunnerOutput(
            token_ids=sampled.token_ids.tolist(),
            logprobs=LogprobLists(*sampled.logprobs.tolist()) if sampled.logprobs else None,
            prompt_logprobs=prompt_logprobs,
        )

    def finish(self, request: Request) -> None:
        """Forget a request's sampling state, if it ever ran."""
        self.sampler.remove_request(request.key)

    def _start_sampling(self, request: Request) -> None:
        self.sampler.add_request(
            request.key,
            request.sampling_params,
            request.prompt_token_ids,
            request.output_token_ids,
            request.eos_token_ids,
            request.index,
        )

    def _new_token_ids(self, requests: Sequence[Request], num_tokens: int) -> np.ndarray:
        """The tokens to compute, packed: ``[T]`` int64."""
        new = (r.token_ids[r.num_computed_tokens :] for r in requests)
        return np.fromiter(chain.from_iterable(new), dtype=np.int64, count=num_tokens)

    def _send(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)

    def _score_prompts(
        self, step: SchedulerOutput, hidden: Tensor, input_ids: Tensor, offsets: np.ndarray
    ) -> dict[str, LogprobLists]:
        """Log-probabilities of the prompts of those who asked, when they are first computed."""
        scores = {}
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
        return scores

    def _count(
        self,
        step: SchedulerOutput,
        starts: np.ndarray,
        ends: np.ndarray,
        num_samples: int,
        prompt_logprobs: dict[str, LogprobLists],
    ) -> None:
        stats, config = self._stats, self.model.config
        num_tokens = int((ends - starts).sum())
        stats.num_steps += 1
        stats.num_forward_tokens += num_tokens
        stats.num_prompt_tokens += num_tokens if step.is_prefill else 0
        stats.num_generated_tokens += num_samples
        num_logits = num_samples + sum(len(lists.ranks) for lists in prompt_logprobs.values())
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            stats.flops += config.flops(end - start, end, 0)
        stats.flops += config.flops(0, 0, num_logits)


def _padded(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """Block tables as one array ``[B, max_blocks]`` int32; what lies past a table's end is 0."""
    lens = np.array([len(table) for table in tables])
    array = np.zeros((len(tables), lens.max()), dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=lens.sum())
    array[np.arange(lens.max()) < lens[:, None]] = flat
    return array


def profile_step(model: Transformer, num_tokens: int) -> None:
    """Run a prefill of that many tokens without a cache, to see what memory a step takes."""
    positions = torch.arange(num_tokens, device=model.device)
    with torch.inference_mode():
        input_ids = torch.zeros_like(positions)
        hidden = model(input_ids, positions, lambda _, q, k, v: causal_self_attention(q, k, v))
        model.compute_logits(hidden[-1:])

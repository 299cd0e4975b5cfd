"""Runs one step: lists of requests become padded tensors, and come back as token ids.

    row 0 | t t t t t t |     T is the longest row; the padding of the shorter ones is computed
    row 1 | t t . . . . |     and thrown away. A decode step has T = 1 and wastes nothing.
    row 2 | t t t t . . |
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.attention import causal_self_attention
from common.metrics import EngineStats
from common.model import Transformer
from common.outputs import LogprobLists, ModelRunnerOutput
from common.request import Request
from common.sampling import INVALID_TOKEN, Sampler, gather_logprobs

from .attention import SlotAttention
from .scheduler import SchedulerOutput


class ModelRunner:
    """The model, the cache's tensors and the sampler of one engine."""

    def __init__(
        self, model: Transformer, attention: SlotAttention, sampler: Sampler, stats: EngineStats
    ) -> None:
        self.model = model
        self.attention = attention
        self.sampler = sampler
        self._stats = stats

    @torch.inference_mode()
    def prepare(self, step: SchedulerOutput) -> None:
        """Copy in the cache what the scheduler has moved; it holds whatever becomes of the step."""
        self.attention.move(step.moves)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Compute one step's tokens and sample one for each of its requests."""
        for request in step.requests if step.is_prefill else ():
            if not request.output_token_ids:  # a preempted one has kept its sampling state
                self._start_sampling(request)

        starts = np.array([request.num_computed_tokens for request in step.requests])
        lens = np.array([request.num_tokens for request in step.requests]) - starts
        input_ids, positions = self._pad(step.requests, starts, lens)  # [B, T]
        prompt_lens = torch.tensor([[r.num_prompt_tokens] for r in step.requests])
        # Only dynamic rope looks at this: which length each token's frequencies are for.
        rope_lens = torch.maximum(positions + 1, prompt_lens.to(positions.device))

        self.attention.plan(
            step.first_slot, step.slot_len, positions, context_len=int((starts + lens).max())
        )
        # Sent before the model runs: a copy from ordinary memory waits until the GPU is idle.
        rows = torch.arange(len(lens), device=positions.device)
        last = torch.from_numpy(lens - 1).to(positions.device)
        hidden = self.model(input_ids, positions, self.attention, rope_lens)  # [B, T, H]
        prompt_logprobs = self._score_prompts(step, hidden, input_ids)
        logits = self.model.compute_logits(hidden[rows, last])  # [B, V]
        sampled = self.sampler(logits, [request.key for request in step.requests])
        token_ids = sampled.token_ids.tolist()
        for row, token_id in enumerate(token_ids):
            if token_id == INVALID_TOKEN:
                self.attention.wipe(row)  # its NaN would reach the slot's next owner

        self._count(step, starts, lens, prompt_logprobs)
        return ModelRunnerOutput(
            token_ids=token_ids,
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

    def _pad(
        self, requests: list[Request], starts: np.ndarray, lens: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Token ids and positions ``[B, T]`` of the tokens to compute, short rows padded behind.

        Padding counts positions on: it is written into the slot behind the row's tokens. It
        repeats the row's last token, so that a token the model turns to NaN harms its row only.
        """
        longest = int(lens.max())
        input_ids = np.empty((len(requests), longest), dtype=np.int64)
        for row, request in enumerate(requests):
            input_ids[row, : lens[row]] = request.token_ids[starts[row] :]
            input_ids[row, lens[row] :] = request.token_ids[-1]
        positions = starts[:, None] + np.arange(longest)
        device = self.model.device
        return torch.from_numpy(input_ids).to(device), torch.from_numpy(positions).to(device)

    def _score_prompts(
        self, step: SchedulerOutput, hidden: Tensor, input_ids: Tensor
    ) -> dict[str, LogprobLists]:
        """Log-probabilities of the prompts of those who asked, when they are first computed."""
        scores = {}
        for row, request in enumerate(step.requests if step.is_prefill else ()):
            wanted = request.sampling_params.prompt_logprobs
            if wanted is None or request.index > 0 or request.output_token_ids:
                continue
            # Position i predicts token i + 1, so the last position has no prompt token to score.
            end = request.num_prompt_tokens
            logits = self.model.compute_logits(hidden[row, : end - 1])
            scored = gather_logprobs(logits, input_ids[row, 1:end], wanted)
            scores[request.key] = LogprobLists(*scored.tolist())
        return scores

    def _count(
        self,
        step: SchedulerOutput,
        starts: np.ndarray,
        lens: np.ndarray,
        prompt_logprobs: dict[str, LogprobLists],
    ) -> None:
        stats, config = self._stats, self.model.config
        num_tokens, num_rows = int(lens.sum()), len(lens)
        stats.num_steps += 1
        stats.num_forward_tokens += num_rows * int(lens.max())
        stats.num_padding_tokens += num_rows * int(lens.max()) - num_tokens
        stats.num_prompt_tokens += num_tokens if step.is_prefill else 0
        stats.num_generated_tokens += num_rows
        num_logits = num_rows + sum(len(lists.ranks) for lists in prompt_logprobs.values())
        # Padding is computed like everything else: rows of equal length, equal work.
        longest, context = int(lens.max()), int((starts + lens).max())
        stats.flops += num_rows * config.flops(longest, context, 0)
        stats.flops += config.flops(0, 0, num_logits)


def profile_step(model: Transformer, num_tokens: int) -> None:
    """Run a prefill of that many tokens without a cache, to see what memory a step takes."""
    positions = torch.arange(num_tokens, device=model.device)
    with torch.inference_mode():
        input_ids = torch.zeros_like(positions)
        hidden = model(input_ids, positions, lambda _, q, k, v: causal_self_attention(q, k, v))
        model.compute_logits(hidden[-1:])

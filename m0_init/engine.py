"""The engine of m0: one sequence at a time, and every token recomputes all that came before.

There is no cache, so step n runs the model over the whole sequence again: generating N tokens after
a prompt of P costs P + (P+1) + … + (P+N-1) token computations instead of P + N - 1. That is the
baseline every later milestone beats; ``stats()["flops"]`` counts it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from common.attention import causal_mask, masked_attention
from common.checkpoint import load_model, open_checkpoint
from common.llm import LLM as BaseLLM
from common.metrics import EngineStats
from common.outputs import LogprobLists, ModelRunnerOutput, RequestOutput
from common.processor import InputProcessor, OutputProcessor, Prompt
from common.request import Request, RequestStatus
from common.sampling import Sampler, gather_logprobs
from common.sampling_params import SamplingParams
from common.trace import Computed, Trace

from .config import EngineConfig


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a whole sequence to itself, each token to those up to and including it.

    Args:
        layer: not needed here; a milestone with a cache finds its keys and values by it.
        q: ``[T, Hq, D]``; k, v: ``[T, Hkv, D]``, one sequence without padding.

    Returns:
        ``[T, Hq, D]``.
    """
    mask = causal_mask(torch.arange(len(q), device=q.device), len(q))
    return masked_attention(q[None], k[None], v[None], mask[None])[0]


class LLMEngine:
    """Requests in, outputs out; the oldest request runs to its end before the next one starts."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = config.resolve_device()
        checkpoint = open_checkpoint(config.model, seed=config.seed)
        self.model_config = checkpoint.config
        self.dtype = config.resolve_dtype(self.model_config)
        self.max_model_len = config.resolve_max_model_len(self.model_config)
        self.tokenizer = checkpoint.tokenizer
        self.model = load_model(
            checkpoint, dtype=self.dtype, device=self.device, max_positions=self.max_model_len
        )
        self.sampler = Sampler(self.model_config.vocab_size, self.device, config.seed)
        self.input_processor = InputProcessor(
            self.tokenizer, self.model_config, self.max_model_len
        )
        self.output_processor = OutputProcessor(self.tokenizer)
        self.trace: Trace | None = None  # writes down what happens, if somebody wants to see it
        self.queue: deque[Request] = deque()
        self._stats = EngineStats()

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> None:
        """Queue a request.

        Raises:
            ValueError: it cannot be served (the message says why) or its id is in use.
        """
        if request_id in self.output_processor:
            raise ValueError(f"request id {request_id!r} is in use by an unfinished request")
        requests = self.input_processor.make_requests(request_id, prompt, params, priority)
        self.output_processor.add(requests)
        if self.trace is not None:
            self.trace.added(prompt, requests)
        self.queue.extend(requests)
        # Stable: equal priorities stay first come, first served; the running one keeps its place.
        self.queue = deque(sorted(self.queue, key=_queue_order))

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request now; returns its last output, or None when there is none of that id."""
        requests = self.output_processor.requests(request_id)
        for request in requests:
            if not request.is_finished:
                request.status = RequestStatus.FINISHED_ABORTED
                self._finish(request)
        return self.output_processor.close(request_id) if requests else None

    def has_unfinished_requests(self) -> bool:
        return len(self.output_processor) > 0

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Generate one token of the current request; empty when there is nothing to do."""
        if not self.queue:
            return []
        start = time.perf_counter()
        request = self.queue[0]
        if request.status is RequestStatus.WAITING:
            self._start(request)
        num_tokens = request.num_tokens
        try:
            result = self._forward(request)
        except torch.OutOfMemoryError:
            return [self._fail(request)]
        request.append_output(result.token_ids[0])
        outputs = self.output_processor.process([request], result)
        if request.is_finished:
            self._finish(request)
        self._stats.step_time_s += time.perf_counter() - start
        if self.trace is not None:
            self.trace.step(Computed(request, 0, num_tokens), self._stats, start)
        return outputs

    def stats(self) -> dict[str, Any]:
        """Counters since the engine started; see ``common.metrics.EngineStats``."""
        return self._stats.as_dict()

    def _start(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        request.metrics.first_scheduled_time = time.perf_counter()
        self.sampler.add_request(
            request.key,
            request.sampling_params,
            request.prompt_token_ids,
            request.output_token_ids,
            request.eos_token_ids,
            request.index,
        )

    def _fail(self, request: Request) -> RequestOutput:
        """End a request, with all its samples, that needs more memory than there is."""
        for sample in self.output_processor.requests(request.request_id):
            if not sample.is_finished:
                sample.fail(f"no memory to compute {request.num_tokens} tokens in one step")
                self._finish(sample)
        return self.output_processor.close(request.request_id)

    def _finish(self, request: Request) -> None:
        if self.trace is not None:
            self.trace.finished(request)
        self.queue.remove(request)
        self.sampler.remove_request(request.key)
        self._stats.num_requests_finished += 1

    def _forward(self, request: Request) -> ModelRunnerOutput:
        """Run the model over the whole sequence and sample one token."""
        num_tokens = request.num_tokens
        input_ids = torch.tensor(request.token_ids, device=self.device)  # [T]
        positions = torch.arange(num_tokens, device=self.device)  # [T]
        # Only dynamic rope looks at this: which length each token's frequencies are for.
        rope_lens = (positions + 1).clamp(min=request.num_prompt_tokens)
        hidden = self.model(input_ids, positions, causal_attention, rope_lens)  # [T, H]

        num_logits = 1
        prompt_logprobs = {}
        wanted = request.sampling_params.prompt_logprobs
        if wanted is not None and request.index == 0 and not request.output_token_ids:
            # Position i predicts token i + 1, so the last position has no prompt token to score.
            logits = self.model.compute_logits(hidden[:-1])
            scored = gather_logprobs(logits, input_ids[1:], wanted)
            prompt_logprobs[request.key] = LogprobLists(*scored.tolist())
            num_logits = num_tokens
        sampled = self.sampler(self.model.compute_logits(hidden[-1:]), [request.key])

        stats = self._stats
        stats.num_steps += 1
        stats.num_forward_tokens += num_tokens
        stats.num_prompt_tokens += num_tokens if not request.output_token_ids else 0
        stats.num_generated_tokens += 1
        stats.flops += self.model_config.flops(num_tokens, num_tokens, num_logits)
        stats.record_kv(used=0, allocated=0, num_running=1)
        return ModelRunnerOutput(
            token_ids=sampled.token_ids.tolist(),
            logprobs=LogprobLists(*sampled.logprobs.tolist()) if sampled.logprobs else None,
            prompt_logprobs=prompt_logprobs,
        )


def _queue_order(request: Request) -> tuple[bool, int]:
    return (request.status is RequestStatus.WAITING, request.priority)


class LLM(BaseLLM):
    """The offline face of this milestone; see ``common.llm.LLM``."""

    engine_class = LLMEngine
    config_class = EngineConfig

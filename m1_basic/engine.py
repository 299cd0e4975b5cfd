"""The engine of m1: one sequence at a time, and every token is computed exactly once.

The first step of a request (prefill) runs the model over its whole prompt, every later one (decode)
over the one token sampled last; keys and values of all the others wait in the cache.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from common.checkpoint import load_model, open_checkpoint
from common.llm import LLM as BaseLLM
from common.metrics import EngineStats
from common.outputs import LogprobLists, ModelRunnerOutput, RequestOutput
from common.processor import InputProcessor, OutputProcessor, Prompt
from common.request import Request, RequestStatus
from common.sampling import Sampler, gather_logprobs
from common.sampling_params import SamplingParams
from common.trace import Computed, Trace

from .attention import CachedAttention
from .config import EngineConfig
from .kv_cache import KVCache


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
        self.kv_cache = KVCache(
            self.model_config, self.max_model_len, dtype=self.dtype, device=self.device
        )
        self.attention = CachedAttention(self.kv_cache)
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
        num_cached = request.num_computed_tokens
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
            computed = Computed(request, num_cached, request.num_computed_tokens)
            self.trace.step(computed, self._stats, start)
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
        """Compute the tokens the cache does not hold yet, and sample the next one."""
        start = request.num_computed_tokens
        new_token_ids = request.token_ids[start:]  # the prompt, or the token sampled last
        num_tokens = len(new_token_ids)
        input_ids = torch.tensor(new_token_ids, device=self.device)  # [T]
        positions = torch.arange(start, start + num_tokens, device=self.device)  # [T]
        # Only dynamic rope looks at this: which length each token's frequencies are for.
        rope_lens = (positions + 1).clamp(min=request.num_prompt_tokens)
        self.attention.plan(start, positions)
        hidden = self.model(input_ids, positions, self.attention, rope_lens)  # [T, H]

        num_logits = 1
        prompt_logprobs = {}
        wanted = request.sampling_params.prompt_logprobs
        if wanted is not None and request.index == 0 and start == 0:
            # Position i predicts token i + 1, so the last position has no prompt token to score.
            logits = self.model.compute_logits(hidden[:-1])
            scored = gather_logprobs(logits, input_ids[1:], wanted)
            prompt_logprobs[request.key] = LogprobLists(*scored.tolist())
            num_logits = num_tokens
        sampled = self.sampler(self.model.compute_logits(hidden[-1:]), [request.key])

        request.num_computed_tokens += num_tokens  # last, so that an interrupted step never was
        stats = self._stats
        stats.num_steps += 1
        stats.num_forward_tokens += num_tokens
        stats.num_prompt_tokens += num_tokens if start == 0 else 0
        stats.num_generated_tokens += 1
        stats.flops += self.model_config.flops(num_tokens, start + num_tokens, num_logits)
        stats.kv_slots_total = self.kv_cache.num_slots
        stats.record_kv(start + num_tokens, self.kv_cache.num_slots, num_running=1)
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

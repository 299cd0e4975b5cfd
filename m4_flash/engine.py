"""The engine of m4: many sequences at once, joining and leaving at every step.

One step is a straight line through the rooms, and a request never turns back in it::

    Scheduler.schedule -> ModelRunner.execute -> Scheduler.update -> OutputProcessor.process
"""

from __future__ import annotations

import time
from typing import Any

import torch

from common.checkpoint import load_model, open_checkpoint
from common.llm import LLM as BaseLLM
from common.memory import num_kv_tokens_that_fit
from common.metrics import EngineStats
from common.ops import get_ops
from common.outputs import RequestOutput
from common.processor import InputProcessor, OutputProcessor, Prompt
from common.request import Request, RequestStatus
from common.sampling import Sampler
from common.sampling_params import SamplingParams
from common.trace import Trace

from .backends import choose_backend
from .config import EngineConfig
from .cuda_graphs import StepGraphs
from .kv_cache import PagedKVCache
from .model_runner import ModelRunner, profile_step
from .scheduler import Scheduler, SchedulerOutput


class LLMEngine:
    """Requests in, outputs out."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = config.resolve_device()
        checkpoint = open_checkpoint(config.model, seed=config.seed)
        self.model_config = checkpoint.config
        self.dtype = config.resolve_dtype(self.model_config)
        self.max_model_len = config.resolve_max_model_len(self.model_config)
        self.tokenizer = checkpoint.tokenizer
        self._backend = choose_backend(
            config.attention_backend, self.model_config, self.dtype, self.device, config.block_size
        )
        self.model = load_model(
            checkpoint,
            dtype=self.dtype,
            device=self.device,
            max_positions=self.max_model_len,
            ops=get_ops(self.device, config.ops),
        )
        self._stats = EngineStats()
        num_blocks = self._size_kv_cache()
        attention = self._backend(
            self.model_config, num_blocks, config.block_size, dtype=self.dtype, device=self.device
        )
        self.scheduler = Scheduler(
            PagedKVCache(num_blocks, config.block_size),
            config.max_num_seqs,
            config.max_num_batched_tokens,
        )
        max_blocks = -(-self.max_model_len // config.block_size)
        # A row for everyone who runs and one for padding: the sampler's tables rarely move.
        sampler = Sampler(
            self.model_config.vocab_size, self.device, config.seed, num_rows=config.max_num_seqs + 1
        )
        graphs = None
        if self.device.type == "cuda" and not config.enforce_eager:
            graphs = StepGraphs(sampler, self._stats)
        self.model_runner = ModelRunner(
            self.model,
            attention,
            sampler,
            graphs,
            self._stats,
            config.max_num_seqs,
            max_blocks,
            config.block_size,
        )
        self.input_processor = InputProcessor(
            self.tokenizer, self.model_config, self.max_model_len
        )
        self.output_processor = OutputProcessor(self.tokenizer)
        self.trace: Trace | None = None  # writes down what happens, if somebody wants to see it

    def _size_kv_cache(self) -> int:
        """Blocks in the KV cache; lowers ``max_model_len`` to it when that was left open."""
        config, size = self.config, self.config.block_size
        num_blocks = config.num_kv_blocks
        if num_blocks is None:
            num_tokens = num_kv_tokens_that_fit(
                self.model_config,
                self.dtype,
                self.device,
                config.gpu_memory_utilization,
                lambda: profile_step(
                    self.model,
                    self._backend,
                    min(self.max_model_len, config.max_num_batched_tokens),
                ),
            )
            most_useful = config.max_num_seqs * -(-self.max_model_len // size)
            num_blocks = min(num_tokens // size, most_useful)
        if self.max_model_len > num_blocks * size:
            if config.max_model_len is not None:
                raise ValueError(
                    f"the KV cache holds {num_blocks * size} tokens, fewer than max_model_len "
                    f"{config.max_model_len}: lower max_model_len or enlarge the cache"
                )
            # Whatever is accepted must be able to finish when it runs alone.
            self.max_model_len = num_blocks * size
        self._stats.kv_slots_total = num_blocks * size
        return num_blocks

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> None:
        """Queue a request; it may join at the next step. Lower ``priority`` runs earlier.

        Raises:
            ValueError: it cannot be served (the message says why) or its id is in use.
        """
        if request_id in self.output_processor:
            raise ValueError(f"request id {request_id!r} is in use by an unfinished request")
        requests = self.input_processor.make_requests(request_id, prompt, params, priority)
        self.output_processor.add(requests)
        if self.trace is not None:
            self.trace.added(prompt, requests)
        for request in requests:
            self.scheduler.add(request)

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

    def step(self) -> list[RequestOutput]:
        """Run one step; returns an output for every request that got a token in it."""
        start = time.perf_counter()
        step = self.scheduler.schedule()
        if step is None:
            return []
        scheduled = time.perf_counter()
        # Who decodes has been scheduled before, and while we look at everyone the GPU waits.
        for request in step.sampled if step.is_prefill else ():
            request.metrics.first_scheduled_time = request.metrics.first_scheduled_time or start
        cache = self.scheduler.kv_cache
        self.model_runner.prepare(step)
        try:
            result = self.model_runner.execute(step)
        except BaseException as error:  # Ctrl-C too: whatever it is, the step has not happened
            # (but who draws at random may have drawn, and then draws again with other noise)
            if step.is_prefill:
                self._undo_prefill(step)
            if not (step.is_prefill and isinstance(error, torch.OutOfMemoryError)):
                raise
            return self._retreat(step)
        executed = time.perf_counter()
        self.scheduler.update(step, result.token_ids)
        updated = time.perf_counter()
        self._stats.record_kv(cache.num_used, cache.num_allocated, len(self.scheduler.running))
        outputs = self.output_processor.process(step.sampled, result)
        for request in step.sampled:
            if request.is_finished:
                self._finish(request)
        self._stats.schedule_time_s += scheduled - start + updated - executed
        self._stats.step_time_s += time.perf_counter() - start
        if self.trace is not None:
            self.trace.step(step, self._stats, start, scheduled, read=executed)
        return outputs

    def stats(self) -> dict[str, Any]:
        """Counters since the engine started; see ``common.metrics.EngineStats``."""
        self._stats.num_preemptions = self.scheduler.num_preemptions
        return self._stats.as_dict()

    def _undo_prefill(self, step: SchedulerOutput) -> None:
        """Put newcomers back into the queue as if they had not been admitted."""
        for request in step.sampled:
            self.scheduler.requeue(request)
            if not request.output_token_ids:
                self.model_runner.finish(request)

    def _retreat(self, step: SchedulerOutput) -> list[RequestOutput]:
        """After a prefill that found no memory: smaller steps from now on.

        A prompt that finds none although it ran alone ends with an error; the others go on.
        """
        if len(step.requests) > 1:
            self.scheduler.max_num_batched_tokens //= 2
            return []
        request_id = step.requests[0].request_id
        for request in self.output_processor.requests(request_id):
            if not request.is_finished:
                request.fail(f"no memory to compute {request.num_tokens} tokens in one step")
                self._finish(request)
        return [self.output_processor.close(request_id)]

    def _finish(self, request: Request) -> None:
        if self.trace is not None:
            self.trace.finished(request)
        self.scheduler.finish(request)
        self.model_runner.finish(request)
        self._stats.num_requests_finished += 1


class LLM(BaseLLM):
    """The offline face of this milestone; see ``common.llm.LLM``."""

    engine_class = LLMEngine
    config_class = EngineConfig

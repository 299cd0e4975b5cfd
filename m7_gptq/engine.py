"""The engine of m7: as m6's, over weights that may be quantized.

The rooms are those of m4, but while one step is on the device the next one is planned and launched
behind it, and only then are the first one's tokens read::

    step N:    schedule -> launch .  .  .  .  .  .  .  .  read -> update -> process
    step N+1:                        schedule -> launch .  .  .  .  .  .  .  .  read -> ...
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict
from typing import Any

import torch

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
from .checkpoint_load import linear_bytes, load_model, open_checkpoint
from .chunk_size import ChunkSize
from .config import EngineConfig
from .cuda_graphs import StepGraphs
from .kv_cache import PagedKVCache
from .model_runner import LaunchedStep, ModelRunner, profile_step
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
            weight_form=config.weight_form,
        )
        self._stats = EngineStats(linear_bytes=linear_bytes(checkpoint, self.model))
        num_blocks = self._size_kv_cache()
        attention = self._backend(
            self.model_config, num_blocks, config.block_size, dtype=self.dtype, device=self.device
        )
        self.scheduler = Scheduler(
            PagedKVCache(num_blocks, config.block_size, config.prefix_index),
            config.max_num_seqs,
            config.max_num_batched_tokens,
            ChunkSize(
                config.chunk_size,
                None if config.target_itl_ms is None else config.target_itl_ms / 1e3,
                self.model_config.batch_flops(1, 0, 0) / self.model_config.batch_flops(0, 1, 0),
            ),
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
        self._launched: deque[LaunchedStep] = deque()  # whose tokens have not been read
        self._last_read = 0.0  # when the last step's tokens were
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
                    self.max_model_len,
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
        """Launch a step and take in the one before it.

        Returns an output for every request that got a token in the latter.
        """
        start = time.perf_counter()
        step = self.scheduler.schedule()
        scheduled = time.perf_counter()
        self._stats.schedule_time_s += scheduled - start
        outputs = self._launch(step, start) if step is not None else []
        launched = time.perf_counter()
        num_ahead = 1 if step is not None and self.config.overlap else 0
        while len(self._launched) > num_ahead:
            outputs += self._take_in()
        self._stats.step_time_s += time.perf_counter() - start
        if self.trace is not None:
            self.trace.step(
                step, self._stats, start, scheduled, launched, self._last_read, len(self._launched)
            )
        return outputs

    def _launch(self, step: SchedulerOutput, now: float) -> list[RequestOutput]:
        """Give a step to the device; returns the outputs of those that this was too much for."""
        for part in step.parts[step.num_decodes :]:  # who decodes has been scheduled before
            for request in (part.request, *step.forks.get(part.request.key, ())):
                request.metrics.first_scheduled_time = request.metrics.first_scheduled_time or now
        cache = self.scheduler.kv_cache
        self._stats.record_kv(cache.num_used, cache.num_allocated, len(self.scheduler.running))
        try:
            self.model_runner.prepare(step)
            launched = self.model_runner.launch(step)
        except BaseException as error:  # Ctrl-C too: whatever it is, the step has not happened
            self.scheduler.undo(step)
            for request in {*step.requests, *step.sampled}:
                # Who knows how far it came: sampling starts over from the tokens that are known.
                self.model_runner.finish(request)
            if step.is_decode or not isinstance(error, torch.OutOfMemoryError):
                raise
            return self._retreat(step)
        if not self._launched:
            self._last_read = now  # nothing was under way: its time begins here
        self._launched.append(launched)
        return []

    def _take_in(self) -> list[RequestOutput]:
        """Wait for the first step under way and give its tokens to those who still want them."""
        result = self._launched[0].read()  # if that is interrupted, it is still the first
        start = time.perf_counter()
        step = self._launched.popleft().step
        if self._launched or not self.config.overlap:  # else nobody waited for it
            size = self.scheduler.chunk_size
            work = sum(size.work(part.start, part.end) for part in step.parts[step.num_decodes :])
            size.observe(work, step.num_decodes, start - self._last_read)
        self._last_read = start
        taken = self.scheduler.update(step, result.token_ids)
        self._stats.schedule_time_s += time.perf_counter() - start
        outputs = self.output_processor.process(taken, result)
        for request in taken:
            if request is not None and request.is_finished:
                self._finish(request)
        return outputs

    def stats(self) -> dict[str, Any]:
        """Counters since the engine started; see ``common.metrics.EngineStats``."""
        self._stats.num_preemptions = self.scheduler.num_preemptions
        self._stats.chunk_reasons = dict(self.scheduler.chunk_reasons)
        prefixes = self.scheduler.kv_cache.prefix_stats()
        self._stats.prefix_cache = {} if prefixes is None else asdict(prefixes)
        return self._stats.as_dict()

    def _retreat(self, step: SchedulerOutput) -> list[RequestOutput]:
        """After a step that found no memory: smaller steps from now on.

        Where they cannot be smaller, whoever had the longest chunk in it ends with an error.
        """
        budget = self.scheduler.max_num_batched_tokens
        smaller = max(budget // 2, self.config.max_num_seqs + 1)
        if smaller < budget:
            self.scheduler.max_num_batched_tokens = smaller
            return []
        longest = max(step.parts, key=lambda part: part.end - part.start)
        request_id = longest.request.request_id
        for request in self.output_processor.requests(request_id):
            if not request.is_finished:
                request.fail(f"no memory to compute {budget} tokens in one step")
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

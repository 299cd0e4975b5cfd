"""A request inside the engine.

``Request`` is one *sequence*: a prompt and the tokens generated for it so far. A user's request
for ``n`` samples becomes ``n`` of them that share a ``request_id`` and differ in ``index``.
"""

from __future__ import annotations

import enum
from array import array

from common.metrics import RequestMetrics
from common.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    """Where a sequence is in its life; the finished ones carry the user's ``finish_reason``."""

    WAITING = "waiting"  # never ran
    RUNNING = "running"  # holds a place in the batch and its KV cache
    PREEMPTED = "preempted"  # lost its cache; its tokens are kept and will be recomputed
    FINISHED_STOPPED = "stop"  # EOS, a stop token or a stop string
    FINISHED_LENGTH = "length"  # max_tokens, or the model's longest sequence
    FINISHED_ABORTED = "abort"
    FINISHED_ERROR = "error"  # this request alone could not go on; ``stop_reason`` says why

    # Plain attributes of every member: these are asked for every sequence in every step.
    is_finished: bool
    finish_reason: str | None


for _status in RequestStatus:
    _status.is_finished = _status.name.startswith("FINISHED_")
    _status.finish_reason = _status.value if _status.is_finished else None


class Request:
    """One sequence on its way through the engine.

    ``num_computed_tokens`` says how many of ``token_ids`` have their keys and values in the cache;
    a sequence is in decode when exactly one token is left to compute.

    Args:
        packed_prompt: ``prompt_token_ids`` in 32 bits each, if the caller has them so already.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        *,
        prompt: str | None = None,
        eos_token_ids: tuple[int, ...] = (),
        max_model_len: int,
        priority: int = 0,
        arrival: int = 0,
        index: int = 0,
        metrics: RequestMetrics | None = None,
        packed_prompt: array[int] | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        # Unique in the engine, whatever the ids are: the index is what follows the last "#".
        self.key = f"{request_id}#{index}"
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sampling_params = sampling_params
        self.priority = priority
        self.arrival = arrival
        self.metrics = metrics or RequestMetrics()
        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None
        self.output_token_ids: list[int] = []
        # Prompt, then output. Packed: slicing ids of 32 bits into an array or bytes is one copy of
        # memory; converting a list takes as long as launching a short prompt.
        self.token_ids = array("I", packed_prompt or prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_pending = 0  # tokens that are being sampled and not known yet (from m5 on)

        room = max_model_len - len(prompt_token_ids)
        wanted = sampling_params.max_tokens
        self.max_tokens = room if wanted is None else min(wanted, room)
        self.eos_token_ids = eos_token_ids
        ends = () if sampling_params.ignore_eos else eos_token_ids
        self._last_token_ids = frozenset((*ends, *(sampling_params.stop_token_ids or ())))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        return self.status.is_finished

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key of the queues: lower priority value first, then first come, first served."""
        return (self.priority, self.arrival, self.index)

    def append_output(self, token_id: int) -> None:
        """Take a sampled token and decide whether it ends the sequence (sets ``status``).

        A token that ends the sequence is kept in ``output_token_ids``, as in vLLM. A negative
        one is the sampler's word that there was nothing to choose from; it is not kept.
        """
        if token_id < 0:
            self.fail("the model's logits were NaN or infinite, or every token was banned")
            return
        self.output_token_ids.append(token_id)
        self.token_ids.append(token_id)
        num_output = len(self.output_token_ids)
        if token_id in self._last_token_ids and num_output >= self.sampling_params.min_tokens:
            self.status = RequestStatus.FINISHED_STOPPED
            if token_id not in self.eos_token_ids or self.sampling_params.ignore_eos:
                self.stop_reason = token_id
        elif num_output >= self.max_tokens:
            self.status = RequestStatus.FINISHED_LENGTH

    def fail(self, reason: str) -> None:
        """End this sequence with an error that the user will read."""
        self.status = RequestStatus.FINISHED_ERROR
        self.stop_reason = reason

    def __repr__(self) -> str:
        return (
            f"Request({self.key!r}, {self.status.value}, prompt {self.num_prompt_tokens}, "
            f"output {len(self.output_token_ids)}, computed {self.num_computed_tokens})"
        )

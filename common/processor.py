"""The engine's two ends: prompts become requests, sampled tokens become text.

``InputProcessor`` refuses what cannot be served before it touches a queue, so that a bad request
never disturbs the others. ``OutputProcessor`` detokenizes incrementally, looks for stop strings and
gathers what the user gets to see.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

import numpy as np

from common.config import ModelConfig
from common.detokenizer import IncrementalDetokenizer
from common.metrics import RequestMetrics
from common.outputs import (
    CompletionOutput,
    Logprob,
    LogprobDict,
    LogprobLists,
    ModelRunnerOutput,
    RequestOutput,
)
from common.request import Request, RequestStatus
from common.sampling_params import RequestOutputKind, SamplingParams
from common.tokenizer import Tokenizer

ChatMessage = dict[str, str]
Prompt = str | Sequence[int] | Sequence[ChatMessage]


_WHAT_A_PROMPT_IS = "a prompt is a str, a list of token ids or a list of chat messages"
_ENDED_FROM_OUTSIDE = (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)


class InputProcessor:
    """Turns one user request into its ``n`` sequences.

    Args:
        tokenizer: None for a model that came without one; then prompts must be token ids.
        max_model_len: longest prompt plus output in tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        model_config: ModelConfig,
        max_model_len: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._config = model_config
        self._max_model_len = max_model_len
        self._num_arrived = 0

    def make_requests(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        arrival_time: float | None = None,
    ) -> list[Request]:
        """Tokenize, check, and fan out into ``params.n`` requests.

        Raises:
            ValueError: empty prompt, token id outside the vocabulary, prompt too long, or sampling
                parameters this model cannot honour.
        """
        if not isinstance(params, SamplingParams):
            raise ValueError(f"the parameters must be SamplingParams, got {params!r}")
        if not isinstance(priority, int):  # it will be compared with those of others
            raise ValueError(f"priority must be an integer, got {priority!r}")
        text, token_ids = self._tokenize(prompt)
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one token")
        vocab_size = self._config.vocab_size
        packed = _packed(token_ids, vocab_size)
        # NumPy's or torch's: users get Python's own back. (To look at every type takes as long as
        # to pack them; a mixture is served, too, and comes back as it was.)
        if type(token_ids[0]) is not int:
            token_ids = packed.tolist()
        if len(token_ids) >= self._max_model_len:
            is_own = self._max_model_len == self._config.max_model_len
            limit = "the model" if is_own else "max_model_len, or the size of the KV cache,"
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, and {limit} allows "
                f"{self._max_model_len} for prompt and output together: shorten it"
            )
        params.validate_for(vocab_size)
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer; this model has none: stop_token_ids")
        arrival = self._num_arrived
        self._num_arrived += 1
        arrival_time = time.perf_counter() if arrival_time is None else arrival_time
        return [
            Request(
                request_id,
                token_ids,
                params,
                prompt=text,
                eos_token_ids=self._config.eos_token_ids,
                max_model_len=self._max_model_len,
                priority=priority,
                arrival=arrival,
                index=index,
                metrics=RequestMetrics(arrival_time),
                packed_prompt=packed,
            )
            for index in range(params.n)
        ]

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Text (None when token ids were given) and token ids of any kind of prompt."""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("this model came without a tokenizer: pass token ids")
            return prompt, self._tokenizer.encode(prompt) if prompt else []
        if is_chat(prompt):
            if self._tokenizer is None:
                raise ValueError("this model came without a tokenizer: chat needs one")
            token_ids = self._tokenizer.apply_chat_template(list(prompt))
            return self._tokenizer.decode(token_ids, skip_special_tokens=False), token_ids
        if isinstance(prompt, Sequence):
            return None, list(prompt)
        raise ValueError(_WHAT_A_PROMPT_IS)


def is_chat(prompt: object) -> bool:
    """Whether a prompt is a list of messages like ``{"role": "user", "content": "Hi"}``."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], dict)


def _packed(token_ids: Sequence[int], vocab_size: int) -> array[int]:
    """Token ids in 32 bits each, checked at once: a loop over a long prompt's would take longer
    than to find it in the prefix cache.

    Raises:
        ValueError: one is no integer (True and False are none), or outside the vocabulary.
    """
    try:
        packed = array("I", token_ids)
    except TypeError:
        raise ValueError(_WHAT_A_PROMPT_IS) from None
    except OverflowError:  # negative, or more than 32 bits
        packed = None
    if packed is not None:
        numbers = np.frombuffer(packed, np.uint32)
        if any(type(token_ids[place]) is bool for place in np.flatnonzero(numbers < 2)):
            raise ValueError(_WHAT_A_PROMPT_IS)
        if numbers.max() < vocab_size:
            return packed
    bad = next(t for t in token_ids if not 0 <= t < vocab_size)
    raise ValueError(f"token id {bad} is outside the vocabulary (0 to {vocab_size - 1})")


class _Sample:
    """What has become of one sequence: its text, its log-probabilities."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.params = request.sampling_params
        self.tokenizer = tokenizer
        self.detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and self.params.detokenize:
            self.detokenizer = IncrementalDetokenizer(
                tokenizer, request.prompt_token_ids, self.params.skip_special_tokens
            )
        self.text = ""
        self.logprobs: list[LogprobDict] | None = None if self.params.logprobs is None else []
        self.cumulative_logprob: float | None = None if self.params.logprobs is None else 0.0
        # Whether a token adds anything here, and whether the user hears of it before the end.
        self.collects = self.detokenizer is not None or self.logprobs is not None
        self.reports = self.params.output_kind is not RequestOutputKind.FINAL_ONLY
        self.num_text_sent = 0
        self.num_tokens_sent = 0
        # While it runs, as many characters are held back as a stop string could still begin with.
        longest = max((len(stop) for stop in self.params.stop or ()), default=0)
        self.num_held_back = 0 if self.params.include_stop_str_in_output else max(longest - 1, 0)

    def add_token(self, token_id: int, logprobs: LogprobDict | None) -> None:
        if logprobs is not None and self.logprobs is not None:
            self.logprobs.append(logprobs)
            self.cumulative_logprob += logprobs[token_id].logprob
        if self.detokenizer is None:
            return
        request = self.request
        stopped_by_token = request.status is RequestStatus.FINISHED_STOPPED
        start = len(self.text)
        if not stopped_by_token or self.params.include_stop_str_in_output:
            self.text += self.detokenizer.append(token_id)
        if request.is_finished:
            self.text += self.detokenizer.flush()
        if self.params.stop and len(request.output_token_ids) > self.params.min_tokens:
            self._cut_at_stop_string(start)

    def flush(self) -> None:
        """Take in what the detokenizer still holds of a sequence that ends without a token."""
        if self.detokenizer is not None:
            self.text += self.detokenizer.flush()

    def _cut_at_stop_string(self, start: int) -> None:
        """Look for a stop string that ends in the text after ``start``; the earliest one wins."""
        earliest: tuple[int, str] | None = None
        for stop in self.params.stop or ():
            position = self.text.find(stop, max(0, start - len(stop) + 1))
            if position >= 0 and (earliest is None or position < earliest[0]):
                earliest = (position, stop)
        if earliest is None:
            return
        position, stop = earliest
        end = position + len(stop) if self.params.include_stop_str_in_output else position
        self.text = self.text[:end]
        self.request.status = RequestStatus.FINISHED_STOPPED
        self.request.stop_reason = stop

    def completion(self, delta: bool) -> CompletionOutput:
        request = self.request
        visible = len(self.text)
        if not request.is_finished:
            visible = max(visible - self.num_held_back, self.num_text_sent)
        text_from, tokens_from = (self.num_text_sent, self.num_tokens_sent) if delta else (0, 0)
        self.num_text_sent = visible
        self.num_tokens_sent = len(request.output_token_ids)
        return CompletionOutput(
            index=request.index,
            text=self.text[text_from:visible],
            token_ids=request.output_token_ids[tokens_from:],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[tokens_from:],
            finish_reason=request.status.finish_reason,
            stop_reason=request.stop_reason,
        )


class OutputProcessor:
    """Follows every unfinished request from sampled tokens to ``RequestOutput``."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._samples: dict[str, _Sample] = {}  # by Request.key
        self._groups: dict[str, list[_Sample]] = {}  # by request_id: the n samples
        self._prompt_logprobs: dict[str, list[LogprobDict | None]] = {}  # by request_id

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    def __len__(self) -> int:
        return len(self._groups)

    def requests(self, request_id: str) -> list[Request]:
        """The sequences of an unfinished request; empty when there is none of that id."""
        return [sample.request for sample in self._groups.get(request_id, ())]

    def add(self, requests: list[Request]) -> None:
        """Begin to follow the ``n`` sequences of one request."""
        samples = [_Sample(request, self._tokenizer) for request in requests]
        self._groups[requests[0].request_id] = samples
        for sample in samples:
            self._samples[sample.request.key] = sample

    def process(
        self, requests: Sequence[Request | None], result: ModelRunnerOutput
    ) -> list[RequestOutput]:
        """Take one step's tokens; ``requests[i]`` has just appended ``result.token_ids[i]``.

        None stands for one that had ended before its token came; that token is nobody's.
        A stop string that is now complete ends its request here (``request.status`` changes).
        """
        now = time.perf_counter()
        touched: dict[str, None] = {}
        # Looked up once: a member of an enum took as long as the rest of the loop (Python 3.11).
        samples, error = self._samples, RequestStatus.FINISHED_ERROR
        for row, request in enumerate(requests):
            if request is None:
                continue
            sample, status = samples[request.key], request.status
            if status is error:
                sample.flush()
            else:
                request.metrics.token_times.append(now)
                if sample.collects:
                    logprobs = self._sampled_logprobs(sample, result, row)
                    sample.add_token(result.token_ids[row], logprobs)
                    status = request.status  # a stop string may have ended it
            if sample.reports or status.is_finished:
                touched[request.request_id] = None
        # Asked by request and not by key: an id that was aborted may be another request's by now.
        for request in requests if result.prompt_logprobs else ():
            if request is not None and request.key in result.prompt_logprobs:
                dicts = self._prompt_dicts(request, result)
                self._prompt_logprobs[request.request_id] = dicts
        return [output for request_id in touched if (output := self._output(request_id, now))]

    def close(self, request_id: str) -> RequestOutput | None:
        """The last output of a request whose sequences were ended from outside a step."""
        for sample in self._groups[request_id]:
            if sample.request.status in _ENDED_FROM_OUTSIDE:
                sample.flush()
        return self._output(request_id, time.perf_counter())

    def _output(self, request_id: str, now: float) -> RequestOutput | None:
        samples = self._groups[request_id]
        first = samples[0].request
        kind = first.sampling_params.output_kind
        finished = all(sample.request.is_finished for sample in samples)
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        if finished:
            first.metrics.finished_time = now
            del self._groups[request_id]
            for sample in samples:
                del self._samples[sample.request.key]
        delta = kind is RequestOutputKind.DELTA
        return RequestOutput(
            request_id=request_id,
            prompt=first.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=[sample.completion(delta) for sample in samples],
            finished=finished,
            metrics=first.metrics,
            prompt_logprobs=(
                self._prompt_logprobs.pop(request_id, None)
                if finished
                else self._prompt_logprobs.get(request_id)
            ),
        )

    def _sampled_logprobs(
        self, sample: _Sample, result: ModelRunnerOutput, row: int
    ) -> LogprobDict | None:
        if sample.logprobs is None or result.logprobs is None:
            return None
        return self._logprob_dict(result.logprobs, row, sample.params.logprobs)

    def _prompt_dicts(
        self, request: Request, result: ModelRunnerOutput
    ) -> list[LogprobDict | None]:
        lists = result.prompt_logprobs[request.key]
        wanted = request.sampling_params.prompt_logprobs
        rows = range(len(lists.token_ids))
        return [None, *(self._logprob_dict(lists, row, wanted) for row in rows)]

    def _logprob_dict(self, lists: LogprobLists, row: int, top: int) -> LogprobDict:
        """The chosen token with its own rank, then the ``top`` likeliest by rank."""
        token_ids, logprobs = lists.token_ids[row], lists.logprobs[row]
        ranks = (lists.ranks[row], *range(1, top + 1))
        entries: LogprobDict = {}
        for token_id, logprob, rank in zip(token_ids, logprobs, ranks, strict=False):
            # The chosen token comes first, and may come again among the likeliest.
            entries.setdefault(token_id, Logprob(logprob, rank, self._text(token_id)))
        return entries

    def _text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)

"""How a request wants its tokens chosen, and when it wants to stop.

Names, meanings and defaults are those of vLLM's ``SamplingParams``.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

# Below this temperature dividing by it means nothing in float32: the likeliest token it is.
GREEDY_TEMPERATURE = 1e-5
# Far beyond any use; products and quotients with a logit still are finite in float32.
_HUGE = 1e30
_MOST = 2**31 - 1
# Each sample is a sequence of its own from the start; vLLM draws the same line by default.
_MOST_SAMPLES = 16_384


class RequestOutputKind(enum.Enum):
    """What each ``RequestOutput`` of a streamed request holds."""

    CUMULATIVE = 0  # everything generated so far
    DELTA = 1  # what is new since the last one
    FINAL_ONLY = 2  # nothing before the request has finished


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping options of one request.

    Once constructed, ``stop`` and ``stop_token_ids`` are tuples and ``logit_bias`` is a dict, empty
    where none was given.

    Attributes:
        n: samples to generate from one prompt.
        temperature: logits are divided by it; 0 (below 1e-5) takes the likeliest token.
        top_p: keep the fewest likeliest tokens whose probabilities reach this sum; 1 keeps all.
        top_k: keep the k likeliest tokens (and what ties with the last); 0 or -1 keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest; 0 keeps all.
        repetition_penalty: above 1 makes tokens of the prompt and the output less likely.
        presence_penalty: subtracted from the logit of a token that is in the output.
        frequency_penalty: subtracted once for each time the token is in the output.
        logit_bias: token id to what is added to its logit; ``-inf`` bans the token.
        seed: makes the samples reproducible whatever else runs; sample i uses ``seed + i``.
            None or -1: the engine's own seed.
        stop: strings that end the generation; the text ends before them.
        stop_token_ids: tokens that end the generation; kept in the token ids, not in the text.
        include_stop_str_in_output: keep the stop string (or stop token's text) in the text.
        ignore_eos: generate past the end-of-sequence token.
        max_tokens: most tokens to generate; None: as many as the model has room for.
        min_tokens: before so many, no end-of-sequence or stop token can be sampled.
        logprobs: report the sampled token's log-probability and those of so many likeliest;
            they are the model's own, before any of the options above.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: produce text; False gives token ids only.
        output_kind: what each streamed output holds.

    Raises:
        ValueError: a value has the wrong type or is outside its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        for name, limits in _LIMITS.items():
            self._set(name, limits.check(name, getattr(self, name)))
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        self._set("logit_bias", _logit_bias(self.logit_bias))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")
        if self.seed == -1:
            self._set("seed", None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must not exceed max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        if self.stop and not self.detokenize:
            raise ValueError(
                "stop strings are found in the text: set detokenize=True or use stop_token_ids"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether each token is simply the likeliest one."""
        return self.temperature < GREEDY_TEMPERATURE

    def validate_for(self, vocab_size: int) -> None:
        """Check what depends on the model.

        Raises:
            ValueError: more log-probabilities than tokens, or a token id that doesn't exist.
        """
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value > vocab_size:
                raise ValueError(
                    f"{name} must be at most the vocabulary's {vocab_size} tokens, got {value}"
                )
        for name in ("stop_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    raise ValueError(
                        f"{name} names token {token_id}, which is outside the vocabulary "
                        f"(0 to {vocab_size - 1})"
                    )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everyone else


@dataclass(frozen=True)
class _Limits:
    """Legal values of a number, both ends included unless ``above_low``."""

    kind: type  # int or float
    low: float
    high: float
    above_low: bool = False
    optional: bool = False

    def check(self, name: str, value: Any) -> Any:
        """``value`` as a plain int or float; ValueError if it is none or out of range."""
        if value is None and self.optional:
            return None
        if _is_number(value, self.kind):
            number = self.kind(value)
            if self.low <= number <= self.high and not (self.above_low and number == self.low):
                return number
        raise ValueError(f"{name} must be {self}, got {value!r}")

    def __str__(self) -> str:
        noun = "an integer" if self.kind is int else "a number"
        interval = f"{'(' if self.above_low else '['}{self.low}, {self.high}]"
        return f"{noun} in {interval}{' or None' if self.optional else ''}"


_LIMITS = {
    "n": _Limits(int, 1, _MOST_SAMPLES),
    "temperature": _Limits(float, 0.0, _HUGE),
    "top_p": _Limits(float, 0.0, 1.0, above_low=True),
    "top_k": _Limits(int, -1, _MOST),
    "min_p": _Limits(float, 0.0, 1.0),
    "repetition_penalty": _Limits(float, 1.0 / _HUGE, _HUGE),
    "presence_penalty": _Limits(float, -2.0, 2.0),
    "frequency_penalty": _Limits(float, -2.0, 2.0),
    "seed": _Limits(int, -(2**63), 2**64 - 1, optional=True),
    "max_tokens": _Limits(int, 1, _MOST, optional=True),
    "min_tokens": _Limits(int, 0, _MOST),
    "logprobs": _Limits(int, 0, _MOST, optional=True),
    "prompt_logprobs": _Limits(int, 0, _MOST, optional=True),
}
_SWITCHES = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")


def _is_number(value: Any, kind: type) -> bool:
    """Whether ``value`` is a number of this kind; True and False are none."""
    return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = _as_tuple("stop", (stop,) if isinstance(stop, str) else stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must be a non-empty string or a list of these, got {stop!r}")
    return strings


def _token_ids(token_ids: Sequence[int] | None) -> tuple[int, ...]:
    values = _as_tuple("stop_token_ids", token_ids)
    for value in values:
        if not _is_number(value, int) or value < 0:
            raise ValueError(f"stop_token_ids must hold token ids (0 or more), got {value!r}")
    return tuple(dict.fromkeys(int(value) for value in values))


def _logit_bias(logit_bias: Mapping[int, float] | None) -> dict[int, float]:
    if logit_bias is not None and not isinstance(logit_bias, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {logit_bias!r}")
    biases = dict(logit_bias or {})
    for token_id, bias in biases.items():
        if not _is_number(token_id, int) or token_id < 0:
            raise ValueError(f"logit_bias must map token ids (0 or more), got {token_id!r}")
        # Written so that it refuses NaN too.
        if not _is_number(bias, float) or not (bias == -math.inf or -_HUGE <= bias <= _HUGE):
            raise ValueError(
                f"logit_bias of token {token_id} must be a finite number or -inf, got {bias!r}"
            )
    return {int(token_id): float(bias) for token_id, bias in biases.items()}


def _as_tuple(name: str, values: Sequence[Any] | None) -> tuple[Any, ...]:
    if values is not None and not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list, got {values!r}")
    return tuple(values or ())

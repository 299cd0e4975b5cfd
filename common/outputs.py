"""What comes back: from the model runner to the engine, and from the engine to the user.

``RequestOutput`` and ``CompletionOutput`` have the fields of vLLM's classes of the same names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.metrics import RequestMetrics


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability before any sampling option, rank (1 = likeliest) and text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


# For each position, the tokens asked about: the sampled one first, then the likeliest.
LogprobDict = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One of the ``n`` samples of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[LogprobDict] | None = None
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while it runs
    # The stop token or stop string that ended it (None for EOS), or what the error was.
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """What the engine says of one request: everything generated so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics  # of the first sample; finished_time is when the last one ended
    # Entry i is about prompt token i given those before it; the first has nothing before it: None.
    prompt_logprobs: list[LogprobDict | None] | None = None


@dataclass
class LogprobLists:
    """Log-probabilities on the host: row i holds the sampled (or prompt) token, then the top K."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    ranks: list[int]  # of the first token of each row


@dataclass
class ModelRunnerOutput:
    """One step's results, on the host: row i belongs to the i-th request that sampled."""

    token_ids: list[int]
    logprobs: LogprobLists | None = None
    # By Request.key, for requests whose prompt was computed in this step and who asked.
    prompt_logprobs: dict[str, LogprobLists] = field(default_factory=dict)

"""From logits to token ids: every sampling option, for the whole batch at once.

Each running request owns a row of small tensors that live on the device: its parameters, its seed,
how many tokens it has sampled, which tokens it has seen. A step passes logits and row indices; all
else is tensor operations on [B, V], without a loop over requests and without waiting for the
device, so that a step can be captured in a CUDA graph or launched before the last one's tokens are
known. ``add_request`` and ``remove_request`` are the only places where a request costs Python.

The options come in vLLM's order:

    logits → float32 → min_tokens, logit_bias → penalties → (greedy rows: the likeliest token)
           → temperature → min_p, top_k → top_p → exponential race

On a GPU with Triton, ``sample`` runs the kernels of `common.ops.sampling`; elsewhere the torch
operations below, which are their twin.

A row's tokens depend on nothing but the row. Every operation works on one row at a time, the noise
is a function of (seed, step, token), sums that decide something are sums of integers, and a pass
that only other rows ask for changes no bit of this one.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.logprobs import LogprobsTensors, gather_logprobs
from common.random import exponential_noise, seed_for, to_int64
from common.sampling_params import SamplingParams
from common.sampling_passes import Launches, Passes, bias_entries, float_columns
from common.sampling_rows import (
    INVALID_TOKEN,
    PADDING_ROW,
    DeviceRows,
    FloatColumn,
    IntegerColumn,
    RowTable,
    SparseBias,
    TokenCounts,
    grown,
    to_device,
)
from common.truncation import lowest_score, top_p_mask

__all__ = [
    "INVALID_TOKEN",
    "PADDING_ROW",
    "Launches",
    "LogprobsTensors",
    "Passes",
    "Sampler",
    "SamplerOutput",
    "SamplingParams",
    "gather_logprobs",
]


@dataclass
class SamplerOutput:
    """What one step sampled, on the device.

    Attributes:
        token_ids: [B] int64; ``INVALID_TOKEN`` where the logits were unusable.
        logprobs: with K the largest ``logprobs`` any request asks for; None when none does.
    """

    token_ids: Tensor
    logprobs: LogprobsTensors | None = None


class Sampler:
    """Samples the next token of every request in a batch.

    Args:
        vocab_size: V, the width of the logits.
        device: where the logits will be.
        seed: of the engine; the source of the seeds of requests that bring none.
        num_rows: requests there is room for at first; it doubles when they are more.
        kernels: ``torch``; ``fused``, which needs a CUDA device and Triton; ``auto`` takes the
            latter where it runs.

    Raises:
        ValueError: the choice of kernels is unknown or does not run here.

    Attributes:
        version: changes whenever a tensor that ``sample`` reads has moved to another address: a
            captured CUDA graph is then void. Up to date after ``upload``.
    """

    # Here and below: a tensor made in inference mode could not be written outside it any more.
    @torch.inference_mode(False)
    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        seed: int = 0,
        num_rows: int = 16,
        kernels: str = "auto",
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.version = 0
        self._fused = _choose_fused(kernels, self.device)
        self._seed = seed
        self._num_rows = num_rows
        self._free_rows = list(range(num_rows - 1, PADDING_ROW, -1))
        self._row_of: dict[str, int] = {}
        self._passes_of: dict[str, Passes] = {}
        self._passes_in_use: Counter[Passes] = Counter()
        self._passes: Passes | None = Passes()  # None: to be found out anew

        self._floats = RowTable(num_rows, len(FloatColumn), torch.float64, self.device)
        self._integers = RowTable(num_rows, len(IntegerColumn), torch.int64, self.device)
        self._num_sampled = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        self._first_steps: dict[int, int] = {}  # of rows given since the last upload
        self._bias = SparseBias(num_rows, self.device)
        self._counts: TokenCounts | None = None
        self._floats.write(PADDING_ROW, float_columns(SamplingParams(temperature=0.0)))

    @property
    def passes(self) -> Passes:
        """What the requests that have a row need together."""
        if self._passes is None:
            self._passes = Passes.union(self._passes_in_use)
        return self._passes

    @property
    def graph_key(self) -> Hashable:
        """What decides, beside shapes, which work ``sample`` launches; for a table of graphs."""
        return Launches.of(self.passes) if self._fused else self.passes

    @torch.inference_mode(False)
    def add_request(
        self,
        key: str,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        index: int = 0,
    ) -> None:
        """Give a request a row.

        Args:
            key: the request's name for ``rows`` and ``remove_request``.
            params: its options.
            prompt_token_ids: what the repetition penalty looks at, with the output.
            output_token_ids: tokens it has sampled before it was preempted, else empty. It goes
                on with the noise it would have had.
            eos_token_ids: what ``min_tokens`` forbids at first, with ``params.stop_token_ids``.
            index: which of the ``params.n`` samples this is.

        Raises:
            ValueError: the key is in use.
        """
        if key in self._row_of:
            raise ValueError(f"request {key!r} already has a row: remove it first")
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        passes = Passes.of(params, self.vocab_size)
        seed = 0  # nobody draws for a greedy request
        if passes.random:
            seed = seed_for(self._seed, key, index) if params.seed is None else params.seed + index

        self._floats.write(row, float_columns(params))
        self._integers.write(row, (passes.top_k, to_int64(seed)))
        if passes.random or passes.bias:  # only noise and min_tokens ask how many there are
            self._first_steps[row] = len(output_token_ids)
        self._bias.write(row, bias_entries(params, eos_token_ids))
        if passes.penalties:
            if self._counts is None:
                self._counts = TokenCounts(self._num_rows, self.vocab_size, self.device)
                self.version += 1
            self._counts.write(row, prompt_token_ids, output_token_ids)

        self._row_of[key] = row
        self._passes_of[key] = passes
        self._passes_in_use[passes] += 1
        if self._passes_in_use[passes] == 1:
            self._passes = None

    def remove_request(self, key: str) -> None:
        """Free a request's row, if it has one (a request that never ran has none)."""
        row = self._row_of.pop(key, None)
        if row is None:
            return
        self._free_rows.append(row)
        passes = self._passes_of.pop(key)
        self._passes_in_use[passes] -= 1
        if self._passes_in_use[passes] == 0:
            del self._passes_in_use[passes]
            self._passes = None

    def __contains__(self, key: str) -> bool:
        """Whether a request of that name has a row."""
        return key in self._row_of

    @property
    def num_rows(self) -> int:
        """Rows there is room for at present, the one for padding included."""
        return self._num_rows

    def row_of(self, key: str) -> int:
        """The row of a request that has one; it keeps it until it is removed."""
        return self._row_of[key]

    def rows(self, keys: Sequence[str]) -> Tensor:
        """Row indices [B] int64, on the device, of the requests in a batch."""
        return to_device([self._row_of[key] for key in keys], torch.int64, self.device)

    def __call__(self, logits: Tensor, keys: Sequence[str]) -> SamplerOutput:
        """Sample one token for each of ``keys`` from its row of ``logits`` [B, V].

        Raises:
            ValueError: the shape of the logits is not [number of keys, V].
        """
        if logits.shape != (len(keys), self.vocab_size):
            raise ValueError(
                f"logits must be [{len(keys)}, {self.vocab_size}] (requests, vocabulary), "
                f"got {list(logits.shape)}"
            )
        self.upload()
        return self.sample(logits, self.rows(keys))

    @torch.inference_mode(False)
    def upload(self) -> None:
        """Send the parameters of new requests to the device; ``sample`` reads them there."""
        moved = [table.send() for table in (self._floats, self._integers, self._bias)]
        self.version += any(moved)
        if self._first_steps:
            rows_and_steps = [list(self._first_steps), list(self._first_steps.values())]
            rows, steps = to_device(rows_and_steps, torch.int64, self.device)
            self._num_sampled.index_copy_(0, rows, steps)
            self._first_steps.clear()

    def sample(self, logits: Tensor, rows: Tensor) -> SamplerOutput:
        """The part of a step that runs on the device alone, after ``upload``.

        What is launched depends on ``graph_key`` and on shapes, never on values.

        Args:
            logits: [B, V], any float type; not modified.
            rows: [B] int64, no row twice except ``PADDING_ROW``.
        """
        token_ids = (self._sample_fused if self._fused else self._sample_torch)(logits, rows)
        logprobs = None
        if self.passes.num_logprobs >= 0:
            chosen = token_ids.clamp(min=0)
            logprobs = gather_logprobs(logits, chosen, self.passes.num_logprobs)
        return SamplerOutput(token_ids, logprobs)

    def _sample_fused(self, logits: Tensor, rows: Tensor) -> Tensor:
        from common.ops.sampling import sample_tokens

        launches = Launches.of(self.passes)
        state = DeviceRows(
            self._floats.tensor,
            self._integers.tensor,
            self._num_sampled,
            self._bias.tokens.tensor,
            self._bias.biases.tensor,
            self._bias.until.tensor,
            self._counts.in_prompt if self._counts else None,
            self._counts.in_output if self._counts else None,
        )
        return sample_tokens(
            logits,
            rows,
            state,
            edit=launches.edit,
            truncate=launches.truncate,
            select=launches.select,
        )

    def _sample_torch(self, logits: Tensor, rows: Tensor) -> Tensor:
        passes = self.passes
        if passes.random or passes.bias or passes.penalties:
            scores = self._edited(logits.to(torch.float32, copy=True), rows)
        else:
            scores = logits
        if passes.greedy or not passes.random:
            best, tokens = scores.max(-1)  # the first of equals
        else:
            best = scores.amax(-1)
        if passes.random:
            drawn = self._race(scores, best, rows)
            greedy_rows = self._floats.tensor[rows, FloatColumn.SCALE] == 0.0
            tokens = torch.where(greedy_rows, tokens, drawn) if passes.greedy else drawn

        self._num_sampled.index_add_(0, rows, torch.ones_like(rows))
        if passes.penalties:
            self._counts.record(rows, tokens)
        # The maximum tells all: NaN spreads to it, and it is -inf only if every logit is.
        return torch.where(best.isfinite(), tokens, INVALID_TOKEN)

    def _edited(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Logits [B, V] after the options that can change which token is the likeliest."""
        if self.passes.bias:
            self._bias.add_to_(scores, rows, self._num_sampled[rows])
        if self.passes.penalties:
            _, _, repetition, presence, frequency, _ = self._columns(rows)
            scores = self._counts.penalize(scores, rows, repetition, presence, frequency)
        return scores

    def _race(self, scores: Tensor, best: Tensor, rows: Tensor) -> Tensor:
        """Draw from the softmax of ``scores`` [B, V] as far as the rows' options leave it.

        Exponential race: with every E_i exponential, token i has the largest w_i / E_i with
        probability w_i / sum(w). The weights need no normalisation, and a token left out has 0.
        Overwrites ``scores``; ``best`` [B] is their maximum.
        """
        scale, log2_min_p, *_ = self._columns(rows)
        top_k, seeds = self._integers.tensor[rows].unbind(1)
        scores = scores.sub_(best[:, None]).mul_(scale)  # exponents of 2: 0 for the likeliest
        weights = scores.exp2()
        if self.passes.top_k or self.passes.min_p:
            lowest = lowest_score(scores, top_k[:, None], self.passes.top_k, log2_min_p)
            weights.mul_(scores.ge_(lowest))  # writes 0.0 and 1.0: faster than a boolean mask
        if self.passes.top_p:
            weights.mul_(top_p_mask(weights, self._floats.tensor[rows, FloatColumn.TOP_P, None]))
        noise = exponential_noise(seeds, self._num_sampled[rows], self.vocab_size)
        return weights.div_(noise).argmax(-1)

    def _columns(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The float parameters of ``rows``, each [B, 1] float32."""
        return self._floats.tensor[rows].float().split(1, 1)

    def _grow(self) -> None:
        old, self._num_rows = self._num_rows, 2 * self._num_rows
        self._free_rows.extend(range(self._num_rows - 1, old - 1, -1))
        for table in (self._floats, self._integers, self._bias, self._counts):
            if table is not None:
                table.grow(self._num_rows)
        self._num_sampled = grown(self._num_sampled, self._num_rows)
        self.version += 1


def _choose_fused(kernels: str, device: torch.device) -> bool:
    """Whether ``kernels`` means the fused ones on this device."""
    choices = ("auto", "torch", "fused")
    if kernels not in choices:
        raise ValueError(f"unknown sampling kernels {kernels!r}: use one of {', '.join(choices)}")
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    runs = runs and importlib.util.find_spec("triton") is not None
    if kernels == "fused" and not runs:
        raise ValueError(
            f"the fused sampling kernels need a CUDA device and Triton, not {device}: use 'torch'"
        )
    return kernels == "fused" or (kernels == "auto" and runs and device.type == "cuda")

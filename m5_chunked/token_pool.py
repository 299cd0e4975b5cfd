"""The token that was last sampled in each row of the sampler, on the device.

A step takes its tokens from here, so it can be launched before the host has seen them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.model import Transformer
from common.sampling import Sampler, SamplerOutput

from .step_inputs import StepInputs


class TokenPool:
    """One place for each of the sampler's rows; it grows with the sampler."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.tokens = torch.zeros(sampler.num_rows, dtype=torch.int64, device=sampler.device)

    def grow(self) -> None:
        """Follow the sampler, whose ``version`` tells CUDA graphs that addresses have changed."""
        num_rows, old = self._sampler.num_rows, self.tokens
        if num_rows > len(old):
            self.tokens = old.new_zeros(num_rows)
            self.tokens[: len(old)] = old

    def sample(self, model: Transformer, hidden: Tensor, inputs: StepInputs) -> SamplerOutput:
        """What follows the last tokens of a step, ``hidden`` ``[T, H]``; it is noted here.

        A step may have nothing but chunks from the middle of prompts: then nothing is sampled, and
        no kernel is asked for a result of no rows.
        """
        if not len(inputs.rows):
            return SamplerOutput(inputs.rows, None)
        logits = model.compute_logits(hidden[inputs.last])  # [samples, V]
        sampled = self._sampler.sample(logits, inputs.rows)
        self.write(inputs.rows, sampled.token_ids)
        return sampled

    def write(self, rows: Tensor, token_ids: Tensor) -> None:
        """Note what was sampled: ``rows`` and ``token_ids`` ``[B]`` int64."""
        self.tokens.index_copy_(0, rows, token_ids)

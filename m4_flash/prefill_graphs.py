"""Short prefill steps from CUDA graphs: those whose launches would take longer than their work.

Prefill steps come in more shapes than decode steps: number of tokens, of sequences, of pieces of
attention work. Each is padded up, and a shape is captured when it comes for the second time; the
first time it is launched from Python, which also compiles what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from common.sampling import Sampler, SamplerOutput

from .attention import Attention
from .cuda_graphs import StepGraphs
from .step_buffers import StepBuffers
from .step_inputs import StepArrays, StepInputs

# Longer steps keep the GPU busy while the next kernel is launched.
MAX_TOKENS = 4096
_BUFFER_BYTES = 4 << 20


def round_up(size: int) -> int:
    """To a power of two or one of three sizes between two of them, at most a quarter more."""
    if size <= 4:
        return max(size, 1)
    quarter = 1 << ((size - 1).bit_length() - 3)
    return -(-size // quarter) * quarter


class PrefillGraphs:
    """The short prefill steps of one engine.

    Args:
        run: computes and samples one step that is on the device.
    """

    def __init__(
        self,
        run: Callable[[StepInputs], SamplerOutput],
        attention: Attention,
        sampler: Sampler,
        graphs: StepGraphs,
        device: torch.device,
    ) -> None:
        self._run = run
        self._attention = attention
        self._sampler = sampler
        self._graphs = graphs
        # Arrays of the same shapes lie at the same addresses in every step, as a graph needs them.
        self._buffers = StepBuffers(_BUFFER_BYTES, device)
        self._seen: set[Hashable] = set()

    def run(self, arrays: StepArrays) -> tuple[SamplerOutput, bool]:
        """What a step of up to ``MAX_TOKENS`` tokens samples, and whether a graph computed it."""
        num_samples = len(arrays.rows)
        padded = arrays.padded(round_up(arrays.num_tokens), round_up(num_samples))
        self._buffers.begin()
        inputs = padded.upload(self._buffers.add, is_prefill=True)
        plan_key = self._attention.plan_prefill(inputs.batch, self._buffers.add, padded=True)
        self._buffers.send()
        key = (
            "prefill",
            padded.num_tokens,
            len(padded.rows),
            padded.tables.shape,
            plan_key,
            self._buffers.address,
            self._sampler.graph_key,
        )
        captured = self._graphs.get(key)
        replayed = captured is not None or key in self._seen
        if replayed:
            captured = captured or self._graphs.capture(key, lambda: self._run(inputs))
            captured.graph.replay()
            sampled = captured.sampled
        else:
            self._seen.add(key)
            sampled = self._run(inputs)
        logprobs = sampled.logprobs
        return SamplerOutput(
            sampled.token_ids[:num_samples],
            None if logprobs is None else logprobs.first(num_samples),
        ), replayed

"""Steps with chunks of prompts from CUDA graphs, where launching would take longer than computing.

They come in more shapes than decode steps: number of decodes, of other tokens, of sequences, of
pieces of attention work. Each is padded up, and a shape is captured when it comes for the second
time; the first time it is launched from Python, which also compiles what it needs.
"""

from __future__ import annotations

from collections.abc import Hashable

from common.model import Transformer
from common.sampling import Sampler, SamplerOutput

from .attention import Attention
from .cuda_graphs import StepGraphs
from .kernels.prefill_plan import round_up
from .step_buffers import StepBuffers
from .step_inputs import StepArrays, StepInputs
from .token_pool import TokenPool

# Longer steps keep the GPU busy for a while, and their shapes hardly ever come a third time.
MAX_TOKENS = 2048
_BUFFER_BYTES = 4 << 20


class MixedGraphs:
    """The steps of one engine that have chunks of prompts, and perhaps decodes."""

    def __init__(
        self,
        model: Transformer,
        attention: Attention,
        sampler: Sampler,
        pool: TokenPool,
        graphs: StepGraphs,
    ) -> None:
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._pool = pool
        self._graphs = graphs
        # Arrays of the same shapes lie at the same addresses in every step, as a graph needs them.
        self._buffers = StepBuffers(_BUFFER_BYTES, model.device)
        self._seen: set[Hashable] = set()

    def run(self, arrays: StepArrays) -> tuple[SamplerOutput, bool]:
        """What a step of up to ``MAX_TOKENS`` tokens samples, and whether a graph computed it."""
        num_samples, num_decodes = arrays.num_samples, arrays.num_decodes
        decodes, others = round_up(num_decodes), round_up(arrays.num_tokens - num_decodes)
        padded = arrays.padded(decodes, decodes + others, round_up(num_samples))
        self._buffers.begin()
        address = self._buffers.address
        inputs = padded.upload(self._buffers.add)
        plan_key = self._attention.plan_prefill(inputs.batch, self._buffers.add, padded=True)
        self._buffers.send()
        variant = None
        if num_decodes:
            mean_len = sum(arrays.seq_lens[:num_decodes]) / num_decodes
            variant = self._attention.decode_variant(mean_len)
        key = (
            "mixed",
            decodes,
            variant,
            padded.num_tokens,
            padded.num_samples,
            padded.tables.shape,
            plan_key,
            address,
            self._sampler.graph_key,
        )
        stays = address == self._buffers.address  # else the buffer has grown in between
        captured = self._graphs.get(key)
        replayed = stays and (captured is not None or key in self._seen)
        if replayed:
            captured = captured or self._graphs.capture(key, lambda: self._step(inputs, variant))
            captured.graph.replay()
            sampled = captured.sampled
        else:
            self._seen |= {key} if stays else set()
            sampled = self._step(inputs, variant)
        logprobs = sampled.logprobs
        return SamplerOutput(
            sampled.token_ids[:num_samples],
            None if logprobs is None else logprobs.first(num_samples),
        ), replayed

    def _step(self, inputs: StepInputs, variant: Hashable) -> SamplerOutput:
        if inputs.batch.num_decodes:
            self._attention.plan_decode(inputs.batch, variant)
        hidden = self._model(
            inputs.input_ids(self._pool.tokens),
            inputs.positions,
            self._attention,
            inputs.rope_lens,
        )
        return self._pool.sample(self._model, hidden, inputs)

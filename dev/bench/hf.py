"""Hugging Face transformers on the same work: the yardstick of ``--against hf``.

It gets the same weights, dtype, device and threads, and does what people do with it: ``generate``
on one left-padded batch after another, each as long as its longest output. Only tokens that were
asked for count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from dev.bench.runner import EngineSubject, Run, open_checkpoint
from dev.bench.workloads import BenchRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersSubject:
    """``generate`` of transformers, in batches of up to ``batch_size`` requests."""

    name = "hf"

    saved_bytes = 0

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, batch_size: int
    ) -> None:
        start = time.perf_counter()
        self.model_config = checkpoint.config
        self.device = device
        self.dtype = dtype
        self.max_model_len = checkpoint.config.max_model_len
        self.batch_size = batch_size
        self.model = load_transformers(checkpoint, dtype=dtype, device=device)
        self.load_s = time.perf_counter() - start

    @classmethod
    def beside(cls, engine: EngineSubject, batch_size: int) -> TransformersSubject:
        """The model of an engine, on its device and in its dtype; quantized ones dequantized."""
        config = engine.engine.config
        checkpoint = open_checkpoint(engine.name, config.model, config.seed)
        return cls(checkpoint, dtype=engine.dtype, device=engine.device, batch_size=batch_size)

    @torch.inference_mode()
    def run(self, requests: Sequence[BenchRequest], temperature: float) -> Run:
        """See ``Subject``. Batches are taken in the order of the requests, as they would arrive."""
        start = time.perf_counter()
        for first in range(0, len(requests), self.batch_size):
            self._generate(requests[first : first + self.batch_size], temperature)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Run(time.perf_counter() - start)

    def _generate(self, requests: Sequence[BenchRequest], temperature: float) -> Tensor:
        """One batch; returns ``[B, T]``: padding, prompts, and as many tokens as the longest."""
        input_ids, attention_mask = left_padded([r.prompt_token_ids for r in requests], self.device)
        sampling = {"do_sample": temperature > 0}
        if temperature > 0:
            # Written out, because generate's own default would cut to the 50 likeliest tokens.
            sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        return self.model.generate(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max(request.output_len for request in requests),
            **sampling,
        )


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts ending in the same column: ``input_ids`` and ``attention_mask``, ``[B, T]`` int64."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(input_ids, device=device), torch.tensor(mask, device=device)


def load_transformers(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """transformers' model with a checkpoint's weights, which never pass through a file.

    Its generation config knows no end token, so every output is as long as asked for.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    fields = checkpoint.config.to_dict()
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    parameters = model.state_dict()
    with torch.no_grad():
        for name, tensor in checkpoint.weights(device):
            if name in parameters:  # a tied lm_head may be in the file as well: it is the same
                parameters[name].copy_(tensor)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    return model

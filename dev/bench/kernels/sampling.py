"""Suite ``sampling``: from logits to token ids, all rows with the same options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from common.sampling import Sampler
from common.sampling_params import SamplingParams
from dev.bench.kernels.named import NamedCase
from dev.bench.kernels.setting import Setting
from dev.bench.kernels.suite import Subject
from dev.bench.kernels.timing import Call
from dev.bench.roofline import Cost


def _argmax(params: SamplingParams, logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _draw(params: SamplingParams, logits: Tensor) -> Tensor:
    """An exponential race."""
    weights = (logits.float() / params.temperature).softmax(-1)
    return weights.div_(torch.empty_like(weights).exponential_()).argmax(-1)


def _draw_from_likeliest(params: SamplingParams, logits: Tensor) -> Tensor:
    """Sort everything, cut the tail off, draw."""
    scores, token_ids = (logits.float() / params.temperature).sort(descending=True)
    scores[:, params.top_k :] = -torch.inf
    weights = scores.softmax(-1)
    weights.masked_fill_(weights.cumsum(-1) - weights >= params.top_p, 0.0)
    drawn = weights.div_(torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)
    return token_ids.gather(-1, drawn)[:, 0]


OPTIONS = {
    "greedy": (SamplingParams(temperature=0.0), _argmax),
    "temperature": (SamplingParams(temperature=0.6), _draw),
    # Qwen3's own recommendation
    "top_k_top_p": (SamplingParams(temperature=0.6, top_k=20, top_p=0.95), _draw_from_likeliest),
}
ROWS = {"cuda": (1, 64, 256), "cpu": (1, 8)}


class SamplingSuite:
    """The sampler of all milestones, plain and fused; ``textbook``: a few lines of torch."""

    name: ClassVar[str] = "sampling"
    default_cases: ClassVar[dict[str, tuple[str, ...]]] = {
        device: tuple(f"{name}:{count}" for name in OPTIONS for count in rows)
        for device, rows in ROWS.items()
    }

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def parse(self, text: str) -> NamedCase:
        return NamedCase.parse(text, tuple(OPTIONS), "B")

    def cost(self, case: NamedCase) -> Cost:
        """Every logit is read once."""
        return Cost(case.sizes[0] * self.setting.vocab_size * self.setting.dtype.itemsize, 0)

    def inputs(self, case: NamedCase) -> list[Tensor]:
        """Logits ``[B, V]``."""
        count = self.setting.copies(self.cost(case).bytes)
        shape = (case.sizes[0], self.setting.vocab_size)
        return [self.setting.random(*shape).mul_(3.0) for _ in range(count)]

    def subjects(self, case: NamedCase) -> Iterable[Subject]:
        params, textbook = OPTIONS[case.measure]
        for kernels in ("torch", "fused") if self.setting.on_gpu else ("torch",):
            yield Subject(kernels, partial(self._sampler, kernels, params))
        # It draws other random numbers, and other tokens.
        plain = partial(_calls, partial(textbook, params))
        yield Subject("textbook", plain, compared=params.is_greedy)

    def _sampler(
        self, kernels: str, params: SamplingParams, inputs: Sequence[Tensor]
    ) -> list[Call]:
        batch, setting = len(inputs[0]), self.setting
        sampler = Sampler(setting.vocab_size, setting.device, num_rows=batch + 1, kernels=kernels)
        names = [str(index) for index in range(batch)]
        for name in names:
            sampler.add_request(name, params, [], [], [])
        sampler.upload()
        rows = sampler.rows(names)
        return _calls(lambda logits: sampler.sample(logits, rows).token_ids, inputs)


def _calls(operation: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> list[Call]:
    return [partial(operation, logits) for logits in inputs]

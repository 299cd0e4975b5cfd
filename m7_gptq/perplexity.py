"""How well a model predicts a text: perplexity, the exponential of the mean loss of a token.

    text = EvaluationText.of(tokenizer, read_text("builtin", EVALUATION), context=512, stride=512)
    score = perplexity(model, text)
    score.perplexity, score.num_tokens

The text is cut into windows of `context` tokens that begin every `stride` tokens. A token is
scored once, in the first window that has it, so it sees at least ``context - stride`` tokens
before it; the first token of a window sees none and is scored only if an earlier window had it.
A smaller stride is kinder to the model and dearer. What is left at the end is not scored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.model import Transformer
from common.tokenizer import Tokenizer

_ROWS = 1024
"""Positions whose logits are in memory at a time: 200 MB in float32 for 49,152 tokens."""

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True)
class EvaluationText:
    """A text as token ids, and how it is cut; windows: int64 ``[N, context]``."""

    windows: Tensor
    context: int
    stride: int
    digest: str

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        text: str,
        *,
        context: int,
        stride: int | None = None,
        max_windows: int | None = None,
    ) -> EvaluationText:
        """Cut a text; stride None: windows lie beside each other.

        Raises ValueError where the text is shorter than one window, or the stride makes no sense.
        """
        stride = context if stride is None else stride
        if context < 2:
            raise ValueError(f"a context must have at least 2 tokens, got {context}")
        if not 1 <= stride <= context:
            raise ValueError(f"stride must lie between 1 and the context, {context}: got {stride}")
        if max_windows is not None and max_windows < 1:
            raise ValueError(f"at least 1 window is needed, asked for {max_windows}")
        tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
        if len(tokens) < context:
            raise ValueError(
                f"the text has {len(tokens)} tokens, too few for one window of {context}; give "
                "more text or a shorter context"
            )
        windows = tokens.unfold(0, context, stride)[:max_windows].contiguous()
        digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        return cls(windows, context, stride, digest)

    @property
    def num_tokens(self) -> int:
        """Tokens that are scored."""
        rest = (len(self.windows) - 1) * (self.context - self.first_scored)
        return self.context - 1 + rest

    @property
    def first_scored(self) -> int:
        """Position in every window but the first from which tokens are scored."""
        return max(1, self.context - self.stride)


@dataclass(frozen=True)
class Score:
    """loss: mean negative log-likelihood of a token, in nats."""

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.inference_mode()
def perplexity(
    model: Transformer,
    text: EvaluationText,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Score:
    """Score a text, several windows at a time.

    Raises ValueError for windows longer than the model supports, and where the model gives NaN.
    """
    if text.context > model.config.max_model_len:
        raise ValueError(
            f"the model supports {model.config.max_model_len} positions, the context has "
            f"{text.context}: shorten it"
        )
    total, done = 0.0, 0
    positions = torch.arange(text.context, device=model.device)
    for batch in text.windows.to(model.device).split(batch_size):
        lengths = torch.full_like(batch, text.context)
        hidden = model(batch, positions.expand_as(batch), causal_attention, lengths)
        losses = _losses(model, hidden[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        losses = losses.view(len(batch), -1)  # column i: the token at position i + 1
        scored = losses[:, text.first_scored - 1 :].sum()
        if done == 0:
            scored = scored + losses[0, : text.first_scored - 1].sum()
        total += scored.item()
        done += len(batch)
        if progress is not None:
            progress(done, len(text.windows))
    if not math.isfinite(total):
        raise ValueError(
            "the model gives NaN or infinity on this text: its weights are damaged, or it "
            "overflows in this dtype"
        )
    return Score(total / text.num_tokens, text.num_tokens)


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every sequence of a batch to itself; q ``[B, T, Hq, D]``, k and v ``[B, T, Hkv, D]``."""
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def _losses(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden ``[N, H]``, targets ``[N]`` -> negative log-likelihoods ``[N]`` in float64."""
    parts = [
        F.cross_entropy(model.compute_logits(rows).float(), wanted, reduction="none")
        for rows, wanted in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    ]
    return torch.cat(parts).double()

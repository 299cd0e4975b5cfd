"""Log-probabilities of chosen tokens beside those of the likeliest ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LogprobsTensors:
    """Row i: the token chosen at position i, then the K likeliest in descending order.

    Attributes:
        token_ids: [B, 1 + K] int64.
        logprobs: [B, 1 + K] float32, natural logarithms.
        ranks: [B] int64, how likely the chosen token was: 1 for the likeliest.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor

    def first(self, count: int) -> LogprobsTensors:
        """The first rows only; what a batch was padded with lies behind them."""
        return LogprobsTensors(
            self.token_ids[:count], self.logprobs[:count], self.ranks[:count]
        )

    def tolist(self) -> tuple[list[list[int]], list[list[float]], list[int]]:
        """``(token_ids, logprobs, ranks)`` as Python lists; waits for the device."""
        return self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist()


def gather_logprobs(logits: Tensor, targets: Tensor, k: int) -> LogprobsTensors:
    """Log-probabilities under the model's own logits, before any sampling option.

    Tokens with equal logits are ordered by id, and the rank counts those with larger logits only:
    the greedy token always comes first, and a row's list doesn't depend on the largest ``k`` that
    another row of the batch asked for.

    Args:
        logits: [B, V], any float type; computed in float32.
        targets: [B] int64, the tokens chosen (or, for a prompt, the ones that came).
        k: how many of the likeliest to add; 0 to V.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    targets = targets[:, None]
    ranks = (logits > logits.gather(1, targets)).sum(1) + 1
    token_ids = torch.cat([targets, _likeliest(logits, k)], 1) if k else targets
    return LogprobsTensors(token_ids, logprobs.gather(1, token_ids), ranks)


def _likeliest(logits: Tensor, k: int) -> Tensor:
    """Ids [B, k] of the largest float32 logits [B, V], the lower id first where they are equal."""
    # torch.topk leaves the order of equal values open, so make them unequal: an int64 with the
    # logit's bits above and the reversed id below. Flipping the other bits of negative floats
    # gives their bits the order of the numbers; adding 0.0 turns -0.0 into 0.0.
    bits = (logits + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    reversed_ids = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return ((bits.long() << 32) + reversed_ids).topk(k).indices

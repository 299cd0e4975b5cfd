"""``python -m m0_init.run``: look at a model, run it once, and decode the expensive way.

Without a prompt it shows the model's tables, the five likeliest next tokens of one forward pass,
and what generation without a cache costs.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from common.cli import run
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .engine import LLMEngine, causal_attention
from .inspect import show_model

_PROMPT = "The capital of France is"


def demonstrate(engine: LLMEngine, params: SamplingParams, console: Console) -> None:
    """Load, look, one forward pass, sixteen tokens."""
    show_model(engine.model_config, engine.dtype, engine.device, console)
    tokenizer = engine.tokenizer
    prompt = tokenizer.encode(_PROMPT) if tokenizer else list(range(1, 6))
    console.print(f"\nOne forward pass over [bold]{_PROMPT!r}[/bold], {len(prompt)} tokens:")
    console.print(likeliest_next(engine, prompt))

    engine.add_request("demo", prompt, SamplingParams(temperature=0.0, max_tokens=16))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    stats, generated = engine.stats(), len(outputs[-1].outputs[0].token_ids)
    needed = engine.model_config.flops(len(prompt) + generated - 1, len(prompt) + generated - 1, 0)
    needed += engine.model_config.flops(0, 0, generated)
    console.print(f"Generated: [bold]{_PROMPT}{outputs[-1].outputs[0].text}[/bold]")
    console.print(
        f"{generated} tokens took {stats['num_forward_tokens']} token computations and "
        f"{stats['flops'] / 1e9:.1f} GFLOP; computing every token once would take "
        f"{len(prompt) + generated - 1} and {needed / 1e9:.1f} GFLOP. m1 does, with a KV cache.",
        highlight=False,
    )


@torch.inference_mode()
def likeliest_next(engine: LLMEngine, token_ids: list[int], k: int = 5) -> Table:
    """The ``k`` likeliest next tokens after one forward pass."""
    input_ids = torch.tensor(token_ids, device=engine.device)
    positions = torch.arange(len(token_ids), device=engine.device)
    hidden = engine.model(input_ids, positions, causal_attention)
    probabilities = engine.model.compute_logits(hidden[-1]).float().softmax(-1)
    table = Table("rank", "token", "text", "probability")
    for rank, (p, token) in enumerate(zip(*probabilities.topk(k), strict=True), start=1):
        text = repr(engine.tokenizer.token_text(int(token))) if engine.tokenizer else ""
        table.add_row(str(rank), str(int(token)), text, f"{p:.2%}")
    return table


if __name__ == "__main__":
    run(LLMEngine, EngineConfig, demonstrate, "m0: load, look, and decode without a cache.")

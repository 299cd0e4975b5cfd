"""``python -m m1_basic.run``: prefill once, then decode token by token.

Without a prompt it answers one question and shows what each of the two phases costs.
"""

from __future__ import annotations

from rich.console import Console

from common.cli import run
from common.demo import QUESTIONS, prompt_for
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .engine import LLMEngine


def demonstrate(engine: LLMEngine, params: SamplingParams, console: Console) -> None:
    """Stream one answer, then say how long the first token took and how long the others."""
    question = QUESTIONS[2].question
    console.print(f"[bold]{question}[/bold]", highlight=False)
    engine.add_request("demo", prompt_for(engine, question), params)
    shown = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            text = output.outputs[0].text
            console.print(text[shown:], end="", markup=False, highlight=False, soft_wrap=True)
            shown = len(text)
    metrics, stats = output.metrics, engine.stats()
    console.print(
        f"\n\nPrefill: {stats['num_prompt_tokens']} tokens in one step, "
        f"{1e3 * metrics.ttft:.0f} ms to the first token.\n"
        f"Decode: one token a step, {1e3 * (metrics.tpot or 0):.0f} ms each "
        f"({stats['num_generated_tokens']} tokens, "
        f"{metrics.finished_time - metrics.arrival_time:.1f} s in all).\n"
        f"KV cache: {stats['kv_slots_used']} of {stats['kv_slots_allocated']} reserved slots used. "
        f"m2 runs several requests at once.",
        highlight=False,
    )


if __name__ == "__main__":
    run(LLMEngine, EngineConfig, demonstrate, "m1: one request at a time, with a KV cache.")

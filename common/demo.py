"""The demonstration that ``python -m mN_x.run`` shows when it is given nothing to do.

On a terminal the requests are watched live, one row each; where output goes to a file or a pipe,
finished texts are printed instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.llm import Engine
from common.outputs import RequestOutput
from common.processor import Prompt
from common.sampling_params import SamplingParams

# Draws what is special about a milestone below the table of requests.
Panel = Callable[[], RenderableType]


@dataclass(frozen=True)
class Arrival:
    """A question, the step before which it arrives, and how much may be said to it."""

    question: str
    step: int
    max_tokens: int


QUESTIONS = (
    Arrival("What is the capital of France?", 0, 40),
    Arrival("Name three animals that live in the sea.", 0, 64),
    Arrival("Explain in one sentence why the sky is blue.", 4, 48),
    Arrival("Write a short poem about the moon.", 8, 64),
    Arrival("What is 7 times 6?", 12, 32),
    Arrival("Give me a tip for learning to cook.", 20, 56),
)


def prompt_for(engine: Engine, question: str) -> Prompt:
    """A chat message where the model can chat, text where it can't, token ids where it must."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        return [ord(letter) % engine.model_config.vocab_size for letter in question]
    return [{"role": "user", "content": question}] if tokenizer.has_chat_template else question


def watch(
    engine: Engine,
    console: Console,
    arrivals: Sequence[Arrival] = QUESTIONS,
    panel: Panel | None = None,
) -> None:
    """Run requests that arrive while others are running, and show each as it goes."""
    pending = sorted(arrivals, key=lambda arrival: arrival.step)
    rows: dict[str, _Row] = {}
    num_steps, start = 0, time.perf_counter()
    live = Live(console=console, refresh_per_second=12, auto_refresh=False)
    with live if console.is_terminal else nullcontext():
        while pending or engine.has_unfinished_requests():
            idle = not engine.has_unfinished_requests()
            while pending and (idle or pending[0].step <= num_steps):
                idle = False
                arrival = pending.pop(0)
                request_id = str(len(rows))
                rows[request_id] = _Row(arrival.question, arrived=num_steps)
                params = SamplingParams(temperature=0.0, max_tokens=arrival.max_tokens)
                engine.add_request(request_id, prompt_for(engine, arrival.question), params)
            for output in engine.step():
                rows[output.request_id].take(output, num_steps)
            num_steps += 1
            if console.is_terminal:
                table = _table(rows, num_steps)
                live.update(Group(table, panel()) if panel else table, refresh=True)
    if not console.is_terminal:
        for row in rows.values():
            steps = f"[{row.arrived}-{row.left}]"
            console.print(f"{steps} {row.question}\n    {row.text}", markup=False)
    num_tokens = sum(row.num_tokens for row in rows.values())
    seconds = time.perf_counter() - start
    console.print(
        f"\n{len(rows)} requests, {num_tokens} tokens in {num_steps} steps and {seconds:.1f} s: "
        f"{num_tokens / seconds:.0f} tokens/s, {num_tokens / num_steps:.1f} tokens a step",
        highlight=False,
    )


@dataclass
class _Row:
    question: str
    arrived: int
    text: str = ""
    num_tokens: int = 0
    joined: int | None = None
    left: int | None = None

    def take(self, output: RequestOutput, step: int) -> None:
        sample = output.outputs[0]
        self.text = " ".join(sample.text.split())
        self.num_tokens = sum(len(each.token_ids) for each in output.outputs)
        self.joined = step if self.joined is None else self.joined
        self.left = step if output.finished else None


def _table(rows: dict[str, _Row], num_steps: int) -> Table:
    table = Table(expand=True, title=f"step {num_steps}", title_justify="left")
    table.add_column("request", max_width=30, no_wrap=True)
    table.add_column("steps", width=9, no_wrap=True)
    table.add_column("answer", ratio=1, no_wrap=True)
    for row in rows.values():
        state = "waits" if row.joined is None else f"{row.joined}-{row.left or ''}"
        style = "dim" if row.left is not None else ""
        # The end of a text is where it grows, so show its tail.
        tail = Text(row.text if len(row.text) < 80 else "…" + row.text[-79:], style=style)
        table.add_row(row.question, state, tail, style=style)
    return table

"""The command line of this milestone: ``python -m`` and the name of its folder, ``.run``.

Without a prompt it runs six requests that arrive while others are running, and maps the blocks
that they take as they grow and share where they are equal.
"""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType
from rich.text import Text

from common.cli import run
from common.demo import watch
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .engine import LLMEngine

_COLORS = ("cyan", "green", "yellow", "magenta", "blue", "red")
_NUM_SHOWN = 160


def demonstrate(engine: LLMEngine, params: SamplingParams, console: Console) -> None:
    """Watch the batch fill and empty, and which sequence owns which block."""
    watch(engine, console, panel=lambda: block_map(engine))
    stats = engine.stats()
    console.print(
        f"KV slots allocated and really used: {stats['kv_utilization']:.1%} "
        f"(at most {stats['kv_slots_allocated_peak']} of {stats['kv_slots_total']} allocated).",
        highlight=False,
    )


def block_map(engine: LLMEngine) -> RenderableType:
    """The first blocks of the pool, each as the number of the request that owns it."""
    scheduler = engine.scheduler
    owners: dict[int, str] = {}
    for request in scheduler.running:
        for block in scheduler.kv_cache.table(request):
            owners[block] = "+" if block in owners else request.request_id
    text = Text("blocks: ")
    for block in range(min(_NUM_SHOWN, scheduler.kv_cache.pool.num_blocks)):
        owner = owners.get(block)
        if owner is None:
            text.append("·", style="dim")
        else:
            color = _COLORS[int(owner) % len(_COLORS)] if owner.isdigit() else "white"
            text.append(owner[-1], style=f"bold {color}")
    return text


if __name__ == "__main__":
    about = (sys.modules[__package__].__doc__ or "").partition("\n")[0]
    run(LLMEngine, EngineConfig, demonstrate, about)

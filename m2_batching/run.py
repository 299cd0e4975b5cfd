"""``python -m m2_batching.run``: requests join and leave the batch at every step.

Without a prompt it runs six requests that arrive while others are running.
"""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.text import Text

from common.cli import run
from common.demo import watch
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .engine import LLMEngine


def demonstrate(engine: LLMEngine, params: SamplingParams, console: Console) -> None:
    """Watch the batch fill and empty."""

    def slots() -> RenderableType:
        cache = engine.scheduler.kv_cache
        names = " ".join(f"[{request.request_id}]" for request in cache.running)
        used = cache.num_used / cache.num_allocated if cache.num_allocated else 0.0
        return Text(f"slots: {names or 'none'}   {used:.1%} of the reserved memory in use")

    watch(engine, console, panel=slots)
    utilization = engine.stats()["kv_utilization"]
    console.print(f"KV slots reserved and really used: {utilization:.1%}. m3 pages the cache.")


if __name__ == "__main__":
    run(LLMEngine, EngineConfig, demonstrate, "m2: continuous batching over slots of a KV cache.")

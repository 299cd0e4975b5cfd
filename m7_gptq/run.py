"""The command line of this milestone: ``python -m`` and the name of its folder, ``.run``.

Without a prompt it runs six requests that arrive while others are running, and maps the blocks
that they take as they grow and share where they are equal. Then it says what the linear layers'
weights take: as they are, and in 4 bits.
"""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType
from rich.text import Text

from common.cli import run
from common.demo import watch
from common.sampling_params import SamplingParams

from .checkpoint_format import StoredConfig
from .checkpoint_load import stored_bytes
from .checkpoint_save import projections
from .config import EngineConfig
from .engine import LLMEngine
from .random_checkpoint import fitting_group_size

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
    console.print(describe_weights(engine), highlight=False, soft_wrap=True)


def describe_weights(engine: LLMEngine) -> str:
    """What the linear layers take, and how to make them smaller if they are not quantized yet."""
    sizes, dtype = engine.stats()["linear_bytes"], str(engine.dtype).removeprefix("torch.")
    if sizes:
        return (
            f"Linear layers: {_megabytes(sizes['stored'])} in the checkpoint, "
            f"{_megabytes(sizes['memory'])} in memory; in {dtype} they take "
            f"{_megabytes(sizes['full'])}."
        )
    shapes = projections(engine.model_config).values()
    stored = StoredConfig(bits=4, group_size=fitting_group_size(engine.model_config))
    full = sum(outputs * inputs * engine.dtype.itemsize for outputs, inputs in shapes)
    return (
        f"Linear layers: {_megabytes(full)} in {dtype}. In 4 bits they would take "
        f"{_megabytes(sum(stored_bytes(stored, *shape) for shape in shapes))} in groups of "
        f"{stored.group_size}:\n"
        f"    python -m m7_gptq.quantize --model {engine.config.model} --bits 4 "
        f"--group-size {stored.group_size} --output FOLDER\n"
        f"    python -m m7_gptq.run --model FOLDER"
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


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

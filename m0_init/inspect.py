"""A model at a glance: its architecture, where its parameters are, what its cache would take."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from common.config import ModelConfig
from common.memory import available_bytes


def show_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, out: Console) -> None:
    """Print the tables a newcomer to a model asks for first."""
    out.print(_architecture(config))
    out.print(_parameters(config, dtype))
    out.print(_memory(config, dtype, device), highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _architecture(config: ModelConfig) -> Table:
    table = _table(config.architecture, "what", "symbol", "value")
    rows = (
        ("vocabulary", "V", config.vocab_size),
        ("hidden size", "H", config.hidden_size),
        ("MLP size", "I", config.intermediate_size),
        ("layers", "L", config.num_layers),
        ("query heads", "Hq", config.num_heads),
        ("key/value heads", "Hkv", config.num_kv_heads),
        ("head size", "D", config.head_dim),
        ("longest sequence", "S", config.max_model_len),
    )
    for what, symbol, value in rows:
        table.add_row(what, symbol, f"{value:,}")
    table.add_row("rope", "", f"{config.rope.rope_type}, theta {config.rope.theta:g}")
    table.add_row("tied embeddings", "", "yes" if config.tie_word_embeddings else "no")
    return table


def _parameters(config: ModelConfig, dtype: torch.dtype) -> Table:
    parts = config.num_parameters()
    total = sum(parts.values())
    sizes = {"float32": 4, "bfloat16": 2, "4-bit": 0.5}
    table = _table("Parameters", "part", "count", "share", *(f"{name} MB" for name in sizes))
    for name, count in (*parts.items(), ("total", total)):
        megabytes = (f"{count * size / 1e6:,.1f}" for size in sizes.values())
        table.add_row(name, f"{count:,}", f"{count / total:.1%}", *megabytes)
    return table


def _memory(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    per_token = config.kv_bytes_per_token(dtype.itemsize)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    return (
        f"KV cache: 2 x {config.num_layers} layers x {config.num_kv_heads} heads x "
        f"{config.head_dim} x {dtype.itemsize} bytes = {per_token:,} bytes a token; "
        f"{free // per_token:,} tokens fit into the {free / 2**30:.1f} GiB free on {device}."
    )

"""Opens models, quantized or not, and loads them with linear layers to match.

    checkpoint = open_checkpoint("folder-of-gptq-weights")
    model = load_model(checkpoint, dtype=torch.bfloat16, device="cuda", weight_form="auto")

Quantized weights are kept in one of two forms. "packed": as integers (`m7_gptq.quant_linear`), for
which there are kernels where weights have 4 bits, activations 16, and the device is a GPU.
"dequantized": as a plain `common.layers.Linear`, which takes the memory of full precision and is
as fast. "auto" takes the packed form where the kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from common.checkpoint import Checkpoint, FolderCheckpoint, model_folder
from common.checkpoint import load_model as load_dense
from common.checkpoint import open_checkpoint as open_dense
from common.layers import Linear, LinearModule, Ops
from common.model import Transformer
from common.presets import PREFIX

from .act_order import reorder_mlp
from .checkpoint_format import PARTS, QuantizedCheckpoint, StoredConfig, is_quantized
from .checkpoint_save import projections
from .packed_product import ProductMaker, fits_int4, has_kernels
from .packing import PackedLinear
from .quant_linear import QuantLinear
from .random_checkpoint import RandomQuantizedCheckpoint, is_random_quantized

WEIGHT_FORMS = ("auto", "packed", "dequantized")

Quantized = QuantizedCheckpoint | RandomQuantizedCheckpoint

_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Projections of a checkpoint that the model holds in one module."""


def open_checkpoint(model: str, *, seed: int = 0) -> Checkpoint:
    """As `common.checkpoint.open_checkpoint`; GPTQ weights are found in any folder or hub id.

    model: also "random:qwen3-8b-gptq" and the like (`m7_gptq.random_checkpoint`).

    Raises ValueError as that does, and for weights that are quantized by another method.
    """
    if is_random_quantized(model):
        return RandomQuantizedCheckpoint(model, seed)
    if model.startswith(PREFIX):
        return open_dense(model, seed=seed)
    folder = model_folder(model)
    is_ours = is_quantized(folder)
    return QuantizedCheckpoint(model, folder) if is_ours else FolderCheckpoint(model, folder)


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int | None = None,
    ops: Ops | None = None,
    weight_form: str = "auto",
) -> Transformer:
    """The model with its weights, the linear layers in the form asked for.

    A module whose projections are not all quantized is dequantized in any case. Raises ValueError
    for damaged weights, and for full precision of which the packed form is asked.
    """
    if not isinstance(checkpoint, Quantized):
        if weight_form == "packed":
            raise ValueError(
                f"{checkpoint.name} is not quantized, so there is nothing to keep packed: leave "
                "weight_form at auto, or quantize the model (python -m m7_gptq.quantize)"
            )
        return load_dense(
            checkpoint, dtype=dtype, device=device, max_positions=max_positions, ops=ops
        )
    factory = _LinearFactory(checkpoint, weight_form)
    model = Transformer(
        checkpoint.config,
        dtype=dtype,
        device=device,
        max_positions=max_positions,
        ops=ops,
        linear=factory,
    )
    model.load_weights(factory.weights(device))
    return model


class _LinearFactory:
    """Decides of every linear layer whether it stays packed, and gives the weights to match."""

    def __init__(self, checkpoint: Quantized, weight_form: str) -> None:
        self.checkpoint = checkpoint
        self.weight_form = weight_form
        self._quantized = set(checkpoint.linears)
        self.packed: set[str] = set()  # names of projections
        self._make_product = ProductMaker()

    def __call__(
        self,
        in_features: int,
        shard_sizes: Sequence[int],
        bias: bool,
        *,
        name: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> LinearModule:
        shards = shard_names(name)
        make = Linear
        if self._stays_packed(shards, in_features, torch.device(device), dtype):
            self.packed.update(shards)
            stored = self.checkpoint.quantization
            make = partial(
                QuantLinear,
                bits=stored.bits,
                checkpoint_format=stored.checkpoint_format,
                make_product=self._make_product,
            )
        return make(in_features, shard_sizes, bias, name=name, dtype=dtype, device=device)

    def _stays_packed(
        self, shards: Sequence[str], in_features: int, device: torch.device, dtype: torch.dtype
    ) -> bool:
        if self.weight_form == "dequantized" or not set(shards) <= self._quantized:
            return False
        stored = self.checkpoint.quantization
        return self.weight_form == "packed" or (
            has_kernels(device, dtype) and fits_int4(stored.bits, in_features, stored.group_size)
        )

    def weights(self, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor): what stays packed by its parts, the rest as `.weight`."""
        for name, tensor in self.checkpoint.others(device):
            if name.removesuffix(".bias") not in self.packed:  # those bring their own
                yield name, tensor
        for name, linear in self._linears(device):
            if name not in self.packed:
                yield f"{name}.weight", linear.dequantize()
                continue
            parts = PARTS if linear.bias is None else (*PARTS, "bias")
            yield from ((f"{name}.{part}", getattr(linear, part)) for part in parts)

    def _linears(self, device: torch.device | str) -> Iterator[tuple[str, PackedLinear]]:
        """Yield each projection by its name; those of an MLP that stays packed as one."""
        for name in self.checkpoint.linears:
            prefix, _, last = name.rpartition(".")
            mlp = [f"{prefix}.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
            if not self.packed.issuperset(mlp):
                yield name, self.checkpoint.linear(name, device)
            elif last == "down_proj":
                linears = (self.checkpoint.linear(part, device) for part in mlp)
                yield from zip(mlp, reorder_mlp(*linears), strict=True)


def shard_names(name: str) -> tuple[str, ...]:
    """The projections of a module: "model.layers.0.mlp.gate_up_proj" holds gate_proj and up_proj.

    All by their full names, as a checkpoint has them.
    """
    prefix, _, last = name.rpartition(".")
    return tuple(f"{prefix}.{shard}" for shard in _JOINED.get(last, (last,)))


def linear_bytes(checkpoint: Checkpoint, model: Transformer) -> dict[str, int]:
    """What the weights of a quantized model's layers take; see `common.metrics.EngineStats`."""
    if not isinstance(checkpoint, Quantized):
        return {}
    quantized, plain = set(checkpoint.linears), checkpoint.weight_specs()
    stored = full = memory = 0
    for name, (outputs, inputs) in projections(checkpoint.config).items():
        full += outputs * inputs * model.dtype.itemsize
        if name in quantized:
            stored += stored_bytes(checkpoint.quantization, outputs, inputs)
        else:
            stored += outputs * inputs * plain[f"{name}.weight"][0].itemsize
    for layer in model.layers:
        for module in {module for _, module, _ in layer.shards()}:
            if isinstance(module, QuantLinear):
                memory += module.num_bytes
            else:
                memory += module.weight.numel() * module.weight.dtype.itemsize
    return {"stored": stored, "memory": memory, "full": full}


def stored_bytes(stored: StoredConfig, outputs: int, inputs: int) -> int:
    """Bytes of a projection's weight: codes, zero points and scales.

    The order of inputs (g_idx) is left out: only loading looks at it.
    """
    specs = stored.specs(outputs, inputs)
    return sum(
        specs[part][0].itemsize * math.prod(specs[part][1])
        for part in ("qweight", "qzeros", "scales")
    )

"""Quantized models of random weights, to test and measure with: "random:qwen3-8b-gptq"."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.checkpoint import RandomCheckpoint
from common.config import ModelConfig
from common.presets import PREFIX, random_generator, random_weights, weight_shapes
from common.safetensors_file import TensorSpec

from .checkpoint_format import StoredConfig
from .checkpoint_save import projections
from .packing import PackedLinear

PLAIN, ACT_ORDER = "-gptq", "-gptq-act-order"

_BITS = 4
_GROUP_SIZES = (128, 64, 32)
_SPREAD = 4.64
"""Root mean square of q - 8 over q from 0 to 15; a scale is that much less than its weights."""


class RandomQuantizedCheckpoint(RandomCheckpoint):
    """A preset's shape in 4 bits: codes drawn from a seed, scales that give the usual spread.

    Groups are of 128 inputs, or of the largest smaller size that divides all layers. With
    act-order, each layer's inputs are in groups at random, the same for projections that share
    their input. Parts that are not quantized are those of the preset without the suffix.
    """

    def __init__(self, name: str, seed: int) -> None:
        """name: "random:", a preset, and "-gptq" or "-gptq-act-order"."""
        suffix = ACT_ORDER if name.endswith(ACT_ORDER) else PLAIN
        super().__init__(name.removesuffix(suffix), seed)
        self.name = name
        self.shapes = weight_shapes(self.config)
        self.linears = tuple(projections(self.config))
        self.quantization = StoredConfig(
            _BITS, fitting_group_size(self.config), desc_act=suffix == ACT_ORDER
        )

    def linear(self, name: str, device: torch.device | str = "cpu") -> PackedLinear:
        """The tensors of one projection; see `QuantizedCheckpoint.linear`."""
        outputs, inputs = self.shapes[f"{name}.weight"]
        parts: dict[str, Tensor] = {}
        generator = random_generator(self.config, self.seed, f"{name}.qweight", device)
        for part, (dtype, shape) in self.quantization.specs(outputs, inputs).items():
            parts[part] = torch.empty(shape, dtype=dtype, device=generator.device)
        parts["qweight"].random_(-(2**31), 2**31, generator=generator)
        parts["qzeros"].fill_(0x77777777)
        parts["scales"].fill_(inputs**-0.5 / _SPREAD)
        parts["g_idx"].copy_(self._g_idx(name, inputs))
        parts = {part: tensor.to(device) for part, tensor in parts.items()}
        bias = f"{name}.bias"
        found = dict(random_weights(self.config, self.seed, device, {bias}))
        return PackedLinear(_BITS, bias=found.get(bias), **parts)

    def others(self, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of what is not quantized."""
        quantized = {f"{name}.weight" for name in self.linears}
        return random_weights(self.config, self.seed, device, self.shapes.keys() - quantized)

    def weights(self, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        yield from self.others(device)
        for name in self.linears:
            yield f"{name}.weight", self.linear(name, device).dequantize()

    def weight_specs(self) -> dict[str, TensorSpec]:
        specs = super().weight_specs()
        for name in self.linears:
            specs[f"{name}.weight"] = (torch.float32, self.shapes[f"{name}.weight"])
        return specs

    def _g_idx(self, name: str, inputs: int) -> Tensor:
        ordered = torch.arange(inputs, dtype=torch.int32) // self.quantization.group_size
        if not self.quantization.desc_act:
            return ordered
        # q, k and v have the same inputs, and so have gate and up: named by the layer and width.
        shared_name = f"{name.rpartition('.')[0]}.{inputs}"
        generator = random_generator(self.config, self.seed, shared_name, "cpu")
        return ordered[torch.randperm(inputs, generator=generator)]


def is_random_quantized(model: str) -> bool:
    """Whether a model's name asks for a `RandomQuantizedCheckpoint`."""
    return model.startswith(PREFIX) and model.endswith((PLAIN, ACT_ORDER))


def fitting_group_size(config: ModelConfig) -> int:
    """128, or the largest usual size that parts every layer's inputs into groups; -1 if none."""
    inputs = {shape[1] for shape in projections(config).values()}
    fitting = (size for size in _GROUP_SIZES if all(n > size and n % size == 0 for n in inputs))
    return next(fitting, -1)

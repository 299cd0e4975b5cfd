"""Quantize a model layer by layer; only one decoder layer's weights are in memory at a time.

    quantize_model(open_checkpoint("Qwen/Qwen3-0.6B"), samples, QuantizeConfig(), Path("out"))

The calibration text runs through the model once. At every layer its activations wait in front of
the next projection; their Hessian is taken, the projection is quantized, and they go on through
what it has become, so later projections learn to make up for earlier ones (true-sequential order).

Finished layers are kept beside the output until all are done. A run that was interrupted goes on
behind them if started again with the same settings, and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import Checkpoint, FolderCheckpoint
from common.layers import Linear, Ops, copy_checked
from common.model import DecoderLayer
from common.rope import RotaryEmbedding
from common.safetensors_file import read_tensors, tensor_names, write_tensors

from .checkpoint_format import PARTS, StoredConfig
from .checkpoint_save import projections, refuse_existing, save_quantized
from .gptq import Hessian, QuantizeConfig, objective, quantize, round_to_nearest
from .packing import PackedLinear, pack_linear, words
from .perplexity import causal_attention

GPTQ, NEAREST = "gptq", "nearest"
STAGES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


@dataclass(frozen=True)
class StageError:
    """What quantizing one (packed) projection cost, by the mean squares of its outputs, summed.

    output: of the outputs themselves; ours, nearest: of their errors by GPTQ and by rounding to
    nearest; damping: the damp_percent that was used in the end.
    """

    name: str
    output: float
    ours: float
    nearest: float
    damping: float


def quantize_model(
    source: Checkpoint,
    samples: Tensor,
    config: QuantizeConfig,
    output: Path,
    *,
    method: str = GPTQ,
    checkpoint_format: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[StageError]:
    """Write a quantized checkpoint to the folder `output`; returns the errors by projection.

    samples: int64 ``[N, T]``, the calibration text; dtype: what activations are computed in;
    method: "gptq", or "nearest" for the baseline, which looks at no activations.

    Raises:
        ValueError: settings that do not fit the model, an output that exists, NaN in activations.
    """
    if method not in (GPTQ, NEAREST):
        raise ValueError(f"method must be {GPTQ!r} or {NEAREST!r}, got {method!r}")
    refuse_existing(output)
    check_fits(source, config)
    if samples.numel() and not 0 <= int(samples.min()) <= int(samples.max()) < (
        source.config.vocab_size
    ):
        raise ValueError("samples hold token ids that the model does not have")
    stored = StoredConfig.of(config, checkpoint_format)
    settings = [source.name, str(dtype), method, asdict(config), stored.to_dict(), batch_size]
    if isinstance(source, FolderCheckpoint):  # another model may have come under the same name
        states = {file.name: file.stat() for file in source.files}
        settings += [(name, state.st_size, state.st_mtime_ns) for name, state in states.items()]
    norm = _tensor(source, "model.norm.weight")  # tells random weights of other seeds apart
    finished = _FinishedLayers(output, settings, [samples, norm.float()], stored)
    run = _Run(source, samples, config, method, dtype, torch.device(device), batch_size)
    total = source.config.num_layers
    errors: list[StageError] = []
    for index in range(total):
        layer = run.load_layer(index)
        if index in finished:
            packed, layer_errors = finished.read(index)
            run.put_back(layer, packed)
            run.pass_through(layer)
        else:
            packed, layer_errors = run.quantize_layer(layer, stored)
            finished.write(index, packed, layer_errors)
        errors += layer_errors
        if progress is not None:
            progress(index + 1, total)
    save_quantized(output, source, stored, finished.linear)
    shutil.rmtree(finished.folder)
    return errors


def check_fits(source: Checkpoint, config: QuantizeConfig) -> None:
    """ValueError for a model that is quantized already, or whose layers these settings don't fit.

    The message names the group sizes that divide every layer.
    """
    if hasattr(source, "quantization"):
        raise ValueError(f"{source.name} is quantized already; name the model it was made from")
    shapes = projections(source.config)
    common = gcd(*(inputs for _, inputs in shapes.values()))
    for name, (outputs, inputs) in shapes.items():
        size = config.group_size
        if size != -1 and inputs % size:
            fitting = [n for n in range(8, common + 1) if common % n == 0]
            near = max((n for n in fitting if n < size), default=-1)
            raise ValueError(
                f"group_size {size} does not divide the {inputs} inputs of {name}; sizes that "
                f"divide every layer of this model: {', '.join(map(str, fitting))} or -1 (one "
                f"group for all inputs); the next smaller one is {near}"
            )
        words(inputs, config.bits, f"in_features of {name}")
        words(outputs, config.bits, f"out_features of {name}")


class _Run:
    """The calibration text on its way through the model."""

    def __init__(
        self,
        source: Checkpoint,
        samples: Tensor,
        config: QuantizeConfig,
        method: str,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.source, self.model, self.config, self.method = source, source.config, config, method
        self.dtype, self.device = dtype, device
        self.ops = Ops()
        self.hidden: list[Tensor] = []  # [B, T, H] of each batch, in front of the current layer
        if method == NEAREST:
            return
        length = samples.shape[1]
        rope = RotaryEmbedding(self.model, max_positions=length, dtype=dtype, device=device)
        positions = torch.arange(length, device=device)
        self.cos, self.sin = rope(positions, torch.full_like(positions, length))
        embedding = _tensor(source, "model.embed_tokens.weight")
        for batch in samples.split(batch_size):
            self.hidden.append(F.embedding(batch, embedding).to(device, dtype))

    def load_layer(self, index: int) -> DecoderLayer:
        layer = DecoderLayer(self.model, index, Linear, dtype=self.dtype, device=self.device)
        prefix = f"model.layers.{index}."
        places = {name: (copy_checked, (target,)) for name, target in layer.norms()}
        for name, module, shard in layer.shards():
            for kind in module.kinds:
                places[f"{name}.{kind}"] = (module.load_shard, (kind, shard))
        for name, tensor in _tensors(self.source, lambda name: name.startswith(prefix)):
            if place := places.pop(name.removeprefix(prefix), None):
                load, arguments = place
                load(*arguments, tensor)
        if places:
            raise ValueError(f"weights: {prefix}{min(places)} is missing")
        return layer

    def quantize_layer(
        self, layer: DecoderLayer, stored: StoredConfig
    ) -> tuple[dict[str, PackedLinear], list[StageError]]:
        """Exchange the layer's weights for what they are once quantized; returns them packed."""
        packed: dict[str, PackedLinear] = {}
        errors = []
        for stage, hessian in self.hessians(layer):
            module = getattr(layer, stage)
            weight = module.weight
            if hessian is None:
                quantized = round_to_nearest(weight, self.config, module.name)
            else:
                quantized = quantize(weight, hessian, self.config, module.name)
                nearest = round_to_nearest(weight, self.config, module.name)
                squares = (
                    objective(weight, found, hessian).sum().item()
                    for found in (None, quantized, nearest)
                )
                errors.append(StageError(module.name, *squares, quantized.damping))
            start = 0
            for name, holder, shard in layer.shards():
                if holder is module:
                    rows = quantized.rows(start, start + module.shard_sizes[shard])
                    start += module.shard_sizes[shard]
                    packed[name] = pack_linear(
                        rows.codes.cpu(),
                        rows.zeros.cpu(),
                        rows.scales.cpu(),
                        rows.g_idx.cpu(),
                        bits=stored.bits,
                        checkpoint_format=stored.checkpoint_format,
                    )
            weight.copy_(quantized.dequantize())
        return packed, errors

    def hessians(self, layer: DecoderLayer) -> Iterator[tuple[str, Tensor | None]]:
        """Yield each stage and the Hessian of its inputs; then the text is past the layer.

        The stage's weight must be exchanged before the next one is asked for.
        """
        if self.method == NEAREST:
            yield from ((stage, None) for stage in STAGES)
            return
        waiting = [self._forward(layer, hidden) for hidden in self.hidden]
        if self.config.true_sequential:
            for stage in STAGES:
                yield stage, self._gather(layer, stage, waiting)
            self.hidden = [next(batch) for batch in waiting]
        else:  # all of them see the weights as they were; the next layer sees the new ones
            hessians = [self._gather(layer, stage, waiting) for stage in STAGES]
            yield from zip(STAGES, hessians, strict=True)
            self.pass_through(layer)

    def _gather(self, layer: DecoderLayer, stage: str, waiting: list[Iterator[Tensor]]) -> Tensor:
        module = getattr(layer, stage)
        hessian = Hessian(module.weight.shape[1], device=self.device, name=module.name)
        for batch in waiting:
            hessian.add(next(batch))
        return hessian.matrix

    def pass_through(self, layer: DecoderLayer) -> None:
        """Bring the text in front of the next layer, through this one's weights as they are."""
        for index, hidden in enumerate(self.hidden):
            *_, self.hidden[index] = self._forward(layer, hidden)

    def _forward(self, layer: DecoderLayer, hidden: Tensor) -> Iterator[Tensor]:
        """Stop in front of every stage and yield its input; at last, yield the layer's output.

        hidden: ``[B, T, H]``. As in `Transformer.forward`, whose x + residual is `hidden` here.
        """
        model, ops, eps = self.model, self.ops, self.model.rms_norm_eps
        heads, kv_heads = model.num_heads, model.num_kv_heads
        x = ops.rms_norm(hidden, layer.input_norm, eps)
        yield x
        x = layer.qkv_proj(x).view(*x.shape[:-1], heads + 2 * kv_heads, model.head_dim)
        q, k, v = x.split((heads, kv_heads, kv_heads), dim=-2)
        x = ops.attention(
            causal_attention, 0, q, k, v, layer.q_norm, layer.k_norm, eps, self.cos, self.sin
        ).flatten(-2)
        yield x
        x, hidden = ops.add_rms_norm(layer.o_proj(x), hidden, layer.post_attention_norm, eps)
        yield x
        x = ops.silu_mul(layer.gate_up_proj(x))
        yield x
        yield hidden + layer.down_proj(x)

    def put_back(self, layer: DecoderLayer, packed: dict[str, PackedLinear]) -> None:
        """Give a layer the weights that an earlier run has quantized."""
        for name, module, shard in layer.shards():
            module.load_shard("weight", shard, packed[name].dequantize())


class _FinishedLayers:
    """What is quantized already, in a folder beside the output whose name stands for the run."""

    def __init__(
        self, output: Path, settings: list[object], data: list[Tensor], stored: StoredConfig
    ) -> None:
        digest = hashlib.sha256(json.dumps(settings).encode())
        for tensor in data:
            digest.update(tensor.contiguous().numpy().tobytes())
        self.folder = output.parent / f".{output.name}-{digest.hexdigest()[:12]}.unfinished"
        self.stored = stored

    def __contains__(self, index: int) -> bool:
        return self._file(index).is_file()

    def write(self, index: int, packed: dict[str, PackedLinear], errors: list[StageError]) -> None:
        tensors = {
            f"{name}.{part}": getattr(linear, part)
            for name, linear in packed.items()
            for part in PARTS
        }
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps([asdict(error) for error in errors])
        self._file(index).with_suffix(".json").write_text(content, encoding="utf-8")
        growing = self._file(index).with_suffix(".growing")
        write_tensors(growing, specs, tensors.items())
        growing.replace(self._file(index))

    def read(self, index: int) -> tuple[dict[str, PackedLinear], list[StageError]]:
        names = {name.rpartition(".")[0] for name in tensor_names(self._file(index))}
        errors = json.loads(self._file(index).with_suffix(".json").read_text(encoding="utf-8"))
        return {name: self._linear(index, name) for name in names}, [
            StageError(**error) for error in errors
        ]

    def linear(self, name: str) -> PackedLinear:
        """The projection of a name as checkpoints have it: "model.layers.3.mlp.up_proj"."""
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        return self._linear(int(index), rest)

    def _linear(self, index: int, name: str) -> PackedLinear:
        full = [f"{name}.{part}" for part in PARTS]
        parts = dict(read_tensors(self._file(index), "cpu", full))
        return PackedLinear(
            bits=self.stored.bits,
            checkpoint_format=self.stored.checkpoint_format,
            **{part: parts[f"{name}.{part}"] for part in PARTS},
        )

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05}.safetensors"


def _tensors(source: Checkpoint, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Those tensors of a model whose names are wanted; of a folder, no others are read."""
    if not isinstance(source, FolderCheckpoint):
        yield from ((name, tensor) for name, tensor in source.weights("cpu") if wanted(name))
        return
    for file, names in source.files.items():
        yield from read_tensors(file, "cpu", filter(wanted, names or tensor_names(file)))


def _tensor(source: Checkpoint, wanted: str) -> Tensor:
    for _, tensor in _tensors(source, lambda name: name == wanted):
        return tensor
    raise ValueError(f"weights: {wanted} is missing")

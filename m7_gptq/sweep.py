"""Quantize a model in many ways, score each, keep none.

    points = grid(["nearest", "gptq"], bits=[3, 4], group_sizes=[32, 64], base=QuantizeConfig())
    for row in sweep(source, points, samples, texts, ...): ...

Every point is judged on the same texts as the model in full precision, which comes first.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.safetensors_file import DTYPE_NAMES

from .checkpoint_format import QuantizedCheckpoint
from .checkpoint_load import load_model, stored_bytes
from .checkpoint_save import projections
from .gptq import QuantizeConfig
from .perplexity import EvaluationText, perplexity
from .quantize_model import GPTQ, NEAREST, StageError, check_fits, quantize_model
from .with_gptqmodel import GROUP_SIZES, is_installed, quantize_with_gptqmodel

GPTQMODEL = "gptqmodel"
METHODS = (NEAREST, GPTQ, GPTQMODEL)

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One way to quantize; calibration: the name of the text that it looks at."""

    method: str
    config: QuantizeConfig
    calibration: str

    @property
    def name(self) -> str:
        size = "all" if self.config.group_size == -1 else self.config.group_size
        return f"{self.method} {self.config.bits} bits, groups of {size}"


@dataclass(frozen=True)
class Compute:
    """What models are run on and in; dtype: of activations and of dequantized weights."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int = 8


def grid(
    methods: Sequence[str],
    bits: Sequence[int],
    group_sizes: Sequence[int],
    base: QuantizeConfig,
    calibrations: Sequence[str],
) -> list[Point]:
    """All combinations, without those that gptqmodel cannot do.

    Raises ValueError for an unknown method, or gptqmodel where it is not installed.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: use {', '.join(METHODS)}")
    if GPTQMODEL in methods and not is_installed():
        raise ValueError("gptqmodel is not installed: pip install gptqmodel, or leave it out")
    points = []
    for width, size, method in itertools.product(bits, group_sizes, methods):
        if method == GPTQMODEL and size not in GROUP_SIZES:
            continue
        config = replace(base, bits=width, group_size=size)
        # Rounding looks at no text.
        for calibration in calibrations if method != NEAREST else ["–"]:
            points.append(Point(method, config, calibration))
    return points


def sweep(
    source: Checkpoint,
    points: Sequence[Point],
    samples: Mapping[str, Tensor],
    texts: Mapping[str, EvaluationText],
    compute: Compute,
    say: Say,
) -> Iterator[Row]:
    """Yield a row for the model as it is and each point, and for each text.

    samples: calibration windows by name. Raises ValueError before any work for a point that does
    not fit the model.
    """
    for point in points:
        check_fits(source, point.config)
    yield from score(source, texts, compute, say, {"name": "full precision"})
    with tempfile.TemporaryDirectory(prefix="gptq-sweep-") as scratch:
        for index, point in enumerate(points):
            say(f"{point.name}: quantizing ({index + 1} of {len(points)})")
            output = Path(scratch) / str(index)
            start = time.perf_counter()
            errors = _quantize(source, point, samples, output, compute, Path(scratch))
            about = {
                "name": point.name,
                "method": point.method,
                "calibration": point.calibration,
                "quantize_s": time.perf_counter() - start,
                **error_summary(errors),
            }
            yield from score(QuantizedCheckpoint(point.name, output), texts, compute, say, about)
            for file in output.iterdir():  # room for the next one
                file.unlink()


def score(
    checkpoint: Checkpoint,
    texts: Mapping[str, EvaluationText],
    compute: Compute,
    say: Say,
    about: Row,
) -> Iterator[Row]:
    """Yield a row for each text: what the checkpoint is, and how well it does."""
    model = load_model(
        checkpoint, dtype=compute.dtype, device=compute.device, weight_form="dequantized"
    )
    for name, text in texts.items():
        say(f"{about['name']}: scoring {len(text.windows)} windows of {name}")
        start = time.perf_counter()
        found = perplexity(model, text, batch_size=compute.batch_size)
        yield {
            **about,
            **describe(checkpoint),
            "text": name,
            "perplexity": found.perplexity,
            "loss": found.loss,
            "num_tokens": found.num_tokens,
            "evaluate_s": time.perf_counter() - start,
        }


def describe(checkpoint: Checkpoint) -> Row:
    """Format and size of the linear layers of the decoder."""
    shapes = projections(checkpoint.config)
    weights = sum(outputs * inputs for outputs, inputs in shapes.values())
    stored = getattr(checkpoint, "quantization", None)
    if stored is None:
        specs = checkpoint.weight_specs()
        dtypes = {specs[f"{name}.weight"][0] for name in shapes}
        size = sum(
            specs[f"{name}.weight"][0].itemsize * outputs * inputs
            for name, (outputs, inputs) in shapes.items()
        )
        about: Row = {"stored_as": ", ".join(sorted(DTYPE_NAMES[dtype] for dtype in dtypes))}
    else:
        size = sum(stored_bytes(stored, *shape) for shape in shapes.values())
        about = {
            "stored_as": stored.checkpoint_format,
            "bits": stored.bits,
            "group_size": stored.group_size,
            "sym": stored.sym,
            "desc_act": stored.desc_act,
            "quantizer": ", ".join(stored.meta.get("quantizer", [])),
        }
    return {**about, "linear_bytes": size, "bits_per_weight": 8 * size / weights}


def error_summary(errors: Sequence[StageError]) -> Row:
    """The layers' own objective, by GPTQ over by rounding: at most 1, or something is wrong."""
    if not errors:
        return {}
    ratios = [error.ours / error.nearest if error.nearest else 1.0 for error in errors]
    return {
        "error_ratio_median": statistics.median(ratios),
        "error_ratio_worst": max(ratios),
        "damping_worst": max(error.damping for error in errors),
    }


def _quantize(
    source: Checkpoint,
    point: Point,
    samples: Mapping[str, Tensor],
    output: Path,
    compute: Compute,
    scratch: Path,
) -> list[StageError]:
    if point.method == GPTQMODEL:
        folder = scratch / "full-precision"
        if not folder.is_dir():
            source.save(folder)
        quantize_with_gptqmodel(
            folder,
            samples[point.calibration],
            point.config,
            output,
            device=compute.device,
            batch_size=compute.batch_size,
        )
        return []
    return quantize_model(
        source,
        samples.get(point.calibration, next(iter(samples.values()))),
        point.config,
        output,
        method=point.method,
        dtype=compute.dtype,
        device=compute.device,
        batch_size=compute.batch_size,
    )

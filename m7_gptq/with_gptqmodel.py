"""The same quantization by gptqmodel, where that is installed, to hold ours against.

    folder = ...                                        # the model in full precision, as a folder
    quantize_with_gptqmodel(folder, samples, QuantizeConfig(bits=4, group_size=64), Path("out"))

It gets the same token ids and the same settings. What it would do beyond them by default (order
groups by activations, search for scales, fall back to rounding) is off.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from .gptq import QuantizeConfig

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""What gptqmodel can pack."""


def is_installed() -> bool:
    return importlib.util.find_spec("gptqmodel") is not None


def quantize_with_gptqmodel(
    folder: Path,
    samples: Tensor,
    config: QuantizeConfig,
    output: Path,
    *,
    device: torch.device,
    batch_size: int = 8,
) -> None:
    """Write gptqmodel's checkpoint of the model in `folder` to `output`.

    samples: int64 ``[N, T]``. Raises ValueError where gptqmodel has no such group size.
    """
    if config.group_size not in GROUP_SIZES:
        raise ValueError(
            f"gptqmodel has no group size {config.group_size}, only "
            f"{', '.join(map(str, GROUP_SIZES))}"
        )
    # It asks for two workers of a pool that it makes with one for every two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    import gptqmodel

    settings = gptqmodel.QuantizeConfig(
        bits=config.bits,
        group_size=config.group_size,
        sym=config.sym,
        desc_act=config.desc_act,
        static_groups=config.static_groups,
        damp_percent=config.damp_percent,
        true_sequential=config.true_sequential,
        act_group_aware=False,
        mse=0.0,
        fallback=None,
        **({} if config.sym else {"format": "gptq_v2"}),
    )
    model = gptqmodel.GPTQModel.load(
        str(folder), settings, dtype=torch.float32, device=device.type
    )
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in samples.tolist()]
    model.quantize(rows, batch_size=batch_size, calibration_sort=None)
    model.save(str(output))

"""Beside gptqmodel: each reads what the other writes, and both quantize alike.

Runs where gptqmodel is installed (`pip install gptqmodel`), on the CPU. Its layers compute in
float16, ours in float32, so logits are equal to about 0.1 %; a zero point that is off by one, or
groups in another order, change them altogether.
"""

from __future__ import annotations

import os

import pytest
import torch

from common.checkpoint import load_model, open_checkpoint
from m7_gptq.checkpoint_format import QuantizedCheckpoint
from m7_gptq.gptq import QuantizeConfig
from m7_gptq.packing import V1, V2
from m7_gptq.perplexity import causal_attention
from m7_gptq.quantize_model import quantize_model
from m7_gptq.with_gptqmodel import quantize_with_gptqmodel

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool is too small for two cores
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it would compile every layer before its use
gptqmodel = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")


PRESETS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-qwen3")


def samples() -> torch.Tensor:
    return torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))


def our_logits(folder, input_ids):
    model = load_model(
        QuantizedCheckpoint("it", folder), dtype=torch.float32, device="cpu", max_positions=64
    )
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    with torch.inference_mode():
        return model.compute_logits(model(input_ids, positions, causal_attention))


def their_logits(folder, input_ids):
    model = gptqmodel.GPTQModel.load(
        str(folder), device="cpu", dtype=torch.float16, backend=gptqmodel.BACKEND.TORCH
    )
    with torch.inference_mode():
        return model.model(input_ids).logits.float()


def assert_same(ours, theirs):
    assert (ours - theirs).norm() < 0.003 * ours.norm()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("options", "checkpoint_format"),
    [
        ({}, V1),
        ({"desc_act": True}, V1),
        ({}, V2),
        ({"sym": False}, V2),
        ({"sym": False, "desc_act": True}, V2),
        ({"bits": 8}, V1),
        ({"bits": 2}, V1),
        ({"bits": 3}, V1),
        ({"group_size": -1}, V1),
    ],
)
def test_it_reads_ours(tmp_path, preset, options, checkpoint_format):
    if preset == "random:tiny-qwen2" and options.get("bits") == 3:
        pytest.skip("its 16 outputs of k_proj fill no three words of 3-bit zero points")
    config = QuantizeConfig(**{"bits": 4, "group_size": 32, **options})
    source, folder = open_checkpoint(preset), tmp_path / "ours"
    quantize_model(source, samples(), config, folder, checkpoint_format=checkpoint_format)
    assert_same(our_logits(folder, samples()), their_logits(folder, samples()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"desc_act": True},
        {"sym": False},
        {"group_size": 32, "static_groups": True},
        {"group_size": 32, "static_groups": True, "desc_act": True},
    ],
)
def test_we_read_its_and_both_round_alike(tmp_path, options):
    """With the same text and grids, nearly all codes are the same.

    Where groups are fitted on the way the two differ: gptqmodel fits to weights that the errors of
    the current block have not reached yet, ours to weights that have had all of them. What is left
    here comes from scales, which ours rounds to float16 before it encodes, not after.
    """
    config = QuantizeConfig(**{"bits": 4, "group_size": -1, **options})
    source = open_checkpoint(PRESETS[0])
    source.save(tmp_path / "source")
    theirs = tmp_path / "theirs"
    device = torch.device("cpu")
    quantize_with_gptqmodel(tmp_path / "source", samples(), config, theirs, device=device)
    quantize_model(source, samples(), config, tmp_path / "ours")
    assert_same(our_logits(theirs, samples()), their_logits(theirs, samples()))
    ours, other = QuantizedCheckpoint("ours", tmp_path / "ours"), QuantizedCheckpoint("it", theirs)
    name = ours.linears[0]
    mine, its = ours.linear(name), other.linear(name)
    assert torch.equal(mine.g_idx.long(), its.g_idx.long())
    assert torch.equal(mine.scales, its.scales)
    assert (mine.zeros() == its.zeros()).float().mean() > 0.95
    assert (mine.codes() == its.codes()).float().mean() > 0.97

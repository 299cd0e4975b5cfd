"""Suites ``decode`` and ``ragged``: one query a sequence over a paged cache."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from dev.bench.kernels.peers import DecodeAttention, Library
from dev.bench.kernels.setting import EPS, Setting
from dev.bench.kernels.suite import Subject
from dev.bench.kernels.timing import Call
from dev.bench.roofline import Cost
from dev.bench.workloads import Lengths


@dataclass(frozen=True)
class DecodeCase:
    """Groups of sequences, each with so many cached tokens."""

    groups: tuple[tuple[int, Lengths], ...]
    measure: ClassVar[str] = "paged_attention"

    @classmethod
    def parse(cls, text: str) -> DecodeCase:
        groups = []
        for part in text.split("+"):
            batch, _, context = part.partition("x")
            try:
                groups.append((int(batch), Lengths.parse(context)))
            except ValueError:
                raise ValueError(
                    f"give BxS, like 64x4096, or BxA:C, several joined by +, not {text!r}"
                ) from None
        return cls(tuple(groups))

    def __str__(self) -> str:
        return "+".join(f"{batch}x{context}" for batch, context in self.groups)

    def lens(self) -> list[int]:
        """Cached tokens of each sequence, in shuffled order, the same every time."""
        spread = torch.cat([
            torch.linspace(context.low, context.high, batch) for batch, context in self.groups
        ]).round().int()
        order = torch.randperm(len(spread), generator=torch.Generator().manual_seed(0))
        return spread[order].tolist()


@dataclass(frozen=True)
class DecodeInputs:
    """A batch: queries ``[B, Hq, D]``, and the block tables that are its own."""

    q: Tensor
    table: Tensor  # [B, max_blocks] int32
    lens: Tensor  # [B] int32; one tensor for all inputs of a case


class DecodeSuite:
    """Decode attention: the milestones' kernels and those of libraries."""

    name: ClassVar[str] = "decode"
    default_cases: ClassVar[dict[str, tuple[str, ...]]] = {
        "cuda": ("1x4096", "8x4096", "64x1024", "256x1024", "64x4096", "8x32768"),
        "cpu": ("1x1024", "8x512"),
    }

    def __init__(
        self,
        setting: Setting,
        milestones: Sequence[str] = (),
        backends: Sequence[str] = (),
        peers: Sequence[Library] = (),
    ) -> None:
        """``backends``: of milestones that have several; the default is what fits the device."""
        self.setting = setting
        self.chosen = backends
        self.attentions = [
            subject for milestone in milestones for subject in self._kernels(milestone)
        ]
        self.attentions += [self._subject(library.name, library) for library in peers]
        # What writes into the cache comes last: the others read the same.
        self.attentions.sort(key=lambda subject: not subject.compared)

    parse = staticmethod(DecodeCase.parse)

    def cost(self, case: DecodeCase) -> Cost:
        """Every cached key and value is read once."""
        tokens, setting = sum(case.lens()), self.setting
        flops = 4 * setting.num_heads * setting.head_dim * tokens  # q·k and p·v
        return Cost(tokens * setting.kv_bytes_per_token, flops)

    def inputs(self, case: DecodeCase) -> list[DecodeInputs]:
        setting, lens = self.setting, case.lens()
        on_device = torch.tensor(lens, dtype=torch.int32, device=setting.device)
        return [
            DecodeInputs(
                setting.random(len(lens), setting.num_heads, setting.head_dim), table, on_device
            )
            for table in setting.pool.tables(lens)
        ]

    def subjects(self, case: DecodeCase) -> Iterable[Subject]:
        return self.attentions

    def _kernels(self, milestone: str) -> Iterable[Subject]:
        """What a milestone has for decoding; ValueError where a backend does not run here."""
        kernels = importlib.import_module(f"{milestone}.kernels")
        on_gpu = self.setting.on_gpu
        if hasattr(kernels, "get_kernels"):
            for backend in self.chosen or (["triton", "cuda"] if on_gpu else ["torch"]):
                chosen = kernels.get_kernels(backend, self.setting.device, self.setting.head_dim)
                yield self._subject(
                    f"{milestone} {backend}", chosen.paged_attention, graph=backend != "torch"
                )
            return
        if on_gpu:
            flash = importlib.import_module(f"{milestone}.kernels.flash_decode")
            plan = importlib.import_module(f"{milestone}.kernels.decode_plan")
            yield Subject(f"{milestone} flash", partial(self._flash, flash, plan))
            yield Subject(
                f"{milestone} flash, fused", partial(self._flash_fused, flash, plan), compared=False
            )
        reference = importlib.import_module(f"{milestone}.kernels.reference")
        yield self._subject(f"{milestone} torch", reference.paged_attention, graph=False)

    def _subject(self, name: str, attention: DecodeAttention, *, graph: bool = True) -> Subject:
        pool, scale = self.setting.pool, self.setting.scale

        def calls(inputs: Sequence[DecodeInputs]) -> list[Call]:
            return [
                partial(attention, one.q, pool.keys, pool.values, one.table, one.lens, scale)
                for one in inputs
            ]

        return Subject(name, calls, graph)

    def _plan(self, module: ModuleType, inputs: Sequence[DecodeInputs]) -> object:
        setting, lens = self.setting, inputs[0].lens
        heads = setting.num_heads, setting.num_kv_heads, setting.head_dim
        # As the engine chooses: by the mean, which decides the graph there.
        is_long = float(lens.float().mean()) >= module.LONG_CONTEXT
        return module.plan_decode(lens, *heads, is_long=is_long)

    def _flash(
        self, flash: ModuleType, plan_module: ModuleType, inputs: Sequence[DecodeInputs]
    ) -> list[Call]:
        pool, plan = self.setting.pool, self._plan(plan_module, inputs)
        return [
            partial(
                flash.flash_decode, one.q, pool.keys, pool.values, one.table, plan,
                self.setting.scale,
            )
            for one in inputs
        ]  # fmt: skip

    def _flash_fused(
        self, flash: ModuleType, plan_module: ModuleType, inputs: Sequence[DecodeInputs]
    ) -> list[Call]:
        """With the norm and rotation of q and k, and the write of k and v into the cache."""
        setting, pool, plan = self.setting, self.setting.pool, self._plan(plan_module, inputs)
        batch, newest = len(inputs[0].lens), inputs[0].lens.long()[:, None] - 1
        weight, (cos, sin) = setting.random(setting.head_dim), setting.rotation(batch)
        calls: list[Call] = []
        for one in inputs:
            slots = pool.slots(one.table, newest)[:, 0]
            calls.append(partial(
                flash.flash_decode_fused, *setting.packed_qkv(batch), weight, weight, EPS, cos,
                sin, pool.keys, pool.values, one.table, slots, plan, setting.scale,
                pdl=setting.starts_early(1),  # as the engine does, whatever the batch
            ))  # fmt: skip
        return calls


class RaggedSuite(DecodeSuite):
    """The same on batches whose lengths differ: a few are long."""

    name: ClassVar[str] = "ragged"
    default_cases: ClassVar[dict[str, tuple[str, ...]]] = {
        "cuda": ("1x16384+63x200", "1x32768+255x300", "256x100:2000"),
        "cpu": ("1x1024+7x20", "8x20:400"),
    }

"""Suite ``prefill``: prompts that attend to themselves, and to what is cached before them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from common.attention import causal_self_attention
from dev.bench.kernels.peers import Library, PrefillAttention, Prompts, sdpa
from dev.bench.kernels.setting import Setting
from dev.bench.kernels.suite import Subject
from dev.bench.roofline import Cost


@dataclass(frozen=True)
class PrefillCase:
    """B prompts of so many tokens, each behind a cached context."""

    batch: int
    query_len: int
    context_len: int = 0
    measure: ClassVar[str] = "prefill_attention"

    @classmethod
    def parse(cls, text: str) -> PrefillCase:
        queries, _, context = text.partition("+")
        batch, _, query_len = queries.rpartition("x")
        try:
            case = cls(int(batch or 1), int(query_len), int(context or 0))
        except ValueError:
            case = None
        if case is None or min(case.batch, case.query_len) < 1 or case.context_len < 0:
            raise ValueError(f"give BxS, like 8x2048, or S+C, like 512+7936, not {text!r}")
        return case

    def __str__(self) -> str:
        if self.context_len:
            behind = f"{self.query_len}+{self.context_len}"
            return behind if self.batch == 1 else f"{self.batch}x{behind}"
        return f"{self.batch}x{self.query_len}"

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key it sees."""
        causal = self.query_len * (self.query_len + 1) // 2
        return self.batch * (causal + self.query_len * self.context_len)


class PrefillSuite:
    """Causal attention of packed prompts: the milestones' kernels, libraries and torch."""

    name: ClassVar[str] = "prefill"
    default_cases: ClassVar[dict[str, tuple[str, ...]]] = {
        "cuda": ("32x512", "8x2048", "2x8192", "1x16384", "1x32768",
                 "256+7936", "512+7936", "2048+30720"),
        "cpu": ("4x128", "1x512", "64+448"),
    }

    def __init__(
        self,
        setting: Setting,
        milestones: Sequence[str] = (),
        peers: Sequence[Library] = (),
    ) -> None:
        self.setting = setting
        self.milestones = milestones
        self.peers = peers

    parse = staticmethod(PrefillCase.parse)

    def cost(self, case: PrefillCase) -> Cost:
        """Queries, keys and values are read and the result is written once."""
        setting = self.setting
        width = setting.num_heads * setting.head_dim
        queries = 2 * case.batch * case.query_len * width * setting.dtype.itemsize
        num_keys = case.batch * (case.query_len + case.context_len)
        return Cost(
            queries + num_keys * setting.kv_bytes_per_token, 4 * width * case.num_pairs
        )

    def inputs(self, case: PrefillCase) -> list[Prompts]:
        setting, pool = self.setting, self.setting.pool
        lens = [case.context_len + case.query_len] * case.batch
        copies = setting.copies(self.cost(case).bytes)
        return [self._prompts(case, table) for table in pool.tables(lens, copies)]

    def _prompts(self, case: PrefillCase, table: Tensor) -> Prompts:
        setting, pool = self.setting, self.setting.pool
        q, k, v = setting.packed_qkv(case.batch * case.query_len)
        # As a layer has them: rotated q and k are new, v is a part of the projection.
        q, k = q.contiguous(), k.contiguous()
        fresh = torch.arange(case.context_len, case.context_len + case.query_len)
        slots = pool.slots(table, fresh.expand(case.batch, -1).to(table.device)).flatten()
        for cache, tokens in ((pool.keys, k), (pool.values, v)):
            cache.flatten(0, 1).index_copy_(0, slots, tokens)
        return Prompts(
            q, k, v, pool.keys, pool.values, table, case.query_len, case.context_len, setting.scale
        )

    def subjects(self, case: PrefillCase) -> Iterable[Subject]:
        for milestone in self.milestones:
            for name, attention in self._kernels(milestone, case):
                yield _subject(f"{milestone} {name}", attention)
        for library in self.peers:
            yield _subject(library.name, library.prefill)
        yield _subject("SDPA", sdpa)

    def _kernels(
        self, milestone: str, case: PrefillCase
    ) -> Iterable[tuple[str, PrefillAttention]]:
        if find_spec(f"{milestone}.kernels.flash_prefill") is None:
            if not case.context_len:  # its prefill does not read the cache
                yield "torch", _masked
            return
        if self.setting.on_gpu:
            yield "flash", partial(self._flash, milestone)
        yield "torch", partial(_twin, milestone)

    def _flash(self, milestone: str, prompts: Prompts) -> Callable[[], Tensor]:
        kernel = importlib.import_module(f"{milestone}.kernels.flash_prefill")
        planner = importlib.import_module(f"{milestone}.kernels.prefill_plan")
        setting, one = self.setting, prompts
        plan = planner.plan_prefill(
            one.query_lens,
            one.context_lens,
            setting.device,
            num_heads=setting.num_heads,
            num_kv_heads=setting.num_kv_heads,
            head_dim=setting.head_dim,
            dtype=setting.dtype,
            num_multiprocessors=setting.num_multiprocessors,
        ).to(setting.device)
        return partial(
            kernel.flash_prefill, one.q, one.k, one.v, one.keys, one.values, one.table, plan,
            one.scale,
        )


def _twin(milestone: str, prompts: Prompts) -> Callable[[], Tensor]:
    reference = importlib.import_module(f"{milestone}.kernels.prefill_reference")
    one = prompts
    return partial(
        reference.paged_prefill, one.q, one.k, one.v, one.keys, one.values, one.table,
        one.query_lens, one.context_lens, one.scale,
    )


def _subject(name: str, attention: PrefillAttention) -> Subject:
    return Subject(name, lambda inputs: [attention(one) for one in inputs])


def _masked(prompts: Prompts) -> Callable[[], Tensor]:
    """What stages before m4 do: an explicit mask, one prompt after the other."""
    parts = [x.split(prompts.query_len) for x in (prompts.q, prompts.k, prompts.v)]
    return lambda: torch.cat([causal_self_attention(*one) for one in zip(*parts, strict=True)])

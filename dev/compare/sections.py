"""What is compared with others: sections of lines, and what is said before each.

A line knows how to find its figure for a column (a milestone or a peer); the document and the chart
are made from the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dev.bench.runner import milestone_names
from dev.compare.metrics import number_of
from dev.compare.parts import COUNTING_MODEL
from dev.compare.sources import MODEL, Entry, Sources

NOT_YET, NONE = "not yet", "–"
FA3 = "FlashAttention-3"

Find = Callable[[str], Entry | None]


@dataclass(frozen=True)
class Line:
    """A row of a table.

    find: the entry of a column. field: of its row. style: "ms", "s", "us", "number", "share",
    "tflops". first, last: the milestones that are asked for it.
    """

    label: str
    field: str
    style: str
    find: Find
    first: str = "m1"
    last: str = "m9"
    less_is_better: bool = True

    def value(self, column: str) -> Any:
        """A number, a range of two, or None."""
        entry = self.find(column)
        return None if entry is None else entry.row.get(self.field)


@dataclass(frozen=True)
class Section:
    """A heading, what is said, and a table."""

    title: str
    text: str
    columns: Mapping[str, str]  # as asked for: as shown
    lines: Sequence[Line]


def sections(sources: Sources) -> list[Section]:
    """What is compared, in the order of the document."""
    ladder = {name: name for name in map(number_of, milestone_names()) if name >= "m1"}
    peers = {name: about["label"] for name, about in sources.peers["subjects"].items()}

    def of(measure: str, **wanted: Any) -> Find:
        return lambda name: sources.find(name, measure, **wanted)

    def kernel(measure: str, case: str) -> Find:
        return lambda name: sources.kernel(name, measure, case)

    def tpot(batch: int) -> Line:
        return Line(f"an output token, batch {batch}, ms", "seconds", "ms",
                    of("tpot", num_requests=batch), "m1" if batch == 1 else "m2")

    def ttft(length: int, first: str) -> Line:
        return Line(f"the first token of a prompt of {length:,}, ms", "seconds", "ms",
                    of("ttft", input_len=length), first)

    mixed = of("mixed", work={"decodes": 64, "prompts": 4, "prompt_len": 8192})
    hit = of("prefix", work={"hit_len": 8192, "cached_len": 7936}, workload="hit")
    crowd = of("crowd", model=COUNTING_MODEL, num_requests=256, kv_slots_total=65_536)
    few_slots = of("throughput", num_requests=128, kv_slots_total=65_536)
    many = {"num_requests": 256, "output_tokens": 133_966}
    few = {"num_requests": 32, "output_tokens": 2401}
    return [
        Section(
            "Batching and speed",
            _BATCHING,
            {**ladder, **peers},
            [
                Line("256 requests, output tokens/s", "output_tokens_per_s", "number",
                     of("throughput", **many), "m2", less_is_better=False),
                Line("32 short requests, output tokens/s", "output_tokens_per_s", "number",
                     of("throughput", **few), less_is_better=False),
                *(tpot(batch) for batch in (1, 8, 64, 256)),
                ttft(512, "m1"), ttft(8192, "m1"),
                Line("128 requests in 65,536 KV slots, output tokens/s", "output_tokens_per_s",
                     "number", few_slots, "m2", "m3", less_is_better=False),
            ],
        ),
        Section(
            "Memory",
            _MEMORY,
            {name: name for name in ladder if name >= "m2"},
            [
                Line("128 requests: slots used of allocated, %", "kv_utilization", "share",
                     few_slots, "m2", "m3", less_is_better=False),
                Line("128 requests: steps", "num_steps", "number", few_slots, "m2", "m3"),
                Line("256 requests: slots used of allocated, %", "kv_utilization", "share",
                     crowd, "m2", "m5", less_is_better=False),
                Line("256 requests: served at once while others wait", "at_once", "number",
                     crowd, "m2", "m5", less_is_better=False),
                Line("256 requests: steps", "num_steps", "number", crowd, "m2", "m5"),
                Line("32 short requests, memory plenty: slots used of allocated, %",
                     "kv_utilization", "share", of("throughput", **few), "m2",
                     less_is_better=False),
            ],
        ),
        Section(
            "Attention: decoding",
            _DECODE,
            {"m3_paged triton": "m3", "m4_flash flash": "m4 and later", FA3: FA3},
            [
                Line(f"decode {case}, us", "us", "us", kernel("paged_attention", case))
                for case in ("1x4096", "8x4096", "64x1024", "256x1024", "64x4096", "8x32768",
                             "256x100:2000", "1x16384+63x200", "1x32768+255x300")
            ],
        ),
        Section(
            "Attention: prompts",
            _PREFILL,
            {"m3_paged torch": "m3", "m4_flash flash": "m4 and later", FA3: FA3},
            [
                Line(f"prompts {case}, TFLOP/s", "flops_per_s", "tflops",
                     kernel("prefill_attention", case), less_is_better=False)
                for case in ("32x512", "8x2048", "2x8192", "1x16384", "1x32768", "256+7936",
                             "512+7936", "2048+30720")
            ],
        ),
        Section(
            "Prompts beside decodes",
            _MIXED,
            {name: label for name, label in {**ladder, **peers}.items()
             if name >= "m4" and name != "nano-vllm"},
            [
                Line("gap between two tokens, p50, ms", "run_itl_p50_s", "ms", mixed, "m4"),
                Line("p99, ms", "run_itl_p99_s", "ms", mixed, "m4"),
                Line("longest, ms", "run_itl_max_s", "ms", mixed, "m4"),
                Line("p99 until the prompts are answered, ms", "itl_p99_s", "ms", mixed, "m4"),
                Line("first tokens of the four prompts, ms", "prompt_ttfts_s", "ms", mixed,
                     "m4"),
            ],
        ),
        Section(
            "Prefixes",
            _PREFIX,
            {name: label for name, label in {**ladder, **peers}.items()
             if name >= "m5" and name != "nano-vllm"},
            [
                Line("first token, 7,936 of 8,192 tokens cached, ms", "cached_ttft_s", "ms", hit,
                     "m5"),
                Line("nothing cached, ms", "uncached_ttft_s", "ms", hit, "m5"),
            ],
        ),
        Section(
            "Quantization",
            _QUANTIZATION,
            {"m6": "m6, bfloat16", "m7": "m7, 4 bits", "vllm bfloat16": "vLLM, bfloat16",
             "vllm gptq": "vLLM, 4 bits"},
            [
                Line(f"{shape} shapes, an output token, batch {batch}, ms", "seconds", "ms",
                     _four_bits(sources, model, batch), "m6")
                for shape, model in (("Qwen3-0.6B", MODEL), ("Qwen3-8B", "random:qwen3-8b"))
                for batch in (1, 8, 16)
            ],
        ),
        Section(
            "From the start of the process",
            _STARTUP,
            {name: label for name, label in {**ladder, **peers}.items() if name >= "m4"},
            [
                Line("first token, kernels not compiled, s", "first_token_s", "s",
                     of("startup", case="cold"), "m4"),
                Line("kernels compiled, s", "first_token_s", "s", of("startup", case="warm"),
                     "m4"),
            ],
        ),
    ]


def _four_bits(sources: Sources, model: str, batch: int) -> Find:
    """Times of a token with the weights of a column."""

    def find(column: str) -> Entry | None:
        if not column.startswith("vllm"):
            name = model + ("-gptq" if column == "m7" else "")
            return sources.find(column, "tpot", name, beside_4_bits=True, num_requests=batch)
        weights = "gptq" if column == "vllm gptq" else None
        return sources.find("vllm", "tpot", model, num_requests=batch, weights=weights)

    return find


def is_ours(column: str) -> bool:
    """Whether a column is a milestone's."""
    return column[:1] == "m" and column[1:2].isdigit()


_UNITS = {"ms": 1e3, "us": 1.0, "s": 1.0, "tflops": 1e-12}


def show(value: Any, style: str) -> str:
    """A number in a cell, without its unit."""
    if isinstance(value, list):  # the least and the most that was seen
        low, high = (f"{bound * _UNITS[style]:.3g}" for bound in (value[0], value[-1]))
        return low if low == high else f"{low} to {high}"
    if style == "share":
        return f"{value * 100:.1f}"
    if style == "number":
        return f"{value:,.0f}"
    value *= _UNITS[style]
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def show_cell(line: Line, column: str) -> str:
    """What a column has to show: a figure, that it is still to be measured, or nothing."""
    value = line.value(column)
    if value is not None:
        return show(value, line.style)
    is_asked = is_ours(column) and " " not in column and line.first <= column <= line.last
    return NOT_YET if is_asked else NONE


_BATCHING = """vLLM, nano-vllm and this engine from m2 on choose a batch anew at every step. What
differs is what happens between two steps: m1 to m3 launch every operation from Python; m4 and
the others replay CUDA graphs; from m5 on the next step is planned while one is computed, as
vLLM's asynchronous scheduling does. Prompts and outputs of 100 to 1,024 tokens (256 and 128
requests), or of 100 to 512 and 32 to 128 (32 requests), all there at the start. m7 runs
full-precision weights here, with which it is m6; its 4 bits have a table of their own."""

_MEMORY = """m2 keeps a contiguous slot for each sequence, m3 and later blocks of 16 tokens and a
table for each sequence, as vLLM does (nano-vllm takes blocks of 256). Wasted is what stands
between a sequence's length and what is kept for it. vLLM and nano-vllm keep blocks too, so there
is no figure of theirs here: with the same block size they would waste the same. Prompts and
outputs of 100 to 1,024 tokens in a cache of 65,536 slots; the 256 requests are counted, with a
tiny model."""

_DECODE = """Attention of a decode step for one layer: 16 query heads, 8 KV heads of 128, pages of
16 tokens, by graph replay. A case is sequences x context; the last three are ragged batches. vLLM
and nano-vllm (in our setting) call FlashAttention-3, so it stands for both; m4's kernels are
written in Triton and splits their work by a list made on the device."""

_PREFILL = """Causal attention of packed prompts, prompts x length, and of a chunk behind a cached
context (chunk + context). m3 keeps all scores in memory, under a mask; m4 and FlashAttention-3
walk over tiles."""

_MIXED = """64 sequences are decoding when four prompts of 8,192 tokens arrive: what the users of
the 64 see between two tokens. m4 computes the prompts first; m5 and vLLM give each step a budget
of tokens, decodes first."""

_PREFIX = """A prompt of 8,192 tokens of which the beginning was seen before. m6 keeps blocks in a
radix tree that also finds parts of blocks (a table of hashes, as vLLM's, by option)."""

_QUANTIZATION = """GPTQ, 4 bits, groups of 128. A token at small batch reads every weight once, so
the bytes of the weights are its time, if the kernel keeps up."""

_STARTUP = """A prompt of 512 tokens in a fresh process, random weights."""

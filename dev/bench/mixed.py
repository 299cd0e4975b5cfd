"""Mixed work: what long prompts do to users whose answers are being written.

    python -m dev.bench mixed --milestone m4 --model random:qwen3-0.6b

Decodes are running; when each has had ``--warmup-tokens``, the prompts arrive, all at once. The
*window* is from then until the last prompt has its first token, plus a tail of tokens. The gaps
between tokens that the users of the decodes see there stand beside those of a quiet time, the
second half of the warm-up tokens, and beside those from then to the end of the decodes: of these
the window is a small part, and the longer the decodes are the smaller. All requests run to their
end, so that the throughput of two milestones is that of the same work. Every figure is the median
over the repetitions.
"""

from __future__ import annotations

import argparse
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from common.engine_config import BaseEngineConfig
from common.metrics import RequestMetrics
from dev.bench.arguments import count
from dev.bench.load import FRONTS, Hold, ServedRun, chunk_counts, serve
from dev.bench.measure import Pass, Row, Timing, percentile_fields
from dev.bench.runner import EngineSubject
from dev.bench.serve import add_front_option
from dev.bench.throughput import counted
from dev.bench.workloads import BenchRequest, Lengths, random_requests

HELP = "decodes are running when long prompts arrive: the gaps between their tokens"


@dataclass(frozen=True)
class MixedPass(Pass):
    """Decodes, whose number and lengths are those of ``Pass``, and prompts that come later."""

    num_prompts: int = 0
    prompt_len: int = 1
    prompt_output_len: int = 1
    warmup_tokens: int = 0
    front: str = FRONTS[0]

    def requests(self, vocab_size: int, run: int) -> list[BenchRequest]:
        """The decodes, then the prompts; fresh ones in every run."""
        length, output_len = self.prompt_len, self.prompt_output_len
        prompts = random_requests(
            self.num_prompts,
            Lengths(length, length),
            Lengths(output_len, output_len),
            vocab_size=vocab_size,
            seed=self.seed + 1,
            run=run,
        )
        return super().requests(vocab_size, run) + prompts

    def run(self, subject: EngineSubject, requests: Sequence[BenchRequest]) -> ServedRun:
        hold = Hold(self.num_requests, self.warmup_tokens)
        return serve(subject, requests, self.temperature, self.front, hold)


@dataclass(frozen=True)
class MixedWork:
    """D decodes and P prompts."""

    num_decodes: int
    decode_len: int
    output_len: int
    num_prompts: int
    prompt_len: int
    prompt_output_len: int
    warmup_tokens: int
    tail_tokens: int
    temperature: float
    seed: int
    front: str
    default_repeat: ClassVar[int] = 3
    kind: ClassVar[str] = "mixed"

    @property
    def batch_size(self) -> int:
        """Most sequences at once."""
        return self.num_decodes + self.num_prompts

    @property
    def max_num_seqs(self) -> int:
        """What the engine's option of that name should be, unless it is given."""
        return max(self.batch_size, BaseEngineConfig.max_num_seqs)

    def describe(self) -> Mapping[str, Any]:
        return {
            "decodes": self.num_decodes,
            "decode_input_len": self.decode_len,
            "decode_output_len": self.output_len,
            "prompts": self.num_prompts,
            "prompt_len": self.prompt_len,
            "prompt_output_len": self.prompt_output_len,
            "warmup_tokens": self.warmup_tokens,
            "tail_tokens": self.tail_tokens,
            "front": self.front,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def passes(self) -> list[Pass]:
        return [
            MixedPass(
                f"{self.num_decodes} decodes, {self.num_prompts} x {self.prompt_len} arrive",
                self.num_decodes,
                Lengths(self.decode_len, self.decode_len),
                Lengths(self.output_len, self.output_len),
                self.seed,
                self.temperature,
                self.num_prompts,
                self.prompt_len,
                self.prompt_output_len,
                self.warmup_tokens,
                self.front,
            )
        ]

    def rows(self, subject: EngineSubject, timings: Sequence[Timing]) -> list[Row]:
        (timing,) = timings
        pairs = timing.of.lengths()
        prompt_tokens, output_tokens = (sum(column) for column in zip(*pairs, strict=True))
        each = [self._figures(subject.name, run) for run in timing.runs]
        seconds = statistics.median(timing.seconds)
        return [
            {
                "name": subject.name,
                "measure": "mixed",
                "num_requests": len(pairs),
                "prompt_tokens": prompt_tokens,
                "output_tokens": output_tokens,
                "seconds": seconds,
                "seconds_min": min(timing.seconds),
                "seconds_max": max(timing.seconds),
                "output_tokens_per_s": output_tokens / seconds,
                "total_tokens_per_s": (prompt_tokens + output_tokens) / seconds,
                "requests_per_s": len(pairs) / seconds,
                "load_s": subject.load_s,
                "peak_memory_bytes": timing.peak_memory_bytes,
                **{name: _median([run[name] for run in each]) for name in each[0]},
                **counted(timing.median_run),
                **chunk_counts(timing.median_run),
            }
        ]

    def _figures(self, who: str, run: ServedRun) -> Row:
        decodes, prompts = run.metrics[: self.num_decodes], run.metrics[self.num_decodes :]
        window = find_window(who, decodes, prompts, self.warmup_tokens, self.tail_tokens)
        ttfts = sorted(metrics.ttft for metrics in prompts)
        num_tokens = len(window.gaps) + self.num_prompts * self.prompt_len
        return {
            **percentile_fields("itl", window.gaps),
            **percentile_fields("quiet_itl", window.quiet_gaps),
            **percentile_fields("run_itl", window.run_gaps),
            "prompt_ttfts_s": ttfts,
            "prompt_ttft_min_s": ttfts[0],
            "prompt_ttft_max_s": ttfts[-1],
            "window_s": window.seconds,
            "window_tokens_per_s": num_tokens / window.seconds,
        }


def _median(values: list[Any]) -> Any:
    """The median of numbers, or of lists of them, place by place."""
    if isinstance(values[0], list):
        return [statistics.median(column) for column in zip(*values, strict=True)]
    return statistics.median(values)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that describe the work."""
    add = parser.add_argument_group("the work").add_argument
    add("--decodes", type=count, default=64, metavar="D",
        help="requests that are running (default: 64)")
    add("--decode-input-len", type=count, default=256, metavar="T",
        help="their prompt length (default: 256)")
    add("--decode-output-len", type=count, default=1024, metavar="T",
        help="their output length: enough for the whole window (default: 1024)")
    add("--prompts", type=count, default=4, metavar="P",
        help="prompts that arrive while they do (default: 4)")
    add("--prompt-len", type=count, default=8192, metavar="T",
        help="the length of these (default: 8192)")
    add("--prompt-output-len", type=count, default=16, metavar="T",
        help="and of their outputs (default: 16)")
    add("--warmup-tokens", type=count, default=64, metavar="W",
        help="tokens each decode has had before, at least 4 (default: 64)")
    add("--tail-tokens", type=count, default=16, metavar="W",
        help="gaps of each decode that still count after the last prompt's first token "
        "(default: 16)")
    add("--temperature", type=float, default=0.0, help="(default: 0)")
    add_front_option(add)


def from_args(args: argparse.Namespace) -> MixedWork:
    """The work that was asked for; ValueError where it gives no window."""
    for milestone in args.milestone:
        if milestone < "m2":
            raise ValueError(f"{milestone} runs one request at a time: mixed begins with m2")
    if args.warmup_tokens < 4:
        raise ValueError(f"--warmup-tokens must be at least 4, got {args.warmup_tokens}")
    if args.decode_output_len <= args.warmup_tokens + args.tail_tokens:
        raise ValueError(
            f"--decode-output-len must be more than warm-up and tail together "
            f"({args.warmup_tokens + args.tail_tokens}), got {args.decode_output_len}"
        )
    return MixedWork(
        args.decodes, args.decode_input_len, args.decode_output_len, args.prompts,
        args.prompt_len, args.prompt_output_len, args.warmup_tokens, args.tail_tokens,
        args.temperature, args.engine_seed or 0, args.front,
    )


@dataclass(frozen=True)
class Window:
    """Gaps between two tokens of a decode, in seconds."""

    gaps: list[float]
    quiet_gaps: list[float]  # before the window
    run_gaps: list[float]  # from the quiet time to the decode's end
    seconds: float  # how long it is


def find_window(
    who: str,
    decodes: Sequence[RequestMetrics],
    prompts: Sequence[RequestMetrics],
    warmup_tokens: int,
    tail_tokens: int,
) -> Window:
    """Of each decode the window has the gap in which the prompts arrive, those after it, the one
    in which the last prompt gets its first token, and ``tail_tokens`` more.

    Raises:
        RuntimeError: a decode ended before that.
    """
    arrival = prompts[0].arrival_time
    answered = max(metrics.token_times[0] for metrics in prompts)
    settled = max(metrics.token_times[warmup_tokens // 2 - 1] for metrics in decodes)
    gaps: list[float] = []
    quiet_gaps: list[float] = []
    run_gaps: list[float] = []
    end, num_short = arrival, 0
    for metrics in decodes:
        times, itl = metrics.token_times, metrics.itl
        first_quiet = bisect_left(times, settled)
        first = bisect_right(times, arrival)
        last = bisect_left(times, answered) + tail_tokens
        quiet_gaps += itl[first_quiet : first - 1]  # itl[i] is the gap before token i + 1
        run_gaps += itl[first_quiet:]
        if last >= len(times):
            num_short += 1
            continue
        gaps += itl[first - 1 : last]
        end = max(end, times[last])
    if num_short:
        raise RuntimeError(
            f"{who}: {num_short} of {len(decodes)} decodes ended before the window did: give them "
            "more to write (--decode-output-len), and room to run all at once (--max-num-seqs, "
            "the KV cache)"
        )
    return Window(gaps, quiet_gaps, run_gaps, end - arrival)

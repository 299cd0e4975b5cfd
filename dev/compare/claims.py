"""What each milestone promises beside the one before it, and whether it keeps that.

A claim is data: which figure, held against whose, and how much of a difference it must make.
Counted ones are checked on any machine. Timed ones are about a GPU, where launches, bandwidth and
waiting weigh differently than on a CPU, and are checked only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dev.bench.report import Report
from dev.compare.metrics import LESS, MORE, find_rows

HELD, NOT_HELD, NOT_MEASURED = "held", "not held", "not measured here"


@dataclass(frozen=True)
class Claim:
    """A promise of one milestone.

    Args:
        text: what is promised. how: how it is measured, or why this command cannot.
        parts: where the figure is looked for; the first part that has it counts. pick, field: of
            the part's rows, as in ``metrics.Metric``; of several rows the least factor counts.
        against: a milestone by number; None: the figure itself must reach the threshold.
        better: MORE: ours by theirs is the factor; LESS: theirs by ours.
        at_least: the threshold of the factor, or of the figure.
    """

    milestone: str
    text: str
    how: str
    parts: Sequence[str] = ()
    field: str = ""
    pick: str = ""
    against: str | None = None
    better: str = MORE
    at_least: float = 1.0
    is_timed: bool = False


@dataclass(frozen=True)
class Verdict:
    """What came of a claim. ours, theirs: the figures; factor: what was held to the threshold."""

    milestone: str
    text: str
    how: str
    verdict: str
    at_least: float
    reason: str = ""
    part: str | None = None
    ours: float | None = None
    theirs: float | None = None
    factor: float | None = None


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "m2", "serves the same requests in at least 4 times fewer steps than m1",
        "forward passes", ("requests", "throughput"), "num_steps",
        against="m1", better=LESS, at_least=4.0,
    ),
    Claim(
        "m2", "gives at least 4 times m1's output tokens per second on 32 requests",
        "output tokens/s", ("requests",), "output_tokens_per_s",
        against="m1", at_least=4.0, is_timed=True,
    ),
    Claim(
        "m3", "holds a token in at least 96 % of the KV slots it allocates",
        "mean over the steps, more requests than the cache holds", ("memory",), "kv_utilization",
        at_least=0.96,
    ),
    Claim(
        "m3", "runs at least twice as many requests as m2 in the same memory",
        "requests that get a token in a step while others wait, median", ("memory",), "at_once",
        against="m2", at_least=2.0,
    ),
    Claim(
        "m4", "gives the first token of long prompts at least twice as early as m3",
        "TTFT of the longest prompt that both run, alone", ("latency",), "seconds", "ttft:max",
        against="m3", better=LESS, at_least=2.0, is_timed=True,
    ),
    Claim(
        "m4", "runs prompts of 32,768 tokens",
        "their length, if they came to an end", ("long",), "input_len", "ttft:max",
        at_least=32_768, is_timed=True,
    ),
    Claim(
        "m4", "takes at least 4 times less for a token at batch 1 than m3",
        "TPOT", ("latency",), "seconds", "tpot:1",
        against="m3", better=LESS, at_least=4.0, is_timed=True,
    ),
    Claim(
        "m5", "computes at least 5 times fewer tokens between two tokens of a decode than m4 while "
        "long prompts arrive",
        "p99 of the tokens computed for anybody in between", ("stall",), "gap_p99_tokens",
        against="m4", better=LESS, at_least=5.0,
    ),
    Claim(
        "m5", "keeps the gaps between a decode's tokens at least 5 times shorter than m4 while "
        "long prompts arrive",
        "ITL p99 in the window of the arrivals", ("mixed",), "itl_p99_s",
        against="m4", better=LESS, at_least=5.0, is_timed=True,
    ),
    Claim(
        "m5", "at m4's throughput, less 3 % at most",
        "output tokens/s of the same work", ("mixed",), "output_tokens_per_s",
        against="m4", at_least=0.97, is_timed=True,
    ),
    Claim(
        "m6", "computes at least 8 times fewer tokens than m5 of a prompt that is 97 % cached",
        "prompt tokens that were not found", ("prefix",), "computed_tokens", "hit",
        against="m5", better=LESS, at_least=8.0,
    ),
    Claim(
        "m6", "gives its first token at least 8 times as early as m5",
        "TTFT of that prompt, alone", ("prefix",), "cached_ttft_s", "hit",
        against="m5", better=LESS, at_least=8.0, is_timed=True,
    ),
    Claim(
        "m6", "takes no more steps than m5 where prompts have nothing in common",
        "forward passes", ("prefix",), "num_steps", "none",
        against="m5", better=LESS, at_least=1.0,
    ),
    Claim(
        "m6", "and is not slower there, but for 2 %",
        "output tokens/s", ("prefix",), "output_tokens_per_s", "none",
        against="m5", at_least=0.98, is_timed=True,
    ),
    Claim(
        "m7", "keeps the matrices of the layers in at least 70 % fewer bytes than m6",
        "4 bits in groups of 128 against bfloat16, without embedding and head",
        ("four-bits-8b", "four-bits"), "linear_bytes",
        against="m6", better=LESS, at_least=1 / 0.3,
    ),
    Claim(
        "m7", "takes less than m6 for a token at batch 1 to 16, 8B shapes",
        "TPOT, 4 bits against bfloat16; the least gain counts", ("four-bits-8b",), "seconds",
        "tpot", against="m6", better=LESS, at_least=1.0, is_timed=True,
    ),
    Claim(
        "m7", "has its perplexity reported beside full precision and round-to-nearest",
        "not by this command: python -m m7_gptq.evaluate",
    ),
)


def check_claims(report: Report, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """What the rows of a report say of each claim of the milestones that were to run."""
    present = {name.split("_")[0] for name in report["milestones"]}
    verdicts = [check(report, claim) for claim in claims if claim.milestone in present]
    if report.get("scale", 1) == 1:
        return verdicts
    reason = "the work was scaled: a trial"
    return [replace(one, verdict=NOT_MEASURED, reason=one.reason or reason) for one in verdicts]


def check(report: Report, claim: Claim) -> Verdict:
    """What the rows of a report say of one claim."""
    if not claim.parts:
        return _verdict(claim, NOT_MEASURED, reason=claim.how)
    if claim.is_timed and report["environment"]["gpu"] is None:
        return _verdict(claim, NOT_MEASURED, reason="needs a GPU and --preset h200")
    for part in claim.parts:
        ours = _figures(report, claim, part, claim.milestone)
        if claim.against is None:
            if ours:
                least = min(ours.values())
                held = HELD if least >= claim.at_least else NOT_HELD
                return _verdict(claim, held, part=part, ours=least, factor=least)
            continue
        theirs = _figures(report, claim, part, claim.against)
        if common := [case for case in ours if case in theirs]:
            return _against(claim, part, [(ours[case], theirs[case]) for case in common])
    return _verdict(claim, NOT_MEASURED, reason=_why_not(report, claim))


def as_rows(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(verdict) for verdict in verdicts]


def _verdict(claim: Claim, verdict: str, **figures: Any) -> Verdict:
    return Verdict(claim.milestone, claim.text, claim.how, verdict, claim.at_least, **figures)


def _figures(report: Report, claim: Claim, part: str, milestone: str) -> dict[Any, float]:
    """A milestone's figures by the case they are of."""
    rows = find_rows(report, part, milestone, claim.pick)
    return {
        (row["measure"], row.get("num_requests"), row.get("input_len")): row[claim.field]
        for row in rows if row.get(claim.field) is not None
    }


def _against(claim: Claim, part: str, figures: list[tuple[float, float]]) -> Verdict:
    """The case with the least factor counts."""
    factors = []
    for ours, theirs in figures:
        above, below = (ours, theirs) if claim.better == MORE else (theirs, ours)
        if below <= 0:
            return _verdict(claim, NOT_MEASURED, part=part, ours=ours, theirs=theirs,
                            reason="one of the figures is 0: there is no factor")
        factors.append((above / below, ours, theirs))
    factor, ours, theirs = min(factors)
    held = HELD if factor >= claim.at_least else NOT_HELD
    return _verdict(claim, held, part=part, ours=ours, theirs=theirs, factor=factor)


def _why_not(report: Report, claim: Claim) -> str:
    """Why a figure is missing."""
    parts = [part for part in claim.parts if part in report["parts"]]
    if not parts:
        return f"this run has no part {' or '.join(claim.parts)}"
    for who in filter(None, (claim.milestone, claim.against)):
        if who not in {name.split("_")[0] for name in report["milestones"]}:
            return f"{who} was not in this run"
        for gap in report["not_run"]:
            if gap["part"] in parts and gap["name"].split("_")[0] == who:
                return f"{gap['name']}, part {gap['part']}: {gap['reason']}"
    return f"the rows of {' and '.join(parts)} do not have it"

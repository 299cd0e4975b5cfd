"""Helpers of the tests: run any milestone, give it a small cache, ask transformers."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from common.outputs import RequestOutput
from common.sampling import Passes
from common.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
MILESTONES = tuple(sorted(path.parent.name for path in ROOT.glob("m[0-9]_*/__init__.py")))
# Those whose sequences share a cache that can run out.
BATCHING = tuple(name for name in MILESTONES if name >= "m2")
PAGED = tuple(name for name in MILESTONES if name >= "m3")

TINY_MODELS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-qwen3")
VOCAB_SIZE = 320  # of the tiny models; their tokenizer knows bytes (0 to 255) and three more
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def load(milestone: str) -> ModuleType:
    return importlib.import_module(milestone)


def new_llm(milestone: str, model: str | Path = "random:tiny-llama", **options: Any) -> Any:
    """An ``LLM`` on the CPU in float32."""
    options = {"device": "cpu", "dtype": "float32", "max_num_seqs": 32, **options}
    return load(milestone).LLM(str(model), **options)


def new_engine(milestone: str, model: str | Path = "random:tiny-llama", **options: Any) -> Any:
    """An ``LLMEngine`` on the CPU in float32."""
    return new_llm(milestone, model, **options).engine


def small_cache(milestone: str, num_tokens: int) -> dict[str, int]:
    """Engine options that limit the KV cache; empty where a milestone has nothing to share."""
    if milestone < "m2":
        return {}
    if milestone < "m3":
        return {"num_kv_tokens": num_tokens}
    return {"block_size": 8, "num_kv_blocks": num_tokens // 8}


def step_by_step(milestone: str) -> dict[str, bool]:
    """Engine options with which ``step`` returns what that very step has sampled."""
    return {"overlap": False} if milestone >= "m5" else {}


def run_to_end(engine: Any, max_steps: int = 10_000) -> dict[str, RequestOutput]:
    """Step until nothing is left; the last output of every request by its id."""
    last: dict[str, RequestOutput] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            return last
        last.update((output.request_id, output) for output in engine.step())
    raise AssertionError(f"requests are left after {max_steps} steps")


def tokens(output: RequestOutput) -> list[list[int]]:
    """The token ids of each sample."""
    return [sample.token_ids for sample in output.outputs]


def random_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def assert_cache_is_empty(engine: Any) -> None:
    """After everything has finished nothing is held: no slot, no block, no row of the sampler."""
    assert not engine.has_unfinished_requests()
    assert engine.step() == []
    owner = getattr(engine, "model_runner", engine)
    assert owner.sampler.passes == Passes()  # the work of all its rows together
    if scheduler := getattr(engine, "scheduler", None):
        assert scheduler.waiting == [] and list(scheduler.running) == []
        assert scheduler.kv_cache.num_used == 0
        assert scheduler.kv_cache.num_allocated == 0


class Oracle:
    """transformers on the CPU in float32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._answers: dict[tuple, list[int]] = {}  # it is asked the same by every milestone

    @torch.inference_mode()
    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The tokens that ``generate`` adds to a prompt."""
        question = (*prompt, max_tokens)
        if question not in self._answers:
            sequence = self.model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens
            )
            self._answers[question] = sequence[0, len(prompt) :].tolist()
        return self._answers[question]

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """Row i: log-probabilities of the token after the first i + 1, ``[T, V]``."""
        return self.model(torch.tensor([token_ids])).logits[0].log_softmax(-1)


# Triton decides at its first import whether it compiles or interprets: what is interpreted runs in
# a child, where this is true.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str) -> None:
    """Run a file's tests that have "interpreted" in their names, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    versions = [importlib.metadata.version(name).split(".")[:2] for name in ("triton", "numpy")]
    triton, numpy = (tuple(map(int, version)) for version in versions)
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("this Triton's interpreter cannot loop with this NumPy")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file, "-k", "interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " skipped" not in child.stdout, child.stdout

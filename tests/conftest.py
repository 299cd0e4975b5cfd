"""What all tests share: one thread, no network, the models they run and the oracle they believe."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import pytest
import torch
from hypothesis import settings
from support import MILESTONES, Oracle

from common.checkpoint import open_checkpoint

# Sums of floats depend on how they are split among threads; one thread splits them the same way
# on every machine, and the models here are too small to gain from more.
torch.set_num_threads(1)

# The same examples in every run: a failure here is a failure for everyone.
settings.register_profile("repository", deadline=None, derandomize=True)
settings.load_profile("repository")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=MILESTONES)
def milestone(request: pytest.FixtureRequest) -> str:
    """Every milestone in turn, by the name of its folder."""
    return request.param


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved(model)``: the folder with that model's files, written once a session."""

    @cache
    def save(model: str) -> Path:
        folder = tmp_path_factory.mktemp("model")
        open_checkpoint(model).save(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def oracle(saved: Callable[[str], Path]) -> Callable[[str | Path], Oracle]:
    """``oracle(model)``: transformers with the weights of a model of ours or of a folder."""

    @cache
    def load(model: str | Path) -> Oracle:
        return Oracle(model if isinstance(model, Path) else saved(model))

    return load

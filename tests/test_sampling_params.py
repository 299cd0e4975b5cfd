"""SamplingParams: defaults, normalisation, and errors that say what is wrong."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from common.sampling_params import RequestOutputKind, SamplingParams


def test_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
        "detokenize": True,
        "output_kind": RequestOutputKind.CUMULATIVE,
    }


def test_values_are_normalised():
    params = SamplingParams(
        stop="end",
        stop_token_ids=[3, 5, 3],
        logit_bias={np.int64(4): 1},
        seed=-1,
        temperature=0,
        top_k=np.int32(7),
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 5)
    assert params.logit_bias == {4: 1.0}
    assert params.seed is None
    assert type(params.temperature) is float
    assert type(params.top_k) is int
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False)])
def test_greedy_temperatures(temperature, greedy):
    assert SamplingParams(temperature=temperature).is_greedy is greedy


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"min_p": 1.0},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
        {"max_tokens": None, "min_tokens": 100},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"logit_bias": {0: -math.inf}},
        {"n": 3, "temperature": 0.0},
    ],
)
def test_values_at_the_edge_are_legal(options):
    params = SamplingParams(**options)
    assert all(getattr(params, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 1.0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 2.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("min_tokens", 17),  # more than max_tokens
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("logprobs", True),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 3),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"a": 0.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", [1]),
        ("ignore_eos", 1),
        ("detokenize", None),
        ("output_kind", "delta"),
    ],
)
def test_illegal_values_are_named(name, value):
    with pytest.raises(ValueError, match=name) as error:
        SamplingParams(**{name: value})
    assert name == "logit_bias" or repr(value) in str(error.value) or isinstance(value, list)


def test_the_message_gives_the_range():
    with pytest.raises(ValueError, match=r"top_p must be a number in \(0.0, 1.0\], got 1.5"):
        SamplingParams(top_p=1.5)
    with pytest.raises(ValueError, match=r"max_tokens must be an integer in \[1, .* or None"):
        SamplingParams(max_tokens=0)


def test_stop_strings_need_text():
    with pytest.raises(ValueError, match="stop_token_ids"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 11},
        {"prompt_logprobs": 11},
        {"stop_token_ids": [10]},
        {"logit_bias": {10: 1.0}},
    ],
)
def test_what_the_vocabulary_limits(options):
    params = SamplingParams(**options)
    params.validate_for(11)
    with pytest.raises(ValueError, match=next(iter(options))):
        params.validate_for(10)


def test_params_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5

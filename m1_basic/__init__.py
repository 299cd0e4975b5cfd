"""Milestone 1: one request at a time, with a KV cache: prefill once, then decode token by token.

    from m1_basic import LLM, SamplingParams
    print(LLM().generate("The sky is", SamplingParams(max_tokens=8))[0].outputs[0].text)
"""

from common.sampling_params import SamplingParams

from .config import EngineConfig
from .engine import LLM, LLMEngine

__all__ = ["LLM", "EngineConfig", "LLMEngine", "SamplingParams"]

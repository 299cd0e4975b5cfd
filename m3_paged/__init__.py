"""Milestone 3: a paged KV cache: sequences take blocks as they grow, and samples share them.

    from m3_paged import LLM, SamplingParams
    print(LLM().generate("The sky is", SamplingParams(max_tokens=8))[0].outputs[0].text)
"""

from common.sampling_params import SamplingParams

from .config import EngineConfig
from .engine import LLM, LLMEngine

__all__ = ["LLM", "EngineConfig", "LLMEngine", "SamplingParams"]

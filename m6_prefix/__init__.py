"""Milestone 6: prompts that begin alike share what they have in common, across requests.

    from m6_prefix import LLM, SamplingParams
    print(LLM().generate("The sky is", SamplingParams(max_tokens=8))[0].outputs[0].text)
"""

from common.sampling_params import SamplingParams

from .config import EngineConfig
from .engine import LLM, LLMEngine

__all__ = ["LLM", "EngineConfig", "LLMEngine", "SamplingParams"]

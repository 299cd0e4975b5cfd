"""Milestone 0: load a model, look at it, run one forward pass, and decode the expensive way.

    from m0_init import LLM, SamplingParams
    print(LLM().generate("The sky is", SamplingParams(max_tokens=8))[0].outputs[0].text)
"""

from common.sampling_params import SamplingParams

from .config import EngineConfig
from .engine import LLM, LLMEngine

__all__ = ["LLM", "EngineConfig", "LLMEngine", "SamplingParams"]

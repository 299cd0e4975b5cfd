"""Milestone 4: flash attention over the paged cache, and decode steps that run from CUDA graphs.

    from m4_flash import LLM, SamplingParams
    print(LLM().generate("The sky is", SamplingParams(max_tokens=8))[0].outputs[0].text)
"""

from common.sampling_params import SamplingParams

from .config import EngineConfig
from .engine import LLM, LLMEngine

__all__ = ["LLM", "EngineConfig", "LLMEngine", "SamplingParams"]

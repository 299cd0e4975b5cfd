"""What an engine of one sequence at a time can be configured with: the shared fields only."""

from __future__ import annotations

from dataclasses import dataclass

from common.engine_config import BaseEngineConfig


@dataclass
class EngineConfig(BaseEngineConfig):
    """``max_num_seqs`` is accepted for symmetry; one sequence runs at a time whatever it says."""

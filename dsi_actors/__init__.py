"""Distributed Speculative Inference: a drafter guesses, several target servers verify one request at the same time.

`Orchestrator`, `Config` and `Sampling` are the way in; `Orchestrator.generate` gives a `GenerationStream`.
"""

from dsi_actors.config import Config, Sampling
from dsi_actors.errors import (
    ConfigError,
    DsiError,
    NoTargetError,
    OrchestratorClosed,
    WorkerStartError,
)
from dsi_actors.observation import Observation
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.results import CommittedTokens, GenerationReport
from dsi_actors.stream import GenerationStream

__all__ = [
    "CommittedTokens",
    "Config",
    "ConfigError",
    "DsiError",
    "GenerationReport",
    "GenerationStream",
    "NoTargetError",
    "Observation",
    "Orchestrator",
    "OrchestratorClosed",
    "Sampling",
    "WorkerStartError",
]

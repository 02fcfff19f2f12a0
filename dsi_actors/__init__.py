"""Distributed Speculative Inference: a drafter guesses, several target servers verify one request at the same time.

`Orchestrator`, `Config` and `Sampling` are the way in; `Orchestrator.generate` gives a `GenerationStream`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from dsi_actors.results import CommittedTokens, GenerationReport, TextScores
    from dsi_actors.stream import GenerationStream
    from dsi_actors.structure import Structure

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
    "Structure",
    "TextScores",
    "WorkerStartError",
]

#: Names are imported when they are first used (PEP 562): each worker is a process that uses none of them.
_MODULES = {
    "Config": "config", "Sampling": "config",
    "ConfigError": "errors", "DsiError": "errors", "NoTargetError": "errors", "OrchestratorClosed": "errors",
    "WorkerStartError": "errors",
    "CommittedTokens": "results", "GenerationReport": "results", "TextScores": "results",
    "GenerationStream": "stream", "Observation": "observation", "Orchestrator": "orchestrator", "Structure": "structure",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

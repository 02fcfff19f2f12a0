"""Distributed Speculative Inference: a drafter guesses, several target servers verify one request at the same time.

`Orchestrator`, `Config` and `Sampling` are the way in: `Orchestrator.generate` takes and gives token ids,
`Orchestrator.generate_text` text. `open` does the same without asyncio.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsi_actors.blocking import Model, TextPieces, open
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
    from dsi_actors.results import Answer, CommittedTokens, GenerationReport, TextScores
    from dsi_actors.stream import GenerationStream
    from dsi_actors.structure import Structure
    from dsi_actors.text_stream import TextOptions, TextStream

__all__ = [
    "Answer",
    "CommittedTokens",
    "Config",
    "ConfigError",
    "DsiError",
    "GenerationReport",
    "GenerationStream",
    "Model",
    "NoTargetError",
    "Observation",
    "Orchestrator",
    "OrchestratorClosed",
    "Sampling",
    "Structure",
    "TextOptions",
    "TextPieces",
    "TextScores",
    "TextStream",
    "WorkerStartError",
    "open",
]

#: Names are imported when they are first used (PEP 562): each worker is a process that uses none of them.
_MODULES = {
    "Config": "config", "Sampling": "config",
    "ConfigError": "errors", "DsiError": "errors", "NoTargetError": "errors", "OrchestratorClosed": "errors",
    "WorkerStartError": "errors",
    "Answer": "results", "CommittedTokens": "results", "GenerationReport": "results", "TextScores": "results",
    "GenerationStream": "stream", "Observation": "observation", "Orchestrator": "orchestrator", "Structure": "structure",
    "TextOptions": "text_stream", "TextStream": "text_stream", "Model": "blocking", "TextPieces": "blocking", "open": "blocking",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

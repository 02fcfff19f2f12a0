"""The engines, and the one place that knows their names."""

from __future__ import annotations

from collections.abc import Mapping

from dsi_protocol import OptionValue
from dsi_workers.engines.base import Engine, EngineError, EngineInfo, Interrupt, Interrupted, RequestError, Task

ENGINES = ("transformers", "timed", "ngram")

__all__ = [
    "ENGINES",
    "Engine",
    "EngineError",
    "EngineInfo",
    "Interrupt",
    "Interrupted",
    "RequestError",
    "Task",
    "load_engine",
]


def load_engine(name: str, *, role: str, model: str, device: str, options: Mapping[str, OptionValue]) -> Engine:
    """Build and warm up an engine. Imports its libraries only now. Raises EngineError."""
    if role not in ("target", "drafter"):
        raise EngineError(f"unknown role {role!r}: a worker is a target or a drafter")
    if name == "timed":
        from dsi_workers.engines.timed import TimedEngine

        return TimedEngine(options, drafter=role == "drafter")
    if name == "ngram":
        from dsi_workers.engines.ngram import NgramEngine

        if role != "drafter":
            raise EngineError("the ngram engine only drafts: give it --role drafter")
        return NgramEngine(options)
    if name == "transformers":
        from dsi_workers.engines.transformers import TransformersEngine

        engine = TransformersEngine(model, device=device, drafter=role == "drafter", options=options)
        if role == "drafter" and options.get("target"):
            from dsi_workers.engines.translating import in_vocabulary_of

            return in_vocabulary_of(str(options["target"]), engine, model)
        return engine
    raise EngineError(f"unknown engine {name!r}: choose one of {', '.join(ENGINES)}")

"""The engines, and the one place that knows their names."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from dsi_protocol import OptionValue
from dsi_workers.engine import Engine, EngineError, EngineInfo, Interrupt, Interrupted, RequestError, Task
from dsi_workers.models.files import ModelError

ENGINES = ("transformers", "timed", "ngram")
_LIBRARIES = {"transformers": ("torch", "transformers")}

__all__ = [
    "ENGINES",
    "Engine",
    "EngineError",
    "EngineInfo",
    "Interrupt",
    "Interrupted",
    "RequestError",
    "Task",
    "check_installed",
    "load_engine",
]


def load_engine(name: str, *, role: str, model: str, device: str, options: Mapping[str, OptionValue]) -> Engine:
    """Build and warm up an engine. Imports its libraries only now. Raises EngineError."""
    if role not in ("target", "drafter"):
        raise EngineError(f"unknown role {role!r}: a worker is a target or a drafter")
    try:
        return _load(name, role, model, device, options)
    except ModelError as error:
        raise EngineError(str(error)) from None


def check_installed(name: str) -> None:
    """Raises EngineError if the engine's libraries are not installed: known at once, without importing them."""
    missing = [each for each in _LIBRARIES.get(name, ()) if not _is_installed(each)]
    if missing:
        raise EngineError(
            f"a worker that runs a model needs {missing[0]}: pip install 'dsi-actors[torch]' where the worker runs"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def _load(name: str, role: str, model: str, device: str, options: Mapping[str, OptionValue]) -> Engine:
    if name == "timed":
        from dsi_workers.engines.timed import TimedEngine

        return TimedEngine(options, drafter=role == "drafter")
    if name == "ngram":
        from dsi_workers.engines.ngram import NgramEngine

        if role != "drafter":
            raise EngineError("the ngram engine only drafts: give it --role drafter")
        return NgramEngine(options)
    if name == "transformers":
        check_installed(name)
        from dsi_workers.engines.loading import load_model_engine

        engine = load_model_engine(model, device=device, drafter=role == "drafter", options=options)
        if role == "drafter" and options.get("target"):
            from dsi_workers.engines.translating import in_vocabulary_of

            return in_vocabulary_of(str(options["target"]), engine, model)
        return engine
    raise EngineError(f"unknown engine {name!r}: choose one of {', '.join(ENGINES)}")

"""The engines by name: those of this package, and those that other installed packages bring (installed.py)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from dsi_protocol import OptionValue
from dsi_workers.engine import Engine, EngineError, EngineInfo, Interrupt, Interrupted, RequestError, Task
from dsi_workers.engines.installed import EngineFactory, installed_factory, installed_names
from dsi_workers.models.files import ModelError

__all__ = [
    "Engine",
    "EngineError",
    "EngineFactory",
    "EngineInfo",
    "Interrupt",
    "Interrupted",
    "RequestError",
    "Task",
    "check_installed",
    "check_known",
    "engine_names",
    "load_engine",
]

#: The libraries of an engine, and the extra that brings each.
_LIBRARIES = {
    "transformers": {"torch": "torch", "transformers": "torch"},
    "llama-cpp": {"torch": "torch", "transformers": "torch", "llama_cpp": "llama-cpp"},
}


def engine_names() -> list[str]:
    """The names of all engines that can be loaded here: the engines of this package first. Imports none of them."""
    return [*_OWN, *(name for name in installed_names() if name not in _OWN)]


def check_known(name: str) -> None:
    """Raises EngineError if no engine of this name is installed here. Imports no engine."""
    if name not in _OWN and name not in installed_names():
        raise _unknown(name)


def check_installed(name: str) -> None:
    """Raises EngineError if the engine's libraries are not installed. Does not import the libraries."""
    missing = {module: extra for module, extra in _LIBRARIES.get(name, {}).items() if not _is_installed(module)}
    if missing:
        module, extras = next(iter(missing)), ",".join(dict.fromkeys(missing.values()))
        raise EngineError(
            f"a worker that runs a model needs {module}: pip install 'dsi-actors[{extras}]' where the worker runs"
        )


def load_engine(name: str, *, role: str, model: str, device: str, options: Mapping[str, OptionValue]) -> Engine:
    """Build and warm up the engine `name`. The engine's libraries are imported only now. Raises EngineError.

    Every argument may have come over the wire.
    """
    if role not in ("target", "drafter"):
        raise EngineError(f"unknown role {role!r}: a worker is a target or a drafter")
    if "," in device and name != "transformers":
        raise EngineError(f"the engine {name} computes on one device: start a worker for each of {device}")
    factory = _OWN.get(name) or installed_factory(name)
    if factory is None:
        raise _unknown(name)
    try:
        engine: object = factory(role=role, model=model, device=device, options=options)
    except ModelError as error:
        raise EngineError(str(error)) from None
    if not isinstance(engine, Engine):
        raise EngineError(
            f"the factory of the engine {name!r} gives a {type(engine).__name__}: it must give a dsi_workers.engine.Engine"
        )
    return engine


def _unknown(name: str) -> EngineError:
    return EngineError(
        f"unknown engine {name!r}: choose one of {', '.join(engine_names())}, or pip install the package that brings it "
        "where the worker runs"
    )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def _transformers(*, role: str, model: str, device: str, options: Mapping[str, OptionValue]) -> Engine:
    check_installed("transformers")
    from dsi_workers.engines.loading import load_model_engine

    engine = load_model_engine(model, device=device, drafter=role == "drafter", options=options)
    return _in_targets_vocabulary(engine, role, model, options)


def _llama_cpp(*, role: str, model: str, device: str, options: Mapping[str, OptionValue]) -> Engine:
    check_installed("llama-cpp")
    from dsi_workers.engines.llama_cpp import load_llama_engine

    engine = load_llama_engine(model, device=device, drafter=role == "drafter", options=options)
    return _in_targets_vocabulary(engine, role, model, options)


def _in_targets_vocabulary(engine: Engine, role: str, model: str, options: Mapping[str, OptionValue]) -> Engine:
    """The engine; a drafter whose model has another vocabulary than the target answers in the target's."""
    if role != "drafter" or not options.get("target"):
        return engine
    from dsi_workers.engines.translating import in_vocabulary_of

    return in_vocabulary_of(str(options["target"]), engine, model)


def _timed(*, role: str, model: str, device: str, options: Mapping[str, OptionValue]) -> Engine:
    from dsi_workers.engines.timed import TimedEngine

    return TimedEngine(options, drafter=role == "drafter")


def _ngram(*, role: str, model: str, device: str, options: Mapping[str, OptionValue]) -> Engine:
    from dsi_workers.engines.ngram import NgramEngine

    if role != "drafter":
        raise EngineError("the ngram engine only drafts: give it --role drafter")
    return NgramEngine(options)


_OWN: dict[str, EngineFactory] = {
    "transformers": _transformers, "llama-cpp": _llama_cpp, "timed": _timed, "ngram": _ngram,
}  # fmt: skip

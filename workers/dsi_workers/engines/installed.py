"""Engines that other installed packages bring: Python entry points of the group `dsi_workers.engines` (docs/extending.md)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

from dsi_protocol import OptionValue
from dsi_workers.engine import Engine, EngineError

GROUP = "dsi_workers.engines"


class EngineFactory(Protocol):
    """Builds and warms up an engine."""

    def __call__(self, *, role: str, model: str, device: str, options: Mapping[str, OptionValue]) -> Engine:
        """`role` is target or drafter, `model` a model reference or empty, `device` a name such as cpu:0 or cuda:1.

        Raises EngineError if the engine cannot be built as asked, and ModelError if the model cannot be had.
        """


def installed_names() -> list[str]:
    """The names of the engines that installed packages bring, sorted. Imports nothing of these packages."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def installed_factory(name: str) -> EngineFactory | None:
    """The factory of the engine `name`, imported now; None if no installed package brings an engine of this name.

    `name` may have come over the wire. It is only compared with the installed names. What is imported is written in the
    metadata of an installed package. Raises EngineError if two packages bring the name, or if the import fails.
    """
    points = entry_points(group=GROUP, name=name)
    if not points:
        return None
    point, *others = points
    if others:
        packages = " and by ".join(map(_package_of, points))
        raise EngineError(f"the engine {name!r} is brought by {packages}: uninstall all but one")
    try:
        return cast(EngineFactory, point.load())
    except (ImportError, AttributeError) as error:
        raise EngineError(
            f"the engine {name!r} of the package {_package_of(point)} cannot be imported ({type(error).__name__}: {error}): "
            "reinstall the package, with what it depends on"
        ) from error


def _package_of(point: EntryPoint) -> str:
    return "?" if point.dist is None else point.dist.name

"""Reads the options of an engine."""

from __future__ import annotations

from collections.abc import Mapping

from dsi_protocol import OptionValue
from dsi_workers.engine import EngineError


def whole_option(options: Mapping[str, OptionValue], name: str, default: int = 1, *, most: int = 1 << 24) -> int:
    """The option `name`, a whole number in [1, most]. Raises EngineError."""
    value = options.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise EngineError(f"option {name} must be a whole number in [1, {most}], not {value!r}")
    return value

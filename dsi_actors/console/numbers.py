"""Options that are lists of numbers, such as `--sp 1,2,4`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dsi_actors.errors import ConfigError

N = TypeVar("N", int, float)


def numbers(text: str, option: str, kind: Callable[[str], N], least: N, most: N) -> list[N]:
    """The numbers of `text`, at least one. Raises ConfigError, which names the option, if one is not in [least, most]."""
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is no list of numbers: put commas between them, as in 1,2,4") from None
    if not all(least <= number <= most for number in found):
        raise ConfigError(f"{option} {text}: each must lie in [{least:g}, {most:g}]")
    return found

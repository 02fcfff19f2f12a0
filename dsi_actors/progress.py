"""What is going on until the first request can be answered: fetching, converting, starting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

#: Told what is being done, the part of it that is done (0 to 1; None: not known), and details. Must return at once.
Report: TypeAlias = Callable[[str, float | None, str], None]

_STEPS = 10


def unreported(what: str, done: float | None, detail: str) -> None:
    """The Report of those who do not want one."""


class ProgressLines:
    """A Report as lines of text: one for each thing that is done and each tenth of it, and one for each news of things whose
    end is not known."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._last: tuple[str, object] = ("", None)

    def __call__(self, what: str, done: float | None, detail: str) -> None:
        news = (what, detail if done is None else int(done * _STEPS))
        if news != self._last:
            self._last = news
            part = "" if done is None else f" {done:.0%}"
            self._write(f"{what}{part}{f' ({detail})' if detail else ''}")

"""What commands print with: tables and text on standard output, progress on standard error."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """The library would end the process itself."""
        raise BrokenPipeError


#: As wide as any table here. A pipe has no width, and nothing that goes through it shall be cut.
_PIPE_COLUMNS = 1000


def terminal(*, stderr: bool = False, **settings: Any) -> Console:
    """Brackets are brackets: they stand in IPv6 addresses and in names of models."""
    if not (sys.stderr if stderr else sys.stdout).isatty() and "COLUMNS" not in os.environ:
        settings["width"] = _PIPE_COLUMNS
    return _Console(stderr=stderr, highlight=False, markup=False, **settings)


def can_show(text: str, on: Console) -> bool:
    """Whether its encoding has these characters."""
    try:
        text.encode(on.encoding)
    except UnicodeEncodeError:
        return False
    return True

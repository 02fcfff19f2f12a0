"""How long verification waits for drafts that do not come: a drafter may hang, or read a long prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

#: Drafts are late after so many times the time that they should take, and not before so many seconds.
_LATE_FACTOR, _LATE_S = 10.0, 0.05
#: The same where it is not known how long they should take.
_LATE_UNKNOWN_S = 0.5


class DraftPatience:
    """A clock that runs while somebody waits for drafts, from the last that came. `on_late` is called when it has run out."""

    def __init__(self, on_late: Callable[[], None]) -> None:
        self._on_late = on_late
        self._clock: asyncio.TimerHandle | None = None

    def mind(self, *, waits: bool, arrived: bool, expected_ms: float) -> None:
        """Call when anything happened. `expected_ms`: what is waited for should take so long; 0: who knows."""
        if not waits or arrived:
            self.end()
        if waits and self._clock is None:
            patience_s = max(_LATE_S, _LATE_FACTOR * expected_ms / 1e3) if expected_ms else _LATE_UNKNOWN_S
            self._clock = asyncio.get_running_loop().call_later(patience_s, self._ran_out)

    def end(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _ran_out(self) -> None:
        self._clock = None
        self._on_late()

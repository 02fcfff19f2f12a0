"""How long a verification waits for drafts that do not come: the drafter may hang, or read a long prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

#: Drafts are late after this multiple of the time that they should take, and not before this many seconds.
_LATE_FACTOR, _LATE_S = 10.0, 0.05
#: The same where it is not known how long they should take.
_LATE_UNKNOWN_S = 0.5


class DraftTimeout:
    """Calls `on_late` when a verification has waited too long since the last draft came."""

    def __init__(self, on_late: Callable[[], None]) -> None:
        self._on_late = on_late
        self._timer: asyncio.TimerHandle | None = None

    def update(self, *, waits: bool, arrived: bool, expected_ms: float) -> None:
        """Start, restart or stop the timer. Call after each event.

        `waits`: a verification waits for drafts. `arrived`: this event brought drafts. `expected_ms`: how long the
        drafts should take; 0 if that is not known.
        """
        if not waits or arrived:
            self.end()
        if waits and self._timer is None:
            timeout_s = max(_LATE_S, _LATE_FACTOR * expected_ms / 1e3) if expected_ms else _LATE_UNKNOWN_S
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire)

    def end(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        self._on_late()

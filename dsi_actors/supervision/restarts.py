"""When a worker that died is started again: at once, later and later if it dies at its start, and not for ever."""

from __future__ import annotations

from collections import deque

_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 30.0
#: One that has served for so long does not die of how it starts.
_SERVED_WELL_S = 5.0


class RestartBudget:
    """At most `most` restarts within `window_s` seconds. Of those within the window the first is made at once, the n-th
    after a delay that doubles with n; without delay if the worker had served for a while."""

    def __init__(self, most: int, window_s: float) -> None:
        self._most = most
        self._window_s = window_s
        self._restarts: deque[float] = deque()

    def delay_s(self, now_s: float, served_s: float = 0.0) -> float | None:
        """How long to wait before the restart of a worker that was ready for `served_s`. None: the budget is used up."""
        while self._restarts and self._restarts[0] <= now_s - self._window_s:
            self._restarts.popleft()
        recent = len(self._restarts)
        if recent >= self._most:
            return None
        self._restarts.append(now_s)
        return (
            0.0
            if recent == 0 or served_s >= _SERVED_WELL_S
            else min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** (recent - 1))
        )

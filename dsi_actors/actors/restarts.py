"""When a worker that died is started again: at once, then later and later, and not for ever."""

from __future__ import annotations

from collections import deque

_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 30.0


class RestartBudget:
    """At most `most` restarts within `window_s` seconds. Of those within the window the first is made at once, the n-th
    after a delay that doubles with n."""

    def __init__(self, most: int, window_s: float) -> None:
        self._most = most
        self._window_s = window_s
        self._restarts: deque[float] = deque()

    def delay_s(self, now_s: float) -> float | None:
        """How long to wait before the restart that is wanted now. None: the budget is used up."""
        while self._restarts and self._restarts[0] <= now_s - self._window_s:
            self._restarts.popleft()
        recent = len(self._restarts)
        if recent >= self._most:
            return None
        self._restarts.append(now_s)
        return 0.0 if recent == 0 else min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** (recent - 1))

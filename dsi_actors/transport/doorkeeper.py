"""Who is heard: a flood of frames from peers that are no workers costs the running generations next to nothing.

A frame of a stranger is decoded only as long as the stranger keeps to a modest rate; what is over it is dropped unread. A
worker that is ready may say much more, but not without end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

#: A Hello twice a second and a heartbeat every 10 ms are well below this.
_STRANGER_FRAMES_PER_S = 200.0
#: The longest Hello that the wire format allows, and then some.
_STRANGER_BYTES = 32 * 1024
_MAX_STRANGERS = 4096
#: More than an orchestrator can ask for.
_WORKER_FRAMES_PER_S = 10_000.0


class TokenBucket:
    """`burst` at once, then `per_s`."""

    __slots__ = ("_burst", "_last_s", "_left", "_per_s")

    def __init__(self, burst: float, per_s: float, now_s: float) -> None:
        self._burst = self._left = burst
        self._per_s = per_s
        self._last_s = now_s

    def take(self, now_s: float) -> bool:
        """Whether one more is within the limit at `now_s`."""
        self._left = min(self._burst, self._left + (now_s - self._last_s) * self._per_s)
        self._last_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Doorkeeper:
    """Says of each frame whether it is worth decoding. `on_flood` is told of workers that send too much."""

    def __init__(self, clock: Callable[[], float], on_flood: Callable[[bytes], None]) -> None:
        self._clock = clock
        self._on_flood = on_flood
        self._workers: dict[bytes, TokenBucket] = {}
        self._strangers: OrderedDict[bytes, TokenBucket] = OrderedDict()
        self.turned_away = 0

    def trust(self, identity: bytes) -> None:
        """This peer is a worker that is ready."""
        self._workers[identity] = TokenBucket(_WORKER_FRAMES_PER_S, _WORKER_FRAMES_PER_S, self._clock())
        self._strangers.pop(identity, None)

    def forget(self, identity: bytes) -> None:
        """It is a stranger again."""
        self._workers.pop(identity, None)

    def lets_in(self, identity: bytes, size_bytes: int) -> bool:
        """False for what is dropped unread."""
        now_s = self._clock()
        worker = self._workers.get(identity)
        if worker is not None:
            if worker.take(now_s):
                return True
            self._on_flood(identity)
        elif size_bytes <= _STRANGER_BYTES and self._stranger(identity, now_s).take(now_s):
            return True
        self.turned_away += 1
        return False

    def _stranger(self, identity: bytes, now_s: float) -> TokenBucket:
        bucket = self._strangers.get(identity)
        if bucket is None:
            bucket = TokenBucket(_STRANGER_FRAMES_PER_S, _STRANGER_FRAMES_PER_S, now_s)
            self._strangers[identity] = bucket
            if len(self._strangers) > _MAX_STRANGERS:
                self._strangers.popitem(last=False)
        return bucket

"""Who is heard: a flood of frames from peers that are no workers costs the running generations next to nothing.

A frame of a stranger is decoded only as long as the stranger keeps to a modest rate; what is over it is dropped unread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container

#: A Hello twice a second and a heartbeat every 10 ms are well below this.
_STRANGER_FRAMES_PER_S = 200.0
_STRANGER_BURST = 200.0
#: The longest Hello that the wire format allows, and then some.
_STRANGER_BYTES = 32 * 1024
_MAX_STRANGERS = 4096


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
    """Says of each frame whether it is worth decoding. `workers`: the identities of those that were let in."""

    def __init__(self, workers: Container[bytes], clock: Callable[[], float]) -> None:
        self._workers = workers
        self._clock = clock
        self._strangers: OrderedDict[bytes, TokenBucket] = OrderedDict()
        self.turned_away = 0

    def lets_in(self, identity: bytes, size_bytes: int) -> bool:
        """False for what is dropped unread."""
        if identity in self._workers:
            return True
        if size_bytes <= _STRANGER_BYTES and self._bucket(identity).take(self._clock()):
            return True
        self.turned_away += 1
        return False

    def _bucket(self, identity: bytes) -> TokenBucket:
        bucket = self._strangers.get(identity)
        if bucket is None:
            bucket = self._strangers[identity] = TokenBucket(_STRANGER_BURST, _STRANGER_FRAMES_PER_S, self._clock())
            if len(self._strangers) > _MAX_STRANGERS:
                self._strangers.popitem(last=False)
        return bucket

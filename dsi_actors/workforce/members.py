"""Who belongs to the workforce, and who does not any more: by connection, and by incarnation, which a worker draws anew whenever
its process starts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from dsi_actors.config import Config
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import Goodbye, Hello, Welcome

#: A library that loads can keep every thread of its process waiting, and so its heart.
_LOADING_PATIENCE_S = 30.0
#: A broken connection may come back for so long. What was lost with it is sent again.
_RECONNECT_S = 0.5
#: Incarnations that were dropped and may not come back.
_MAX_REMEMBERED_DISMISSALS = 1024
_MAX_REMEMBERED_FAILURES = 256


@dataclass(slots=True)
class Member:
    """What is known of a worker beside its handle."""

    worker: WorkerHandle
    welcome: Welcome
    heard_s: float
    #: Since when it loads: it was welcomed then, or last said that it still prepares its model.
    since_s: float
    #: A Welcome that has had no Ready for so long is sent again: either may be lost.
    greet_again_s: float
    #: Since when it cannot be reached: its connection is broken, and may come back.
    unreachable_s: float | None = None

    def why_dead(self, now_s: float, config: Config) -> str | None:
        """None: it lives, as far as we know."""
        worker, patience_s = self.worker, config.silence_ms / 1e3
        silence_s, loads = now_s - self.heard_s, worker.ready is None
        if silence_s > (max(patience_s, _LOADING_PATIENCE_S) if loads else patience_s):
            return f"it was silent for {silence_s:.1f} s"
        if self.unreachable_s is not None and now_s - self.unreachable_s > _RECONNECT_S:
            return "its connection is gone"
        if worker.owes_since(now_s - worker.may_take_s(patience_s, config.request_timeout_s)):
            return "it did not answer"
        if loads and now_s - self.since_s > config.ready_timeout_s:
            return f"it was not ready after {config.ready_timeout_s:g} s"
        return None


class Members:
    def __init__(self) -> None:
        self._by_identity: dict[bytes, Member] = {}
        self._by_incarnation: dict[int, Member] = {}
        self._dismissed: OrderedDict[int, Goodbye] = OrderedDict()
        #: Why this incarnation could not serve, in its own words.
        self.failures: OrderedDict[int, str] = OrderedDict()

    def __iter__(self) -> Iterator[Member]:
        """A copy: members may be dropped meanwhile."""
        return iter(list(self._by_identity.values()))

    def __len__(self) -> int:
        return len(self._by_identity)

    @property
    def loading(self) -> int:
        """Those that are not ready yet."""
        return sum(member.worker.ready is None for member in self._by_identity.values())

    def at(self, identity: bytes) -> Member | None:
        """Who speaks through this connection."""
        return self._by_identity.get(identity)

    def of(self, incarnation: int) -> Member | None:
        return self._by_incarnation.get(incarnation)

    def farewell_to(self, incarnation: int) -> Goodbye | None:
        """What an incarnation that was dismissed is told whenever it speaks again; None if it was not."""
        return self._dismissed.get(incarnation)

    def add(self, member: Member) -> None:
        self._by_identity[member.worker.identity] = self._by_incarnation[member.worker.hello.incarnation] = member

    def dismiss(self, worker: WorkerHandle, farewell: Goodbye) -> None:
        incarnation = worker.hello.incarnation
        self._by_identity.pop(worker.identity, None)
        self._by_incarnation.pop(incarnation, None)
        self._dismissed[incarnation] = farewell
        if len(self._dismissed) > _MAX_REMEMBERED_DISMISSALS:
            self._dismissed.popitem(last=False)

    def failed(self, hello: Hello, reason: str) -> None:
        self.failures[hello.incarnation] = reason
        if len(self.failures) > _MAX_REMEMBERED_FAILURES:
            self.failures.popitem(last=False)

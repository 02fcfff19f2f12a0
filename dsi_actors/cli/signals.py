"""What ends a service: SIGTERM, SIGINT (Ctrl-C) and SIGHUP. However often they come, workers and sockets are cleaned up."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from types import TracebackType
from typing import Protocol

_SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class Drainable(Protocol):
    async def drain(self) -> None:
        """Finish what was begun, then end."""

    def hurry(self) -> None:
        """End now, also while `drain` waits."""


class EndingSignals:
    """While the block runs, the first signal drains the service, and a second one ends it at once.

    Before there is a service (see `drains`) the first signal cancels the task that entered the block.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._service: Drainable | None = None
        self._task: asyncio.Task[None] | asyncio.Task[object] | None = None
        self._draining: asyncio.Task[None] | None = None

    def __enter__(self) -> EndingSignals:
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                with contextlib.suppress(NotImplementedError):  # Windows
                    loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """A cancellation by a signal ends here: it has a status."""
        for number in _SIGNALS:
            with contextlib.suppress(NotImplementedError):
                asyncio.get_running_loop().remove_signal_handler(number)
        return kind is asyncio.CancelledError and bool(self._received)

    def drains(self, service: Drainable) -> None:
        """From here on signals end this service, and no longer the task."""
        self._service = service

    @property
    def status(self) -> int:
        """The exit status: 0 after a drain, else, as shells have it, 128 and the signal that cut things short."""
        if self._service is None:
            return 128 + self._received[0] if self._received else 0
        return 128 + self._received[1] if len(self._received) > 1 else 0

    def _on_signal(self, number: int) -> None:
        self._received.append(number)
        first = len(self._received) == 1
        if self._service is None:
            if first and self._task is not None:
                self._task.cancel()
        elif self._draining is None:
            self._draining = asyncio.create_task(self._service.drain())
        else:
            self._service.hurry()

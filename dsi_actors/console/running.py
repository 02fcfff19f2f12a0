"""Runs a command to its end, or to the signal that ends it before: then it cleans up, and no process of its is left."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import weakref
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Protocol

import uvloop

from dsi_actors.errors import DsiError

#: What `dsi-actors` calls when it has read the options. It gives the exit status.
Command = Callable[[argparse.Namespace], int | Coroutine[Any, Any, int]]

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_S = 0.2


class Drainable(Protocol):
    """A service: what it has begun for others should be finished before it ends."""

    async def drain(self) -> None:
        """Finish what was begun, then end."""

    def hurry(self) -> None:
        """End now, also while `drain` waits."""


class EndedBySignal(KeyboardInterrupt):
    """A signal asked this process to end. Like Ctrl-C's own exception it passes through task groups as it is."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """As shells give it for a process that a signal ended."""
        return 128 + self.number


def run(command: Command, arguments: argparse.Namespace) -> int:
    """The command's exit status. Raises EndedBySignal once everything is cleaned up."""
    with _noticed() as ending:
        arguments.ending = ending
        try:
            result = command(arguments)
            return result if isinstance(result, int) else _awaited(result, ending)
        except (asyncio.CancelledError, DsiError):
            if ending.number:  # whatever it says, this is why
                raise EndedBySignal(ending.number) from None
            raise


def _awaited(command: Coroutine[Any, Any, int], ending: Ending) -> int:
    async def awaited() -> int:
        ending.task = asyncio.current_task()
        return await command

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(awaited())


class Ending:
    """The handler of these signals. The first one cancels the command's task, or interrupts it where it does not wait. A
    service (`drains`) is drained by the first one and ended at once by the second."""

    def __init__(self) -> None:
        #: The signal that came, or 0.
        self.number = 0
        self.task: asyncio.Task[int] | None = None
        self._cancelled = False
        self._raised: weakref.ref[EndedBySignal] | None = None
        self._service: Drainable | None = None
        self._draining: asyncio.Task[None] | None = None
        #: The signal that ended a service before it was drained, or 0.
        self.hurried_by = 0

    def drains(self, service: Drainable) -> None:
        """From here on a signal drains this service, and the command returns by itself."""
        self._service = service

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._service is not None:
            assert self.task is not None
            self.task.get_loop().call_soon_threadsafe(self._end_service, self._service, number)
        elif not self.number:
            self.number = number
            signal.setitimer(signal.ITIMER_REAL, _LOOK_S, _LOOK_S)
            self._end()
        elif number == signal.SIGINT:  # Ctrl-C again: at once
            raise EndedBySignal(number)

    def look_again(self, number: int, frame: FrameType | None) -> None:
        """An exception that is raised inside a finalizer, or while a process is started, is lost: then its object is gone."""
        if not self._cancelled and (self._raised is None or self._raised() is None):
            self._end()

    def _end_service(self, service: Drainable, number: int) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(service.drain())
        else:
            self.hurried_by = self.hurried_by or number
            service.hurry()

    def _end(self) -> None:
        task = self.task
        if task is None or asyncio.current_task(task.get_loop()) is task:
            error = EndedBySignal(self.number)
            self._raised = weakref.ref(error)
            raise error
        self._cancelled = True
        if not task.done():
            task.cancel()
            task.get_loop().call_soon_threadsafe(lambda: None)  # wakes the loop up


def _report_lost(lost: sys.UnraisableHookArgs) -> None:
    if not isinstance(lost.exc_value, EndedBySignal):
        sys.__unraisablehook__(lost)


@contextlib.contextmanager
def _noticed() -> Iterator[Ending]:
    """While it lasts. Signals that are ignored stay so: under nohup, or in the background of a script."""
    ending = Ending()
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    before_timer = signal.signal(signal.SIGALRM, ending.look_again)
    before_hook, sys.unraisablehook = sys.unraisablehook, _report_lost
    for number in ours:
        signal.signal(number, ending)
    try:
        yield ending
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before_timer)
        sys.unraisablehook = before_hook
        for number in ours:
            signal.signal(number, before[number])

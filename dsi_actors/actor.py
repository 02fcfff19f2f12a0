"""An actor: a mailbox, a synchronous `receive`, and tasks that each return exactly one message to the mailbox.

`receive` never awaits, so messages are handled one at a time and to the end: no lock is needed, and a cancel is never
stuck behind slow work. What is slow is a task in the actor's own task group (`spawn`). Messages are taken from the
mailbox by a callback of the event loop, not by a task: that costs about a microsecond.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

M = TypeVar("M")


class MailboxFull(Exception):
    """Back-pressure: the receiver is so far behind that nothing more is accepted. Nothing was lost, nothing was taken."""


class Actor(ABC, Generic[M]):
    """Subclass, implement `receive`, `await run()` in a task of the parent's (see `start_child`)."""

    def __init__(self, name: str, *, mailbox_size: int = 4096) -> None:
        self.name = name
        self._mailbox_size = mailbox_size
        self._control: deque[M] = deque()
        self._messages: deque[M] = deque()
        self._drain_scheduled = False
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._end: asyncio.Future[None] | None = None
        self.ended = False

    @abstractmethod
    def receive(self, message: M) -> None:
        """Handle one message. An exception here ends the actor and reaches its parent."""

    def tell(self, message: M, *, control: bool = False) -> None:
        """Put a message into the mailbox; `control` goes before all others. Raises MailboxFull. The dead hear nothing."""
        if self.ended:
            return
        if control:
            self._control.append(message)
        elif len(self._messages) < self._mailbox_size:
            self._messages.append(message)
        else:
            raise MailboxFull(f"{self.name} has {self._mailbox_size} messages waiting")
        self._schedule_drain()

    @property
    def has_control(self) -> bool:
        """True if the mailbox holds control messages that were not handled yet."""
        return bool(self._control)

    def deliver(self, message: M) -> None:
        """Handle the message before this returns, unless one is being handled or others wait: then after those.

        For what arrives from outside, in a callback of the event loop: a reply costs no further turn of the loop. There
        is no limit, since only what was asked for comes this way.
        """
        if self.ended:
            return
        self._messages.append(message)
        if self._end is not None and not self._draining:
            self._drain()

    def fail(self, error: BaseException) -> None:
        """End the actor with this error, as if it had been raised in `receive`."""
        self.ended = True
        if self._end is None or self._end.done():
            raise error
        self._end.set_exception(error)

    def spawn(self, work: Coroutine[Any, Any, M]) -> None:
        """Run `work` in the actor's task group; the message it returns comes to the mailbox. An exception ends the actor."""
        assert self._group is not None, "spawn is for a running actor"
        if self.ended:
            work.close()
            return
        task = self._group.create_task(self._mail_result(work), name=self.name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # a task that was cancelled before its first step never ran it

    def start_child(self, child: Actor[Any], on_end: Callable[[BaseException | None], M]) -> None:
        """Own `child`: it runs in this actor's task group, and its end, with the error if any, comes to the mailbox."""
        self.spawn(_run_to_end(child, on_end))

    def stop(self) -> None:
        """End the actor: its tasks are cancelled, messages that wait are dropped."""
        if self._end is not None and not self._end.done():
            self._end.set_result(None)
        self.ended = True

    async def run(self) -> None:
        """Live until `stop`, an exception in `receive` or in a task (raised from here), or cancellation."""
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.create_future()
        if self.ended:
            return
        try:
            async with asyncio.TaskGroup() as self._group:
                try:
                    self.on_start()
                    self._schedule_drain()
                    await self._end
                finally:
                    self.ended = True
                    for task in self._tasks:
                        task.cancel()
        finally:
            self.ended = True
            self.on_stop()

    def on_start(self) -> None:
        """Called once when the actor runs, before any message: `spawn` and `start_child` work from here on. An exception
        here ends the actor and reaches its parent."""

    def on_stop(self) -> None:
        """Called once when the actor has ended, whatever the reason. Give back what is held."""

    def _schedule_drain(self) -> None:
        if self._loop is not None and not self._drain_scheduled and (self._control or self._messages):
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_scheduled = False
        if self._draining:
            return
        self._draining = True
        try:
            while not self.ended:
                if self._control:
                    self.receive(self._control.popleft())
                elif self._messages:
                    self.receive(self._messages.popleft())
                else:
                    return
        except BaseException as error:
            self.fail(error)
        finally:
            self._draining = False

    async def _mail_result(self, work: Coroutine[Any, Any, M]) -> None:
        message = await work
        if not self.ended:  # what an actor's own tasks return needs no limit: it started them
            self._messages.append(message)
            self._schedule_drain()


async def _run_to_end(child: Actor[Any], on_end: Callable[[BaseException | None], M]) -> M:
    try:
        await child.run()
    except ExceptionGroup as group:  # a task group wraps even a single error
        return on_end(group.exceptions[0] if len(group.exceptions) == 1 else group)
    except Exception as error:
        return on_end(error)
    return on_end(None)

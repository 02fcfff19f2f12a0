"""What all requests share and none may use up: places for generations, memory for bodies, and threads for slow work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from dsi_actors.errors import TooManyGenerations
from dsi_actors.serving.errors import ApiError, unavailable

Result = TypeVar("Result")

#: Work on no more bytes than this takes milliseconds and never waits for longer work.
_SHORT_WORK_BYTES = 1 << 15
#: Threads for longer work. A client has one of them at most.
_LONG_WORK_THREADS = 2


class Places:
    """Generations that may wait or run. A request with n choices for each prompt gets places for all, or none and an error."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @contextmanager
    def take(self, wanted: int) -> Iterator[None]:
        """Raises ApiError for more than there are, and TooManyGenerations for more than are free."""
        if wanted > self.limit:
            raise ApiError(
                400, f"n and prompt ask for {wanted} generations, but this service takes at most {self.limit} generations "
                "at once (--max-queue): ask for fewer", param="n",
            )  # fmt: skip
        if self.taken + wanted > self.limit:
            raise TooManyGenerations(f"{self.taken} of {self.limit} places are taken: try again later")
        self.taken += wanted
        try:
            yield
        finally:
            self.taken -= wanted


class BodyMemory:
    """Bytes of request bodies that are read or prepared at the moment, all together."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Call what this gives with the size of each piece. Raises ApiError from there when memory is used up."""
        mine = 0

        def add(size: int) -> None:
            nonlocal mine
            if self.held_bytes + size > self._limit_bytes:
                raise unavailable(
                    f"the bodies of all requests take over {self._limit_bytes} bytes: try again later", close=True
                )
            mine += size
            self.held_bytes += size

        try:
            yield add
        finally:
            self.held_bytes -= mine


class FairThreads:
    """Runs work outside of the event loop: short work at once, longer work with one turn at a time for each client.

    So a client that sends many long prompts delays its own ones, and another client waits for one of them at most. A
    turn ends when the thread is done, also if nobody waits for the result any more.
    """

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, "dsi-short")
        self._long = ThreadPoolExecutor(_LONG_WORK_THREADS, "dsi-long")
        self._turns: dict[Hashable, tuple[asyncio.Lock, int]] = {}  # and how many hold or await it

    async def run(self, client: Hashable, size_bytes: int, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises. `size_bytes` says how long it takes, roughly."""
        if size_bytes <= _SHORT_WORK_BYTES:
            return await _result(self._short.submit(work))
        turn = self._join(client)
        try:
            await turn.acquire()
        except BaseException:
            self._leave(client)
            raise

        def over(done: asyncio.Future[Result]) -> None:
            _ = done.cancelled() or done.exception()  # whoever awaits the result is told of it
            turn.release()
            self._leave(client)

        running = self._long.submit(work)
        asyncio.wrap_future(running).add_done_callback(over)
        return await _result(running)

    def close(self) -> None:
        """Work that waits is dropped. Nothing waits for work that runs."""
        self._short.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)

    def _join(self, client: Hashable) -> asyncio.Lock:
        turn, users = self._turns.get(client, (asyncio.Lock(), 0))
        self._turns[client] = turn, users + 1
        return turn

    def _leave(self, client: Hashable) -> None:
        turn, users = self._turns[client]
        if users > 1:
            self._turns[client] = turn, users - 1
        else:
            del self._turns[client]


async def _result(running: Future[Result]) -> Result:
    """Of work in a thread. Work that has not begun is dropped when the caller is cancelled."""
    return await asyncio.wrap_future(running)

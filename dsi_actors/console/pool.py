"""Processes that compute for a command, and end with it."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from dsi_actors.console.running import ENDING_SIGNALS

Result = TypeVar("Result")


@contextlib.contextmanager
def process_pool(processes: int, *, start: str | None = None) -> Iterator[ProcessPoolExecutor]:
    """`start` is one of multiprocessing's start methods. Leaving the block by an exception kills what still computes."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context(start), initializer=_end_with_the_command
    )
    try:
        # A copy of this process must not meet a signal before it is told what to do with it, nor this one while it is copied.
        with _undisturbed():
            pool.submit(int)
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        # Wait for the pool's thread: Python wakes that thread at the exit, which fails while the thread closes its pipe.
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


async def results_in(pool: ProcessPoolExecutor, calls: Iterable[Callable[[], Result]]) -> list[Result]:
    """The results of `calls`, computed in the processes of the pool, in the same order.

    The caller awaits them, so that a signal cancels the caller. Otherwise the signal's exception could interrupt Python just
    after Python took a lock of a future. That lock would stay locked, and the pool's thread would wait for the lock for ever.
    """
    loop = asyncio.get_running_loop()
    with _undisturbed():
        results = asyncio.gather(*(loop.run_in_executor(pool, call) for call in calls))
    # Shielded: when its processes are killed, the pool's thread fails on a future that was cancelled (Python 3.11).
    results.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return await asyncio.shield(results)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that end a command come after the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end_with_the_command() -> None:
    """In each process. The signals of a terminal are for the command: it ends this process, however it ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_its_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_its_end, name="parent", daemon=True).start()

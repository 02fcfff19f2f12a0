"""Processes that compute for a command."""

from __future__ import annotations

import asyncio
import multiprocessing
import operator
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from dsi_actors.console.pool import process_pool, results_in
from support.patience import until


def begin(file: Path) -> None:
    file.touch()
    time.sleep(3600)


async def test_results_come_in_the_order_of_the_calls() -> None:
    with process_pool(2) as pool:
        assert await results_in(pool, [partial(operator.add, number, 1) for number in range(20)]) == list(range(1, 21))


async def test_a_cancel_ends_what_computes(tmp_path: Path) -> None:
    before, begun = set(multiprocessing.active_children()), tmp_path / "begun"

    async def compute() -> None:
        with process_pool(2) as pool:
            await results_in(pool, [partial(begin, begun)] * 9)

    computing = asyncio.create_task(compute())
    await until(begun.exists)
    computing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await computing
    assert set(multiprocessing.active_children()) == before


async def test_processes_that_are_killed_after_a_cancel_fail_no_thread(tmp_path: Path) -> None:
    """An exception in the pool's thread would be a warning of pytest, and so an error."""
    before, begun = set(multiprocessing.active_children()), tmp_path / "begun"
    threads = set(threading.enumerate())
    with process_pool(2) as pool:
        computing = asyncio.create_task(results_in(pool, [partial(begin, begun)] * 9))
        await until(begun.exists)
        computing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await computing
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        await until(lambda: set(threading.enumerate()) <= threads)


async def test_an_error_of_a_call_is_raised() -> None:
    with pytest.raises(ZeroDivisionError), process_pool(1) as pool:
        await results_in(pool, [partial(operator.truediv, 1, 0)])

"""Test support: how long a test waits before it gives up, on any machine and beside any load.

A test waits for a condition or an event, never for a time. A limit ends a test that would hang, so it is generous: what an
idle machine needs at most, times `slowness()`. docs/testing.md tells how tests treat time.
"""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from dsi_actors.host.devices import cores

_Value = TypeVar("_Value")

#: What the fixed piece of work and the start of an interpreter take on an idle core of 2024.
_WORK_S, _START_S = 0.05, 0.03
_STEPS = 500_000
#: A measurement holds for so long: the load changes while tests run.
_FRESH_S = 15.0
#: How often a condition is looked at.
_LOOK_S = 0.005

_measured_at_s = -math.inf
_measured = 1.0


def measure() -> None:
    """Measure the slowness again unless that is fresh. Called before each test (conftest.py), outside of its event loop."""
    global _measured, _measured_at_s
    if time.monotonic() - _measured_at_s < _FRESH_S:
        return
    # Runnable processes for each core foretell what a burst of work, which a scheduler favours, does not feel yet.
    waiting = os.getloadavg()[0] / cores()
    _measured = max(1.0, _work_s() / _WORK_S, _start_s() / _START_S, waiting)
    _measured_at_s = time.monotonic()


def slowness() -> float:
    """How many times longer things take here and now than on an idle machine: at least 1."""
    return _measured


def _work_s() -> float:
    begun_s, total = time.perf_counter(), 0
    for step in range(_STEPS):
        total += step * step % 7
    return time.perf_counter() - begun_s


def _start_s() -> float:
    begun_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - begun_s


def limit_s(idle_s: float = 30.0) -> float:
    """The seconds to wait for what takes `idle_s` at most on an idle machine. For every deadline of a process or event."""
    return idle_s * slowness()


def patience(idle_s: float = 30.0) -> asyncio.Timeout:
    """`async with patience():` fails where its body hangs."""
    return asyncio.timeout(limit_s(idle_s))


async def until(condition: Callable[[], _Value], idle_s: float = 30.0) -> _Value:
    """The first true value of the condition."""
    async with patience(idle_s):
        while not (value := condition()):  # noqa: ASYNC110  most conditions are about other processes
            await asyncio.sleep(_LOOK_S)
    return value


def wait_until(condition: Callable[[], _Value], idle_s: float = 30.0) -> _Value:
    """`until`, for a test without an event loop."""
    deadline_s = time.monotonic() + limit_s(idle_s)
    while not (value := condition()):
        assert time.monotonic() < deadline_s, "what the test waits for did not happen"
        time.sleep(_LOOK_S)
    return value

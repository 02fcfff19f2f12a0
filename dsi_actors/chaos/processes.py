"""Processes of workers, and what this process holds: signals, children, descriptors."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil


def send(process: int, number: signal.Signals) -> bool:
    """Send a signal. Returns whether the process was there."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


def alive(process: int) -> bool:
    """False for a zombie, too."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def descriptors() -> dict[str, str]:
    """What each open descriptor of this process stands for."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one by which they are listed
            found[link.name] = os.readlink(link)
    return found


def children(processes: Sequence[int]) -> list[int]:
    """All processes that these have started: of a group its ranks but the first."""
    found = list[int]()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child.pid for child in psutil.Process(process).children(recursive=True)]
    return found


def resident_bytes() -> int:
    """Memory of this process."""
    return psutil.Process().memory_info().rss

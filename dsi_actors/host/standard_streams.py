"""Standard input, output and error of a process of ours, whatever the shell, cron or a service manager has left of them."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def prepare_streams() -> None:
    """Call first in a program. Afterwards all three are there, and what they cannot encode is written as an escape.

    A closed one is opened on the null device. Otherwise the next socket would get its number: libzmq and libuv end the process
    when they find theirs among 0, 1 and 2, and whoever writes to standard error would write into that socket."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            assert os.open(os.devnull, os.O_RDWR) == number, "the lowest free number is the first that is missing"
            os.set_inheritable(number, True)
    # Python has set those to None that were closed when it started.
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  for the whole life of the process
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def forget_output() -> None:
    """Nobody reads standard output any more: what is still to be written there goes nowhere, without another complaint."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(null, number)
    os.close(null)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def complain(message: str) -> None:
    """One line on standard error, if somebody is there to read it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()

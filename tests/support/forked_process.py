"""Test support: a command or a worker that goes on while the test does other things, forked where that is possible."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Self

from support.fork_server import Forked, OtherEnvironmentError


class ForkedProcess:
    """As much of `subprocess.Popen[str]` as tests use. Its streams are pipes, but for an empty standard input."""

    def __init__(self, module: str, *arguments: str | Path) -> None:
        out, theirs_out = os.pipe()
        err, theirs_err = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        self.stdout: IO[str] = os.fdopen(out, encoding="utf-8")
        self.stderr: IO[str] = os.fdopen(err, encoding="utf-8")
        try:
            self._forked = Forked(module, arguments, os.environ, (nothing, theirs_out, theirs_err))
        except BaseException:
            self._close()
            raise
        finally:
            for each in (nothing, theirs_out, theirs_err):
                os.close(each)
        self.pid = self._forked.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._forked], [], [], 0)[0]:
            self.returncode = self._forked.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises TimeoutExpired."""
        if self.returncode is None and not select.select([self._forked], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # its server is about to say so
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.send_signal(9)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left of its output and its errors, once it has ended. Raises TimeoutExpired."""
        said = ["", ""]

        def read(number: int, stream: IO[str]) -> None:
            said[number] = stream.read()

        streams = enumerate((self.stdout, self.stderr))
        readers = [
            threading.Thread(target=read, args=(number, stream), daemon=True)
            for number, stream in streams if not stream.closed
        ]  # fmt: skip
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        self._close()
        return said[0], said[1]

    def _close(self) -> None:
        self.stdout.close()
        self.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self.wait()


Process = ForkedProcess | subprocess.Popen[str]


def start(module: str, *arguments: str | Path) -> Process:
    """`python -m MODULE ARGUMENTS`, forked unless a library would not see the environment that it has here."""
    try:
        return ForkedProcess(module, *arguments)
    except OtherEnvironmentError:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

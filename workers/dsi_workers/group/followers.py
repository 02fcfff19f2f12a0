"""Rank 0's side of the processes of the other ranks: starts them, tells them what to do, and ends with them.

A rank that ends, is stopped or hangs ends the whole group, at once and with this process: to the orchestrator one worker died.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import structlog

from dsi_workers.engine import EngineError
from dsi_workers.group.commands import Setup, receive, send
from dsi_workers.group.steps import SharedSteps

log = structlog.get_logger("dsi.group")

_LOOK_S = 0.1
#: A rank that has not moved while this process has looked so often is stopped. Looks are counted, not seconds: where the whole
#: machine was suspended, nobody is blamed.
_SILENT_LOOKS = 50
#: How long ranks may take to end by themselves.
_GRACE_S = 2.0


class Followers:
    """The processes of the ranks 1, 2, ... of a group."""

    def __init__(self, devices: Sequence[str], setup: Setup) -> None:
        """Start a process for each of `devices` but the first, which is this process's own. `setup`: what all ranks have in
        common; rank, device and store are set here."""
        self.degree = degree = len(devices)
        self._devices = devices
        self.steps = SharedSteps.create(degree)
        self._directory = Path(tempfile.mkdtemp(prefix="dsi-group-"))
        self.store = self._directory / "ranks"
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._loaded = False
        atexit.register(self.close)
        try:
            for rank, device in enumerate(devices[1:], start=1):
                self._start()
                todo = replace(setup, rank=rank, degree=degree, device=device, store=str(self.store))
                send(self._pipes[-1], *todo.packed())
        except OSError as error:
            self.close()
            raise EngineError(f"the processes of the group could not be started: {error.strerror or error}") from None
        finally:
            self.steps.close_file()
        threading.Thread(target=self._watch, name="group", daemon=True).start()

    @property
    def process_ids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def _start(self) -> None:
        ours, theirs = Pipe()
        memory = self.steps.number
        words = [str(os.getpid()), str(theirs.fileno()), str(memory)]
        process = subprocess.Popen(
            [sys.executable, "-m", "dsi_workers.group.follower", *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(), memory),
        )  # fmt: skip
        theirs.close()
        self._pipes.append(ours)
        self._processes.append(process)

    def await_loaded(self) -> None:
        """Wait until each rank has loaded its part. Raises EngineError if one cannot."""
        for rank, pipe in enumerate(self._pipes, start=1):
            try:
                [problem] = receive(pipe)
            except (EOFError, OSError):
                code = self._processes[rank - 1].wait()
                problem = f"{self._name(rank)} ended with exit code {code} while it loaded its part of the model"
            if problem:
                raise EngineError(problem)
        self._loaded = True

    def end_meeting(self) -> None:
        """All ranks have found one another: remove what that needed."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def tell(self, *words: Any) -> None:
        """Give all ranks a command."""
        try:
            for pipe in self._pipes:
                send(pipe, *words)
        except OSError as error:
            self.end_group(f"a rank does not listen any more ({error.strerror})")

    def answers(self) -> list[Any]:
        """Wait for one answer of each rank to the last command."""
        try:
            return [receive(pipe)[0] for pipe in self._pipes]
        except (EOFError, OSError):
            self.end_group("a rank does not answer any more")

    def close(self) -> None:
        """End all ranks, and return when no process is left. For the orderly end."""
        if self._closed.is_set():
            return
        self._closed.set()
        atexit.unregister(self.close)
        for pipe in self._pipes:
            pipe.close()  # at which a rank ends by itself
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        self._kill_all()
        self.end_meeting()

    def end_group(self, reason: str) -> NoReturn:
        """End the group and this process with it: a rank is lost, or has not done what the others did."""
        with self._ending:  # never released: one thread ends the process
            log.error("the group ends", reason=reason)
            self._kill_all()
            self.end_meeting()
            sys.stderr.flush()
            os._exit(1)

    def _kill_all(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _watch(self) -> None:
        seen = [0] * len(self._devices)
        silent = [0] * len(self._devices)
        while not self._closed.wait(_LOOK_S):
            for rank, process in enumerate(self._processes, start=1):
                code = process.poll() if self._loaded else None
                if code is not None and not self._closed.is_set():
                    self.end_group(f"{self._name(rank)} ended with exit code {code}")
                beats = self.steps.beats(rank)
                silent[rank] = silent[rank] + 1 if beats == seen[rank] and self._loaded else 0
                seen[rank] = beats
                if silent[rank] >= _SILENT_LOOKS and not self._closed.is_set():
                    self.end_group(f"{self._name(rank)} is stopped")

    def _name(self, rank: int) -> str:
        return f"rank {rank} of the group, on {self._devices[rank]}"

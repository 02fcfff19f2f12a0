"""Workers as child processes on this machine, which talk to the orchestrator over a socket that only this user can reach."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

from dsi_actors.host.temporary import socket_directory
from dsi_actors.launching.launcher import Exit, LaunchedWorker, Launcher, LaunchError, WorkerSpec

_SOCKET = "orchestrator.sock"


class LocalLauncher(Launcher):
    """No process outlives this one: each has a pipe as standard input that closes when this process ends, however it ends."""

    def __init__(self) -> None:
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    async def open(self) -> str:
        self._directory = socket_directory(_SOCKET)
        return f"ipc://{Path(self._directory.name) / _SOCKET}"

    async def start(self, spec: WorkerSpec, incarnation: int) -> LaunchedWorker:
        # In a session of its own, a worker does not get the terminal's Ctrl-C: the orchestrator gets it, and ends its workers.
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dsi_actors.worker", "--gpu", spec.device, *spec.arguments(),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, **spec.environment(incarnation)},
            )  # fmt: skip
        except OSError as error:
            raise LaunchError(error.strerror or str(error)) from error
        return _Child(process)

    async def close(self) -> None:
        if self._directory is not None:
            self._directory.cleanup()


class _Child(LaunchedWorker):
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def wait(self) -> Exit:
        return Exit(await self._process.wait())

    @property
    def process_id(self) -> int | None:
        return self._process.pid

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal unless the process is known to have ended. asyncio's own `send_signal` polls first, and so may collect
        the exit status before the event loop's child watcher does, which then warns of an unknown process."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

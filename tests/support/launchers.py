"""Test support: launchers that start workers in other ways than as child processes of asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
from multiprocessing.context import SpawnProcess
from pathlib import Path

from dsi_actors.launching.launcher import Exit, LaunchedWorker, Launcher, LaunchError, WorkerSpec
from dsi_workers.main import WorkerConfig, run_worker


class ScriptedWorker(LaunchedWorker):
    """No process: it ends when a test says so, or when it is killed. It notes what it is told."""

    def __init__(self, spec: WorkerSpec, incarnation: int) -> None:
        self.spec = spec
        self.incarnation = incarnation
        self.told: list[str] = []
        #: Whether it ends when it is asked to.
        self.obeys = True
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    def end(self, code: int | None) -> None:
        if not self._exit.done():
            self._exit.set_result(Exit(code))

    def terminate(self) -> None:
        self.told.append("terminate")
        if self.obeys:
            self.end(0)

    def kill(self) -> None:
        self.told.append("kill")
        self.end(-signal.SIGKILL)

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)


class ScriptedLauncher(Launcher):
    def __init__(self) -> None:
        self.workers: list[ScriptedWorker] = []
        #: Reasons for which the next starts fail.
        self.failures: list[str] = []

    async def open(self) -> str:
        return "inproc://nowhere"

    async def start(self, spec: WorkerSpec, incarnation: int) -> LaunchedWorker:
        if self.failures:
            raise LaunchError(self.failures.pop(0))
        self.workers.append(ScriptedWorker(spec, incarnation))
        return self.workers[-1]

    async def close(self) -> None:
        pass


class MultiprocessingLauncher(Launcher):
    """Real workers by another door: no command line, no pipe, no environment variable.."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.closed = False
        self.started: list[WorkerSpec] = []

    async def open(self) -> str:
        return f"ipc://{self._directory}/other.sock"

    async def start(self, spec: WorkerSpec, incarnation: int) -> LaunchedWorker:
        self.started.append(spec)
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(spec, incarnation), daemon=True)
        await asyncio.to_thread(process.start)
        return _Spawned(process)

    async def close(self) -> None:
        self.closed = True


class _Spawned(LaunchedWorker):
    def __init__(self, process: SpawnProcess) -> None:
        self._process = process
        self._ended = asyncio.ensure_future(asyncio.to_thread(process.join))

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> Exit:
        await asyncio.shield(self._ended)
        return Exit(self._process.exitcode)


def _work(spec: WorkerSpec, incarnation: int) -> None:
    config = WorkerConfig(spec.endpoint, "cpu:0", spec.role, model=spec.model, once=True, incarnation=incarnation)
    with contextlib.suppress(KeyboardInterrupt):
        run_worker(config)

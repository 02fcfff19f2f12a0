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

    @property
    def has_ended(self) -> bool:
        return self._exit.done()

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


class SlowLauncher(ScriptedLauncher):
    """The launch of the second worker takes until the first one is asked to end. A worker that is killed ends a moment later."""

    def __init__(self) -> None:
        super().__init__()
        self._may_go_on = asyncio.Event()
        #: Whether all workers had ended when the launcher was closed.
        self.all_had_ended: bool | None = None

    async def open(self) -> str:
        return "tcp://127.0.0.1:*"

    async def start(self, spec: WorkerSpec, incarnation: int) -> LaunchedWorker:
        if self.workers:
            await self._may_go_on.wait()
        worker = _SlowToEnd(spec, incarnation, self._may_go_on)
        self.workers.append(worker)
        return worker

    async def close(self) -> None:
        self.all_had_ended = all(worker.has_ended for worker in self.workers)


class _SlowToEnd(ScriptedWorker):
    def __init__(self, spec: WorkerSpec, incarnation: int, asked_to_end: asyncio.Event) -> None:
        super().__init__(spec, incarnation)
        self._asked_to_end = asked_to_end

    def terminate(self) -> None:
        self._asked_to_end.set()
        asyncio.get_running_loop().call_later(0.01, super().terminate)

    def kill(self) -> None:
        self.told.append("kill")
        asyncio.get_running_loop().call_later(0.01, self.end, -signal.SIGKILL)


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

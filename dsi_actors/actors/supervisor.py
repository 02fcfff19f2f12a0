"""Local worker processes as children: started together, watched, ended in order, none left behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from dsi_actors.actors.actor import Actor
from dsi_actors.logs import get_logger

log = get_logger("supervisor")

#: From a polite request to the end of a worker, then from SIGKILL to its burial.
_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What to start: the words after `python -m dsi_actors.worker`."""

    device: str
    role: str


@dataclass(frozen=True, slots=True)
class Started:
    spec: WorkerSpec
    process: asyncio.subprocess.Process


@dataclass(frozen=True, slots=True)
class Exited:
    spec: WorkerSpec
    process: asyncio.subprocess.Process


SupervisorMessage: TypeAlias = Started | Exited


class WorkerSupervisor(Actor[SupervisorMessage]):
    """`on_exit(pid, spec, exit_code)` is called when a worker process ends."""

    def __init__(self, endpoint: str, log_level: str, on_exit: Callable[[int, WorkerSpec, int], None]) -> None:
        super().__init__("supervisor")
        self._endpoint = endpoint
        self._log_level = log_level
        self._on_exit = on_exit
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    @property
    def process_ids(self) -> list[int]:
        return list(self._processes)

    def start_worker(self, spec: WorkerSpec) -> None:
        self.spawn(self._start(spec))

    async def _start(self, spec: WorkerSpec) -> SupervisorMessage:
        # A session of its own keeps the terminal's Ctrl-C from it: we are told, and we tell it. The pipe on its
        # standard input closes with us, however we end, and then it ends too.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "dsi_actors.worker",
            "--gpu", spec.device, "--connect", self._endpoint, "--role", spec.role,
            "--log-level", self._log_level, "--supervised",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._processes[process.pid] = process
        return Started(spec, process)

    async def _watch(self, started: Started) -> SupervisorMessage:
        await started.process.wait()
        return Exited(started.spec, started.process)

    def receive(self, message: SupervisorMessage) -> None:
        match message:
            case Started():
                self.spawn(self._watch(message))
            case Exited(spec, process):
                self._processes.pop(process.pid, None)
                code = process.returncode
                assert code is not None
                self._on_exit(process.pid, spec, code)

    def on_stop(self) -> None:
        """The last word: whoever is still there, after an orderly end or after a cancelled one, is killed."""
        for process in self._processes.values():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def end_all(self) -> None:
        """Ask every worker to end, wait, kill what is left. Returns when no process is left."""
        processes = list(self._processes.values())
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        if not processes:
            return
        waits = [asyncio.ensure_future(process.wait()) for process in processes]
        _, late = await asyncio.wait(waits, timeout=_GRACE_S)
        if late:
            log.warning("killing workers that did not end", number=len(late))
            for process in processes:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
            await asyncio.wait(late)

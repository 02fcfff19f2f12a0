"""Local worker processes as children: started together, watched, started again when they die, none left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dsi_actors.actor import Actor
from dsi_actors.config import Config
from dsi_actors.logs import get_logger
from dsi_actors.supervision.restarts import RestartBudget

log = get_logger("supervisor")

#: How long a worker may take to end after SIGTERM before it is killed. A loaded machine takes seconds to end a process.
_GRACE_S = 10.0
#: By this a worker knows which incarnation its supervisor takes it for. In its environment: no other user sees that.
INCARNATION_VARIABLE = "DSI_INCARNATION"
#: For workers whose models were made ready before they start: all of them load the same files, those that are here.
_NOTHING_TO_FETCH = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What to start: the words after `python -m dsi_actors.worker`."""

    device: str
    role: str
    #: Of a drafter, if it is one of several kinds.
    model: str = ""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place for one worker, whichever process fills it."""

    spec: WorkerSpec
    budget: RestartBudget


@dataclass(frozen=True, slots=True)
class Started:
    slot: _Slot
    incarnation: int
    process: asyncio.subprocess.Process


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The system could not make the process: no memory, too many of them."""

    slot: _Slot
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Exited:
    slot: _Slot
    incarnation: int
    process: asyncio.subprocess.Process


@dataclass(frozen=True, slots=True)
class LaunchTimedOut:
    incarnation: int


SupervisorMessage: TypeAlias = Started | NotStarted | Exited | LaunchTimedOut


class WorkerSupervisor(Actor[SupervisorMessage]):
    """Starts one process for each spec. `on_exit(incarnation, spec, exit_code)` is called when a worker process ends."""

    def __init__(
        self,
        endpoint: str,
        config: Config,
        specs: Sequence[WorkerSpec],
        on_exit: Callable[[int, WorkerSpec, int], None],
    ) -> None:
        super().__init__("supervisor")
        self._specs = specs
        self._endpoint = endpoint
        self._config = config
        self._on_exit = on_exit
        self._processes: dict[int, asyncio.subprocess.Process] = {}  # by incarnation
        self._launching: dict[int, float] = {}  # by incarnation: since when
        self._ready_s: dict[int, float] = {}  # by incarnation: since when
        self._given_up: set[int] = set()
        #: How long the last workers took from their start to Ready.
        self.start_times_s: deque[float] = deque(maxlen=64)
        #: Whether workers that die are started again.
        self.restarts = False

    @property
    def process_ids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    def on_start(self) -> None:
        config = self._config
        for spec in self._specs:
            self.spawn(self._start(_Slot(spec, RestartBudget(config.restarts, config.restart_window_s))))

    def on_ready(self, incarnation: int) -> None:
        """The worker has become ready: it was launched in time."""
        since_s = self._launching.pop(incarnation, None)
        if since_s is not None:
            self._ready_s[incarnation] = time.monotonic()
            self.start_times_s.append(self._ready_s[incarnation] - since_s)

    def give_up(self, incarnation: int) -> None:
        """When this worker, if it is one of ours, has ended, it is not started again: it would be the same."""
        if incarnation in self._processes:
            self._given_up.add(incarnation)

    def fence(self, incarnation: int) -> None:
        """Make sure that this worker, if it is one of ours, does nothing any more. It may be stopped, not dead."""
        process = self._processes.get(incarnation)
        if process is not None:
            _kill(process)

    async def _start(self, slot: _Slot, delay_s: float = 0.0) -> SupervisorMessage:
        await asyncio.sleep(delay_s)
        incarnation = secrets.randbits(64)
        fetched = _NOTHING_TO_FETCH if self._config.local_models else {}
        # A session of its own keeps the terminal's Ctrl-C from it: we are told, and we tell it. The pipe on its
        # standard input closes with us, however we end, and then it ends too.
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dsi_actors.worker",
                "--gpu", slot.spec.device, "--connect", self._endpoint, "--role", slot.spec.role,
                *(["--model", slot.spec.model] if slot.spec.model else []),
                "--log-level", self._config.log_level, "--log-format", self._config.log_format, "--supervised",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, INCARNATION_VARIABLE: str(incarnation), **fetched},
            )  # fmt: skip
        except OSError as error:
            return NotStarted(slot, incarnation, error.strerror or str(error))
        self._processes[incarnation] = process
        return Started(slot, incarnation, process)

    async def _watch(self, started: Started) -> SupervisorMessage:
        await started.process.wait()
        return Exited(started.slot, started.incarnation, started.process)

    async def _launch_time(self, incarnation: int) -> SupervisorMessage:
        await asyncio.sleep(self._config.ready_timeout_s)
        return LaunchTimedOut(incarnation)

    def receive(self, message: SupervisorMessage) -> None:
        match message:
            case Started(_, incarnation, _):
                self._launching[incarnation] = time.monotonic()
                self.spawn(self._watch(message))
                self.spawn(self._launch_time(incarnation))
            case NotStarted(slot, incarnation, reason):
                log.error("a worker could not be started", role=slot.spec.role, reason=reason)
                self._on_exit(incarnation, slot.spec, 1)
                if self.restarts:
                    self._restart(slot, 0.0)
            case LaunchTimedOut(incarnation) if incarnation in self._launching and self.restarts:
                log.warning("a worker was not ready in time: killed", timeout_s=self._config.ready_timeout_s)
                self.fence(incarnation)
            case LaunchTimedOut():
                pass
            case Exited(slot, incarnation, process):
                self._processes.pop(incarnation, None)
                self._launching.pop(incarnation, None)
                now_s = time.monotonic()
                served_s = now_s - self._ready_s.pop(incarnation, now_s)
                code = process.returncode
                assert code is not None
                self._on_exit(incarnation, slot.spec, code)
                if incarnation in self._given_up:
                    self._given_up.remove(incarnation)
                elif self.restarts and code not in (0, -signal.SIGTERM):  # else somebody asked it to leave
                    self._restart(slot, served_s)

    def _restart(self, slot: _Slot, served_s: float) -> None:
        delay_s = slot.budget.delay_s(time.monotonic(), served_s)
        if delay_s is None:
            log.error(
                "a worker died too often: not started again", role=slot.spec.role, device=slot.spec.device,
                restarts=self._config.restarts, window_s=self._config.restart_window_s,
            )  # fmt: skip
            return
        log.info("a worker is started again", role=slot.spec.role, device=slot.spec.device, delay_s=delay_s)
        self.spawn(self._start(slot, delay_s))

    def on_stop(self) -> None:
        """The last word: whoever is still there, after an orderly end or after a cancelled one, is killed."""
        for process in self._processes.values():
            _kill(process)

    async def end_all(self) -> None:
        """Ask every worker to end, wait, kill what is left. Returns when no process is left."""
        self.restarts = False
        processes = list(self._processes.values())
        for process in processes:
            _signal(process, signal.SIGTERM)
        if not processes:
            return
        waits = [asyncio.ensure_future(process.wait()) for process in processes]
        _, late = await asyncio.wait(waits, timeout=_GRACE_S)
        if late:
            log.warning("killing workers that did not end", number=len(late))
            for process in processes:
                _kill(process)
            await asyncio.wait(late)


def _kill(process: asyncio.subprocess.Process) -> None:
    _signal(process, signal.SIGKILL)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a signal unless the process is known to have ended. asyncio's own `send_signal` polls first, and so may collect
    the exit status before the event loop's child watcher does, which then warns of an unknown process."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)

"""The workers that the orchestrator starts: started together, watched, started again when they die, none left behind."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dsi_actors.actor import Actor
from dsi_actors.config import Config
from dsi_actors.launching.launcher import Exit, LaunchedWorker, Launcher, LaunchError, WorkerSpec
from dsi_actors.logs import get_logger
from dsi_actors.supervision.restarts import RestartBudget

log = get_logger("supervisor")

#: How long a worker may take to end once it was asked, before it is killed. A loaded machine takes seconds to end a process.
_GRACE_S = 10.0
#: How a worker ended that `shrink` sent away.
NOT_NEEDED = "it was not needed any more"


@dataclass(slots=True, eq=False)
class _Slot:
    """A place for one worker, whichever process fills it."""

    spec: WorkerSpec
    budget: RestartBudget
    #: The worker that fills it, or is to fill it; 0 before the first one.
    incarnation: int = 0
    #: While a worker is started, which may take long on a cluster that has no place.
    starting: asyncio.Future[LaunchedWorker] | None = None
    #: Its worker is not needed any more.
    retired: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    slot: _Slot
    incarnation: int
    worker: LaunchedWorker


@dataclass(frozen=True, slots=True)
class NotStarted:
    slot: _Slot
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Exited:
    slot: _Slot
    incarnation: int
    exit: Exit


@dataclass(frozen=True, slots=True)
class LaunchTimedOut:
    incarnation: int


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A worker was not needed any more before it was started."""

    slot: _Slot


@dataclass(frozen=True, slots=True)
class DrainTimedOut:
    incarnation: int


SupervisorMessage: TypeAlias = Started | NotStarted | Exited | LaunchTimedOut | Withdrawn | DrainTimedOut


class WorkerSupervisor(Actor[SupervisorMessage]):
    """Has the launcher start one worker for each spec. `on_exit(incarnation, spec, how)` is called when a worker has ended or
    could not be started; `how` is a clause such as "it ended with exit code 1"."""

    def __init__(
        self,
        launcher: Launcher,
        config: Config,
        specs: Sequence[WorkerSpec],
        on_exit: Callable[[int, WorkerSpec, str], None],
    ) -> None:
        super().__init__("supervisor")
        self._launcher = launcher
        self._slots = [self._slot(spec, config) for spec in specs]
        self._config = config
        self._on_exit = on_exit
        self._workers: dict[int, LaunchedWorker] = {}  # by incarnation
        self._launching: dict[int, float] = {}  # by incarnation: since when
        self._ready_s: dict[int, float] = {}  # by incarnation: since when
        self._given_up: set[int] = set()
        #: How long the last workers took from their start to Ready.
        self.start_times_s: deque[float] = deque(maxlen=64)
        #: Whether workers that die are started again.
        self.restarts = False

    @property
    def process_ids(self) -> list[int]:
        """The worker processes on this machine."""
        return [worker.process_id for worker in self._workers.values() if worker.process_id is not None]

    def on_start(self) -> None:
        for slot in self._slots:
            self.spawn(self._start(slot))

    @staticmethod
    def _slot(spec: WorkerSpec, config: Config) -> _Slot:
        return _Slot(spec, RestartBudget(config.restarts, config.restart_window_s))

    @property
    def target_servers(self) -> int:
        """Target servers that shall be there, whether they are ready or not."""
        return sum(slot.spec.role == "target" for slot in self._slots)

    def grow(self, spec: WorkerSpec) -> None:
        """Start one more worker."""
        self._slots.append(slot := self._slot(spec, self._config))
        self.spawn(self._start(slot))

    def shrink(self, loads: Mapping[int, int]) -> WorkerSpec:
        """Send away one target server, and return what could be started in its place: one that is not ready, else the one that
        serves the fewest generations. It answers what it was asked first. `loads`: generations of each, by incarnation."""
        targets = [slot for slot in reversed(self._slots) if slot.spec.role == "target"]
        slot = min(targets, key=lambda slot: loads.get(slot.incarnation, -1))
        self._slots.remove(slot)
        slot.retired = True
        if slot.starting is not None:
            slot.starting.cancel()
        elif (worker := self._workers.get(slot.incarnation)) is not None:
            self._send_away(slot, worker)
        return slot.spec

    def _send_away(self, slot: _Slot, worker: LaunchedWorker) -> None:
        worker.terminate()
        self.spawn(self._drain_time(slot.incarnation))

    def on_ready(self, incarnation: int) -> None:
        """The worker has become ready: it was launched in time."""
        since_s = self._launching.pop(incarnation, None)
        if since_s is not None:
            self._ready_s[incarnation] = time.monotonic()
            self.start_times_s.append(self._ready_s[incarnation] - since_s)

    def on_preparing(self, incarnation: int) -> None:
        """The worker still fetches its model, as one may on a machine that has not had it: its launch time begins now."""
        if incarnation in self._launching:
            self._launching[incarnation] = time.monotonic()

    def give_up(self, incarnation: int) -> None:
        """When this worker, if it is one of ours, has ended, it is not started again: it would be the same."""
        if incarnation in self._workers:
            self._given_up.add(incarnation)

    def fence(self, incarnation: int) -> None:
        """Make sure that this worker, if it is one of ours, does nothing any more. It may be stopped, not dead."""
        worker = self._workers.get(incarnation)
        if worker is not None:
            worker.kill()

    async def _start(self, slot: _Slot, delay_s: float = 0.0) -> SupervisorMessage:
        await asyncio.sleep(delay_s)
        if slot.retired:
            return Withdrawn(slot)
        slot.incarnation = incarnation = secrets.randbits(64)
        slot.starting = asyncio.ensure_future(self._launch(slot.spec, incarnation))
        try:
            worker = await slot.starting
        except LaunchError as error:
            return NotStarted(slot, incarnation, str(error))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not slot.retired or (task is not None and task.cancelling()):
                raise
            return Withdrawn(slot)
        finally:
            slot.starting = None
        if slot.retired:  # meanwhile
            self._send_away(slot, worker)
        return Started(slot, incarnation, worker)

    async def _launch(self, spec: WorkerSpec, incarnation: int) -> LaunchedWorker:
        """A worker that was launched is known from the same turn of the loop on, so that none is left behind by a cancel."""
        worker = self._workers[incarnation] = await self._launcher.start(spec, incarnation)
        return worker

    async def _watch(self, started: Started) -> SupervisorMessage:
        return Exited(started.slot, started.incarnation, await started.worker.wait())

    async def _drain_time(self, incarnation: int) -> SupervisorMessage:
        await asyncio.sleep(self._config.request_timeout_s)
        return DrainTimedOut(incarnation)

    async def _launch_time(self, incarnation: int, left_s: float) -> SupervisorMessage:
        await asyncio.sleep(left_s)
        return LaunchTimedOut(incarnation)

    def receive(self, message: SupervisorMessage) -> None:
        match message:
            case Started(_, incarnation, _):
                self._launching[incarnation] = time.monotonic()
                self.spawn(self._watch(message))
                self.spawn(self._launch_time(incarnation, self._config.ready_timeout_s))
            case NotStarted(slot, incarnation, reason):
                log.error("a worker could not be started", role=slot.spec.role, reason=reason)
                self._on_exit(incarnation, slot.spec, f"it could not be started: {reason}")
                if self.restarts and not slot.retired:
                    self._restart(slot, 0.0)
            case DrainTimedOut(incarnation):
                self.fence(incarnation)  # if it is still there
            case LaunchTimedOut(incarnation) if incarnation in self._launching and self.restarts:
                left_s = self._launching[incarnation] + self._config.ready_timeout_s - time.monotonic()
                if left_s > 0:
                    self.spawn(self._launch_time(incarnation, left_s))
                    return
                log.warning("a worker was not ready in time: killed", timeout_s=self._config.ready_timeout_s)
                self.fence(incarnation)
            case LaunchTimedOut() | Withdrawn():
                pass
            case Exited(slot, incarnation, how):
                self._workers.pop(incarnation, None)
                self._launching.pop(incarnation, None)
                now_s = time.monotonic()
                served_s = now_s - self._ready_s.pop(incarnation, now_s)
                self._on_exit(incarnation, slot.spec, NOT_NEEDED if slot.retired else str(how))
                if incarnation in self._given_up:
                    self._given_up.remove(incarnation)
                elif slot.retired:
                    pass
                elif self.restarts and not how.was_asked_for:
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
        for worker in self._workers.values():
            worker.kill()

    async def all_ended(self) -> None:
        """Return when every worker has ended. Call after `run`: a worker whose launch took until then was killed at its end."""
        await asyncio.gather(*(worker.wait() for worker in self._workers.values()))

    async def end_all(self) -> None:
        """Ask every worker to end, wait, kill what is left. Returns when no worker is left."""
        self.restarts = False
        workers = list(self._workers.values())
        for worker in workers:
            worker.terminate()
        if not workers:
            return
        waits = [asyncio.ensure_future(worker.wait()) for worker in workers]
        _, late = await asyncio.wait(waits, timeout=_GRACE_S)
        if late:
            log.warning("killing workers that did not end", number=len(late))
            for worker in workers:
                worker.kill()
            await asyncio.wait(late)

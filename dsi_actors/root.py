"""The parent of all actors, and who waits for changes among them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from dsi_actors.actor import Actor
from dsi_actors.config import Config
from dsi_actors.errors import OrchestratorClosed
from dsi_actors.generation.generation import Generation
from dsi_actors.generation.scoring import Scoring
from dsi_actors.launching.launcher import WorkerSpec
from dsi_actors.logs import get_logger
from dsi_actors.progress import Report, unreported
from dsi_actors.stream import Channel
from dsi_actors.supervision.scaling import Autoscaler
from dsi_actors.supervision.supervisor import NOT_NEEDED, WorkerSupervisor
from dsi_actors.workforce.scheduler import Scheduler, WorkerGone, WorkerReady
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_actors.workforce.workforce import Workforce

log = get_logger("root")


@dataclass(frozen=True, slots=True)
class _StartPermanent:
    """Start an actor that must live as long as the root."""

    child: Actor[Any]


@dataclass(frozen=True, slots=True)
class _ChildEnded:
    """An actor that must live as long as the root has ended."""

    child: Actor[Any]
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class _GenerationEnded:
    generation: Generation | Scoring
    channel: Channel
    error: BaseException | None


_RootMessage: TypeAlias = _StartPermanent | _ChildEnded | _GenerationEnded


class Root(Actor[_RootMessage]):
    """The parent of all: if one of the permanent actors fails, everything ends; a generation fails alone."""

    def __init__(self, config: Config, report: Report = unreported) -> None:
        """`report` is told of workers that become ready, and of what they do before."""
        super().__init__("root")
        self._report = report
        #: Local workers that were started. 0: they come from elsewhere, as many as like.
        self.expected_workers = 0
        self.scheduler = Scheduler()
        self.workforce = Workforce(config, self._on_worker_ready, self._on_worker_lost, self._on_worker_preparing)
        self.supervisor: WorkerSupervisor | None = None
        self.ready_workers: list[WorkerHandle] = []
        #: What takes a place, by its number.
        self.generations: dict[int, tuple[Generation | Scoring, Channel]] = {}
        #: Local workers that ended lately, by incarnation, and how.
        self.exits: deque[tuple[int, WorkerSpec, str]] = deque(maxlen=64)
        self.closing = False
        self._watchers: list[asyncio.Future[None]] = []

    def on_start(self) -> None:
        self._start_permanent(self.workforce)
        self._start_permanent(self.scheduler)

    def supervise(self, supervisor: WorkerSupervisor) -> None:
        """Start local workers. May be called before the root runs."""
        self.supervisor = supervisor
        self.tell(_StartPermanent(supervisor))

    def scale(self, autoscaler: Autoscaler) -> None:
        """Change the number of local workers from now on."""
        self.tell(_StartPermanent(autoscaler))

    @property
    def loads(self) -> dict[int, int]:
        """Generations on each target server that is ready, by incarnation."""
        return {worker.hello.incarnation: self.scheduler.load_of(worker) for worker in self.of_role("target")}

    def start_generation(self, generation: Generation | Scoring, channel: Channel) -> None:
        self.generations[generation.number] = (generation, channel)
        self.start_child(generation, lambda error: _GenerationEnded(generation, channel, error))

    def _start_permanent(self, child: Actor[Any]) -> None:
        self.start_child(child, lambda error: _ChildEnded(child, error))

    def receive(self, message: _RootMessage) -> None:
        match message:
            case _StartPermanent(child):
                self._start_permanent(child)
            case _GenerationEnded(generation, channel, error):
                del self.generations[generation.number]
                if error is not None:
                    log.error("a generation failed", generation=generation.number, exc_info=error)
                channel.end(error if isinstance(error, Exception) else OrchestratorClosed("the generation was ended"))
                channel.conclude(generation.report)
                self.changed()
            case _ChildEnded(child, error) if not self.closing:
                raise RuntimeError(f"{child.name} ended") from error

    def on_exit(self, incarnation: int, spec: WorkerSpec, how: str) -> None:
        if not self.closing:
            say = log.info if how == NOT_NEEDED else log.warning
            say("a local worker ended", role=spec.role, device=spec.device, how=how)
        self.exits.append((incarnation, spec, how))
        self.workforce.drop_incarnation(incarnation)
        self.changed()

    def _on_worker_ready(self, worker: WorkerHandle) -> None:
        self.ready_workers.append(worker)
        if self.supervisor is not None:
            self.supervisor.on_ready(worker.hello.incarnation)
        self.scheduler.tell(WorkerReady(worker))
        self.report_workers(f"{worker} is ready")
        self.changed()

    def _on_worker_preparing(self, worker: WorkerHandle, done: float) -> None:
        if self.supervisor is not None:
            self.supervisor.on_preparing(worker.hello.incarnation)
        self._report(f"{worker}: {worker.preparing}", done, "")

    def report_workers(self, news: str) -> None:
        """Tell whoever watches how many workers are there."""
        ready, expected = len(self.ready_workers), self.expected_workers
        if expected:
            self._report("starting workers", ready / expected, f"{ready} of {expected}: {news}")
        else:
            self._report("waiting for workers", None, news)

    def _on_worker_lost(self, worker: WorkerHandle) -> None:
        if self.supervisor is not None and worker.incompatible:
            self.supervisor.give_up(worker.hello.incarnation)
        if self.supervisor is not None and not worker.leaving:
            self.supervisor.fence(worker.hello.incarnation)
        if worker in self.ready_workers:
            self.ready_workers.remove(worker)
            self.scheduler.tell(WorkerGone(worker), control=True)
        self.changed()

    def of_role(self, role: str) -> list[WorkerHandle]:
        return [worker for worker in self.ready_workers if worker.role == role]

    def changed(self) -> None:
        """Wake whoever waits for a change among workers or generations."""
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """False if the condition does not hold after `timeout_s`. It is looked at after every change."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._watchers.append(watcher)
                    try:
                        await watcher
                    finally:
                        if watcher in self._watchers:
                            self._watchers.remove(watcher)
        except TimeoutError:
            return False
        return True

    def on_stop(self) -> None:
        for _, channel in self.generations.values():
            channel.end(OrchestratorClosed("the orchestrator was closed"))
            channel.conclude(None)
        self.changed()

"""Which generation gets which free worker: in the order in which the generations came.

Each generation holds its servers and its drafter until its end. The first in line gets all it can use, the next what is
left; workers that become ready or free later go to the first that can use one more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from dsi_actors.actors.actor import Actor
from dsi_actors.actors.worker_handle import WorkerHandle
from dsi_actors.logs import get_logger

log = get_logger("scheduler")


class Client(Protocol):
    """A generation, as the scheduler sees it."""

    number: int

    def grant(self, worker: WorkerHandle) -> None:
        """This worker is yours until you release it or it is withdrawn."""

    def withdraw(self, worker: WorkerHandle) -> None:
        """This worker is gone."""


@dataclass(frozen=True, slots=True)
class WorkerReady:
    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class WorkerGone:
    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class Requested:
    client: Client
    max_servers: int
    wants_drafter: bool


@dataclass(frozen=True, slots=True)
class Released:
    """The generation is over: all its workers are free."""

    client: Client


@dataclass(frozen=True, slots=True)
class GivenBack:
    """The generation does not want this worker any more: it failed there. Others may have it."""

    client: Client
    worker: WorkerHandle


SchedulerMessage: TypeAlias = WorkerReady | WorkerGone | Requested | Released | GivenBack


@dataclass(slots=True)
class _Lease:
    client: Client
    max_servers: int
    wants_drafter: bool
    targets: list[WorkerHandle] = field(default_factory=list)
    drafters: list[WorkerHandle] = field(default_factory=list)
    #: Numbers of workers that failed this generation: not given to it again.
    refused: set[int] = field(default_factory=set)

    def can_use(self, worker: WorkerHandle) -> bool:
        if worker.number in self.refused:
            return False
        if worker.role == "target":
            return len(self.targets) < self.max_servers
        return self.wants_drafter and not self.drafters

    def of_role(self, worker: WorkerHandle) -> list[WorkerHandle]:
        return self.targets if worker.role == "target" else self.drafters


class Scheduler(Actor[SchedulerMessage]):
    def __init__(self) -> None:
        super().__init__("scheduler")
        self._free: list[WorkerHandle] = []
        self._leases: dict[int, _Lease] = {}  # by generation number, in the order of arrival

    @property
    def waiting_or_running(self) -> int:
        return len(self._leases)

    @property
    def waiting(self) -> int:
        """Generations that hold no target server."""
        return sum(not lease.targets for lease in self._leases.values())

    def has_target_for(self, client: Client) -> bool:
        """Whether some target server, free or lent to another, may serve this client sooner or later."""
        lent = [worker for lease in self._leases.values() for worker in lease.targets]
        refused = self._leases[client.number].refused if client.number in self._leases else set()
        return any(worker.role == "target" and worker.number not in refused for worker in self._free + lent)

    def receive(self, message: SchedulerMessage) -> None:
        match message:
            case WorkerReady(worker):
                self._free.append(worker)
            case WorkerGone(worker):
                self._remove(worker)
            case Requested(client, max_servers, wants_drafter):
                self._leases[client.number] = _Lease(client, max_servers, wants_drafter)
            case Released(client):
                lease = self._leases.pop(client.number, None)
                if lease is not None:
                    self._free.extend(lease.targets + lease.drafters)
            case GivenBack(client, worker):
                lease = self._leases.get(client.number)
                if lease is not None and worker in lease.of_role(worker):
                    lease.of_role(worker).remove(worker)
                    lease.refused.add(worker.number)
                    self._free.append(worker)
        self._match()

    def _remove(self, worker: WorkerHandle) -> None:
        if worker in self._free:
            self._free.remove(worker)
        for lease in self._leases.values():
            if worker in lease.of_role(worker):
                lease.of_role(worker).remove(worker)
                lease.client.withdraw(worker)

    def _match(self) -> None:
        # Drafters first, so that a policy that waits for drafts knows from the start whether any will come.
        self._free = sorted(
            (worker for worker in self._free if not worker.lost),
            key=lambda worker: (worker.role == "target", worker.number),
        )
        for lease in self._leases.values():
            for worker in list(self._free):
                if lease.can_use(worker):
                    self._free.remove(worker)
                    lease.of_role(worker).append(worker)
                    lease.client.grant(worker)

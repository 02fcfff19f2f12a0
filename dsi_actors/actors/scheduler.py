"""Which generation gets which worker: one server for each before a second for any, the first in line first.

A generation that is alone gets all the servers that it can use. When another comes and none is free, it gets one of
those that somebody has more than one of: under load speculation parallelism shrinks, down to one server for each generation;
who comes then waits in line. Servers that become ready or free go to who has fewest, drafters to the first that has none.
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

    def reclaim(self, worker: WorkerHandle) -> None:
        """This worker is another's now: let go of it."""


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
        self._free = sorted((worker for worker in self._free if not worker.lost), key=lambda worker: worker.number)
        # Drafters first, so that a policy that waits for drafts knows from the start whether any will come.
        for worker in [worker for worker in self._free if worker.role == "drafter"]:
            self._lend(worker, next((lease for lease in self._leases.values() if lease.can_use(worker)), None))
        for worker in [worker for worker in self._free if worker.role == "target"]:
            lending = [lease for lease in self._leases.values() if lease.can_use(worker)]
            self._lend(worker, min(lending, key=lambda lease: len(lease.targets), default=None))
        for lease in self._leases.values():
            if not lease.targets:
                self._make_room(lease)

    def _lend(self, worker: WorkerHandle, lease: _Lease | None) -> None:
        if lease is not None:
            self._free.remove(worker)
            lease.of_role(worker).append(worker)
            lease.client.grant(worker)

    def _make_room(self, lease: _Lease) -> None:
        """Take a server for this one from whoever holds most, if that one keeps another: speculation gives way."""
        richest = max(self._leases.values(), key=lambda other: len(other.targets))
        if len(richest.targets) < 2:
            return
        worker = next((worker for worker in reversed(richest.targets) if lease.can_use(worker)), None)
        if worker is not None:
            richest.targets.remove(worker)
            richest.client.reclaim(worker)
            lease.targets.append(worker)
            lease.client.grant(worker)

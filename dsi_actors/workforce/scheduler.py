"""Which generation gets which worker: one server for each before a second for any, the first in line first.

A generation that is alone gets all the servers that it can use. When another comes and none is idle, it gets one of
those that somebody has more than one of: under load speculation parallelism shrinks, down to one server for each generation.
Who comes then shares a server, the one with fewest generations; when all have as many as they have slots, who comes waits
in line. A server that becomes idle goes to who shares with most others. Drafters are shared from the first; of several kinds a
generation has one, or one of each kind that it asked for, and may change to others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from dsi_actors.actor import Actor
from dsi_actors.logs import get_logger
from dsi_actors.workforce.worker_handle import WorkerHandle

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
    #: The kinds of drafters that it would have, all of them at the same time. If there is none of them it gets another one.
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Exchanged:
    """The generation wants drafters of these kinds instead of those it has. It keeps those if there is none to be had."""

    client: Client
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Released:
    """The generation is over: all its workers are free."""

    client: Client


@dataclass(frozen=True, slots=True)
class GivenBack:
    """The generation does not want this worker any more: it failed there. Others may have it."""

    client: Client
    worker: WorkerHandle


SchedulerMessage: TypeAlias = WorkerReady | WorkerGone | Requested | Exchanged | Released | GivenBack


@dataclass(slots=True)
class _Lease:
    client: Client
    max_servers: int
    wants_drafter: bool
    kinds: tuple[str, ...] = ()
    targets: list[WorkerHandle] = field(default_factory=list)
    drafters: list[WorkerHandle] = field(default_factory=list)
    #: Numbers of workers that failed this generation: not given to it again.
    refused: set[int] = field(default_factory=set)

    def can_use(self, worker: WorkerHandle) -> bool:
        if worker.number in self.refused:
            return False
        if worker.role == "target":
            return len(self.targets) < self.max_servers
        return self.wants_drafter and (not self.drafters or worker.kind in self.lacking)

    @property
    def lacking(self) -> list[str]:
        """Of the kinds that it would have, those it has no drafter of. None while it has one of another kind instead."""
        present = {worker.kind for worker in self.drafters}
        return [kind for kind in self.kinds if kind not in present] if present.issubset(self.kinds) else []

    def of_role(self, worker: WorkerHandle) -> list[WorkerHandle]:
        return self.targets if worker.role == "target" else self.drafters


class Scheduler(Actor[SchedulerMessage]):
    def __init__(self) -> None:
        super().__init__("scheduler")
        self._workers: dict[int, WorkerHandle] = {}
        #: Generations that each worker is lent to.
        self._load: Counter[int] = Counter()
        self._leases: dict[int, _Lease] = {}  # by generation number, in the order of arrival

    @property
    def waiting(self) -> int:
        """Generations that hold no target server."""
        return sum(not lease.targets for lease in self._leases.values())

    def drafter_kinds(self, client: Client) -> list[str]:
        """Of those that are there and did not fail this client."""
        refused = self._leases[client.number].refused if client.number in self._leases else set()
        drafters = (worker for worker in self._workers.values() if worker.role == "drafter" and not worker.lost)
        return list(dict.fromkeys(worker.kind for worker in drafters if worker.number not in refused))

    def has_target_for(self, client: Client) -> bool:
        """Whether some target server, free or lent to others, may serve this client sooner or later."""
        refused = self._leases[client.number].refused if client.number in self._leases else set()
        return any(worker.role == "target" and number not in refused for number, worker in self._workers.items())

    def load_of(self, worker: WorkerHandle) -> int:
        """Generations that the worker is lent to."""
        return self._load[worker.number]

    def receive(self, message: SchedulerMessage) -> None:
        match message:
            case WorkerReady(worker):
                if not worker.lost:
                    self._workers[worker.number] = worker
            case WorkerGone(worker):
                self._remove(worker)
            case Requested(client, max_servers, wants_drafter, kinds):
                self._leases[client.number] = _Lease(client, max_servers, wants_drafter, kinds)
            case Exchanged(client, kinds):
                lease = self._leases.get(client.number)
                if lease is not None:
                    self._exchange(lease, kinds)
            case Released(client):
                lease = self._leases.pop(client.number, None)
                if lease is not None:
                    self._load.subtract(worker.number for worker in lease.targets + lease.drafters)
            case GivenBack(client, worker):
                lease = self._leases.get(client.number)
                if lease is not None:
                    lease.refused.add(worker.number)
                    if worker in lease.of_role(worker):
                        self._take(worker, lease)
        self._match()

    def _remove(self, worker: WorkerHandle) -> None:
        self._workers.pop(worker.number, None)
        for lease in self._leases.values():
            if worker in lease.of_role(worker):
                lease.of_role(worker).remove(worker)
                lease.client.withdraw(worker)
        self._load.pop(worker.number, None)

    def _match(self) -> None:
        workers = sorted((worker for worker in self._workers.values() if not worker.lost), key=lambda each: each.number)
        drafters = [worker for worker in workers if worker.role == "drafter"]
        targets = [worker for worker in workers if worker.role == "target"]
        # Drafters first, so that a policy that waits for drafts knows from the start whether any will come.
        for lease in self._leases.values():
            self._lend_lacking(lease)
            if not lease.drafters:
                self._lend(self._least_loaded(list(filter(lease.can_use, drafters))), lease)
        self._find_first_servers(targets)
        for worker in targets:
            if not self._load[worker.number]:
                self._use_idle_server(worker)
        self._find_first_servers(targets)  # who moved to an idle one may have left a slot

    def _lend_lacking(self, lease: _Lease) -> None:
        """Drafters of the kinds that it would have."""
        for kind in lease.lacking:
            of_kind = [worker for worker in self._workers.values() if worker.role == "drafter" and worker.kind == kind]
            usable = [worker for worker in of_kind if not worker.lost and lease.can_use(worker)]
            self._lend(self._least_loaded(sorted(usable, key=lambda worker: worker.number)), lease)

    def _exchange(self, lease: _Lease, kinds: tuple[str, ...]) -> None:
        lease.kinds = kinds
        unwanted = [worker for worker in lease.drafters if worker.kind not in kinds]
        others = [worker for worker in self._workers.values() if worker.role == "drafter" and worker.kind in kinds]
        instead = self._least_loaded(
            [worker for worker in others if not worker.lost and worker.number not in lease.refused]
        )
        if len(unwanted) < len(lease.drafters) or instead is not None:
            for worker in unwanted:
                self._reclaim(worker, lease)
            self._lend_lacking(lease)

    def _find_first_servers(self, targets: Sequence[WorkerHandle]) -> None:
        for lease in self._leases.values():
            if not lease.targets:
                self._find_first_server(lease, targets)

    def _find_first_server(self, lease: _Lease, targets: Sequence[WorkerHandle]) -> None:
        """An idle one, else one of somebody who has several, else one to share."""
        worker = self._least_loaded([worker for worker in targets if lease.can_use(worker)])
        if worker is None or self._load[worker.number]:
            rich = [
                other
                for other in self._leases.values()
                if len(other.targets) > 1 and any(map(lease.can_use, other.targets))
            ]
            if rich:
                richest = max(rich, key=lambda other: len(other.targets))
                spare = [worker for worker in reversed(richest.targets) if lease.can_use(worker)]
                worker = min(spare, key=lambda worker: self._load[worker.number])
                self._reclaim(worker, richest)
        self._lend(worker, lease)

    def _use_idle_server(self, worker: WorkerHandle) -> None:
        """Who shares its only server with most others gets it; if nobody shares, who has fewest and can use another."""
        crowds = {
            number: min(self._load[each.number] for each in lease.targets)
            for number, lease in self._leases.items()
            if lease.targets and worker.number not in lease.refused
        }
        crowded = max(
            (number for number in crowds if crowds[number] > 1), key=lambda number: crowds[number], default=None
        )
        if crowded is not None:
            lease = self._leases[crowded]
            self._reclaim(max(lease.targets, key=lambda each: self._load[each.number]), lease)
            self._lend(worker, lease)
            return
        lending = [lease for lease in self._leases.values() if lease.can_use(worker)]
        if lending:
            self._lend(worker, min(lending, key=lambda lease: len(lease.targets)))

    def _least_loaded(self, workers: Sequence[WorkerHandle]) -> WorkerHandle | None:
        """One with a free slot."""
        free = [worker for worker in workers if self._load[worker.number] < worker.slots]
        return min(free, key=lambda worker: self._load[worker.number], default=None)

    def _lend(self, worker: WorkerHandle | None, lease: _Lease) -> None:
        if worker is not None:
            self._load[worker.number] += 1
            lease.of_role(worker).append(worker)
            lease.client.grant(worker)

    def _take(self, worker: WorkerHandle, lease: _Lease) -> None:
        self._load[worker.number] -= 1
        lease.of_role(worker).remove(worker)

    def _reclaim(self, worker: WorkerHandle, lease: _Lease) -> None:
        self._take(worker, lease)
        lease.client.reclaim(worker)

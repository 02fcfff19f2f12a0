"""How many target servers there are while generations come and go: one for each, between a least and a most number.

`Demand` decides, from the clock and two numbers that it is given. The actor asks it and tells the supervisor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dsi_actors.actor import Actor
from dsi_actors.launching.launcher import WorkerSpec
from dsi_actors.logs import get_logger
from dsi_actors.supervision.supervisor import WorkerSupervisor

log = get_logger("scaling")

#: There must be too few servers for so long before more are started: a model takes seconds to load.
GROW_AFTER_S = 1.0
_LOOK_S = 0.25


class Demand:
    """What the number of generations says about the number of servers. Pure."""

    def __init__(self, least: int, most: int, *, shrink_after_s: float, grow_after_s: float = GROW_AFTER_S) -> None:
        self._least = least
        self._most = most
        self._shrink_after_s = shrink_after_s
        self._grow_after_s = grow_after_s
        #: Since when there are too few or too many servers, and the fewest or the most generations since then.
        self._few: tuple[float, int] | None = None
        self._many: tuple[float, int] | None = None

    def wanted(self, now_s: float, generations: int, servers: int) -> int:
        """Servers that there should be, of which `servers` are there or on their way."""
        needed = max(self._least, min(self._most, generations))
        self._few = _since(self._few, now_s, needed, min) if needed > servers else None
        self._many = _since(self._many, now_s, needed, max) if needed < servers else None
        for since, after_s in ((self._few, self._grow_after_s), (self._many, self._shrink_after_s)):
            if since is not None and now_s - since[0] >= after_s:
                self._few = self._many = None  # what was before the change says nothing about the time after it
                return since[1]
        return servers


def _since(
    known: tuple[float, int] | None, now_s: float, needed: int, extreme: Callable[[int, int], int]
) -> tuple[float, int]:
    return (now_s, needed) if known is None else (known[0], extreme(known[1], needed))


@dataclass(frozen=True, slots=True)
class Look:
    """Told by our own clock."""


class Autoscaler(Actor[Look]):
    """`spare`: workers that may be started beside those of the supervisor. `generations` tells how many run or wait, `loads` how
    many each target server that is ready serves, by incarnation."""

    def __init__(
        self,
        supervisor: WorkerSupervisor,
        demand: Demand,
        spare: Sequence[WorkerSpec],
        *,
        generations: Callable[[], int],
        loads: Callable[[], Mapping[int, int]],
    ) -> None:
        super().__init__("autoscaler")
        self._supervisor = supervisor
        self._demand = demand
        self._spare = list(spare)
        self._generations = generations
        self._loads = loads

    def on_start(self) -> None:
        self.spawn(self._tick())

    async def _tick(self) -> Look:
        await asyncio.sleep(_LOOK_S)
        return Look()

    def receive(self, message: Look) -> None:
        self.spawn(self._tick())
        supervisor = self._supervisor
        if not supervisor.restarts:  # it ends
            return
        generations, servers = self._generations(), supervisor.target_servers
        wanted = self._demand.wanted(time.monotonic(), generations, servers)
        if wanted != servers:
            log.info("the number of target servers changes", now=servers, wanted=wanted, generations=generations)
        for _ in range(wanted - servers):
            supervisor.grow(self._spare.pop(0))
        for _ in range(servers - wanted):
            self._spare.append(supervisor.shrink(self._loads()))

"""The supervisor and a launcher without processes: when workers are started, started again, killed, and left alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import dsi_actors
from dsi_actors.launching.launcher import Exit, WorkerSpec
from dsi_actors.supervision import supervisor as module
from dsi_actors.supervision.restarts import RestartBudget
from dsi_actors.supervision.supervisor import LaunchTimedOut, WorkerSupervisor, _Slot
from support.launchers import ScriptedLauncher
from support.patience import patience, until
from support.timed import timed_config

SPECS = [WorkerSpec("cpu", "target"), WorkerSpec("cpu", "drafter")]


class Supervised:
    """A supervisor that runs, its launcher, and what it has told of ended workers."""

    def __init__(self, **settings: Any) -> None:
        self.launcher = ScriptedLauncher()
        self.exits: list[tuple[str, str]] = []
        self.actor = WorkerSupervisor(
            self.launcher, timed_config(**settings), SPECS, lambda _, spec, how: self.exits.append((spec.role, how))
        )

    def started(self, role: str) -> int:
        return sum(worker.spec.role == role for worker in self.launcher.workers)


@asynccontextmanager
async def supervised(**settings: Any) -> AsyncIterator[Supervised]:
    """Both workers are started and ready."""
    running = Supervised(**settings)
    task = asyncio.create_task(running.actor.run())
    try:
        await until(lambda: len(running.actor._launching) == len(SPECS))
        for worker in running.launcher.workers:
            running.actor.on_ready(worker.incarnation)
        running.actor.restarts = True
        yield running
    finally:
        running.actor.stop()
        async with patience():
            await task


@pytest.mark.parametrize("code", [1, -9, None])
async def test_a_worker_that_died_or_was_lost_with_its_machine_is_started_again(code: int | None) -> None:
    async with supervised() as running:
        first = running.launcher.workers[0]
        first.end(code)
        await until(lambda: running.started("target") == 2)
        assert running.exits == [("target", str(Exit(code)))]
        again = running.launcher.workers[-1]
        assert again.spec == first.spec
        assert again.incarnation != first.incarnation
        assert running.started("drafter") == 1


@pytest.mark.parametrize("code", [0, -15])
async def test_a_worker_that_was_asked_to_leave_is_not_started_again(code: int) -> None:
    async with supervised() as running:
        running.launcher.workers[0].end(code)
        await until(lambda: running.exits)
        running.launcher.workers[1].end(1)
        await until(lambda: running.started("drafter") == 2)
        assert running.started("target") == 1


async def test_a_worker_that_could_not_be_started_is_tried_again() -> None:
    async with supervised() as running:
        running.launcher.failures = ["no memory", "no memory"]
        running.launcher.workers[0].end(1)
        await until(lambda: running.started("target") == 2)
        assert [how for _, how in running.exits[1:]] == ["it could not be started: no memory"] * 2


async def test_the_budget_of_restarts_ends() -> None:
    async with supervised(restarts=1) as running:
        running.launcher.workers[0].end(1)
        await until(lambda: running.started("target") == 2)
        running.launcher.workers[-1].end(1)
        await until(lambda: len(running.exits) == 2)
        running.launcher.workers[1].end(1)
        await until(lambda: running.started("drafter") == 2)
        assert running.started("target") == 2


async def test_a_worker_that_is_not_ready_in_time_is_killed_and_started_again() -> None:
    async with supervised(ready_timeout_s=0.01) as running:
        running.launcher.workers[0].end(1)
        await until(lambda: running.started("target") == 3)
        assert running.launcher.workers[2].told == ["kill"]


async def test_a_worker_that_fetches_its_model_is_not_late() -> None:
    async with supervised() as running:
        running.actor.restarts = False
        running.launcher.workers[0].end(1)
        running.launcher.workers[1].end(1)
        await until(lambda: len(running.exits) == 2)
        running.actor.restarts = True
        for spec in SPECS:
            running.actor.spawn(running.actor._start(_Slot(spec, RestartBudget(1, 60.0))))
        await until(lambda: len(running.actor._launching) == 2)
        fetches, hangs = running.launcher.workers[2:]
        for worker in (fetches, hangs):
            running.actor._launching[worker.incarnation] = -math.inf
        running.actor.on_preparing(fetches.incarnation)
        for worker in (fetches, hangs):
            running.actor.receive(LaunchTimedOut(worker.incarnation))
        assert (fetches.told, hangs.told) == ([], ["kill"])


async def test_fencing_kills_one_worker() -> None:
    async with supervised() as running:
        target, drafter = running.launcher.workers
        running.actor.give_up(target.incarnation)
        running.actor.fence(target.incarnation)
        running.actor.fence(12345)
        await until(lambda: running.exits)
        assert (target.told, drafter.told) == (["kill"], [])
        assert running.started("target") == 1, "it was given up"


async def test_the_end_asks_then_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.01)
    async with supervised() as running:
        target, drafter = running.launcher.workers
        drafter.obeys = False
        async with patience():
            await running.actor.end_all()
        assert target.told[0] == drafter.told[0] == "terminate"
        assert "kill" in drafter.told
        await until(lambda: len(running.exits) == 2)
        assert len(running.launcher.workers) == 2


async def test_a_supervisor_that_is_stopped_leaves_nothing() -> None:
    async with supervised() as running:
        workers = running.launcher.workers
    assert [worker.told for worker in workers] == [["kill"], ["kill"]]


def test_listen_and_a_launcher_exclude_each_other() -> None:
    with pytest.raises(dsi_actors.ConfigError, match="leave out listen or launcher"):
        dsi_actors.Orchestrator(timed_config(listen="tcp://127.0.0.1:*"), launcher=ScriptedLauncher())

"""How many target servers there are: what the number of generations says, and what the supervisor makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

import dsi_actors
from dsi_actors.launching.launcher import LaunchedWorker, Launcher, WorkerSpec
from dsi_actors.supervision.scaling import Autoscaler, Demand, Look
from dsi_actors.supervision.supervisor import NOT_NEEDED, WorkerSupervisor
from support.launchers import ScriptedLauncher, ScriptedWorker
from support.patience import limit_s, patience, until
from support.timed import PROMPT, gone, plain_decoding, text_of, timed_config


def demand() -> Demand:
    return Demand(2, 5, grow_after_s=1.0, shrink_after_s=10.0)


def test_servers_are_added_when_there_were_too_few_for_a_while() -> None:
    looks = [(0.0, 3), (0.5, 9), (0.9, 4), (1.0, 4)]
    found = demand()
    assert [found.wanted(now_s, generations, 2) for now_s, generations in looks] == [2, 2, 2, 3], (
        "the fewest of that time"
    )
    found = demand()
    assert found.wanted(0.0, 9, 2) == 2
    assert found.wanted(1.0, 9, 2) == 5, "never more than the most"


def test_a_burst_that_is_short_changes_nothing() -> None:
    found = demand()
    for now_s, generations in [(0.0, 5), (0.9, 2), (1.0, 5), (1.9, 5)]:
        assert found.wanted(now_s, generations, 2) == 2


def test_servers_leave_after_a_while_in_which_nobody_needed_them() -> None:
    found = demand()
    looks = [(0.0, 0), (5.0, 3), (9.9, 0), (10.0, 0)]
    assert [found.wanted(now_s, generations, 5) for now_s, generations in looks] == [5, 5, 5, 3], (
        "the most of that time"
    )
    assert [found.wanted(now_s, 0, 3) for now_s in (11.0, 20.0, 21.0)] == [3, 3, 2], (
        "and then fewer, if fewer are needed"
    )
    found = demand()
    assert found.wanted(0.0, 0, 5) == 5
    assert found.wanted(9.0, 5, 5) == 5
    assert found.wanted(10.0, 0, 5) == 5, "the time begins anew"
    assert found.wanted(20.0, 0, 5) == 2, "never fewer than the least"


class NoPlace(Launcher):
    """A cluster without a place: a start takes for ever."""

    def __init__(self) -> None:
        self.asked = self.withdrawn = 0

    async def open(self) -> str:
        return "inproc://nowhere"

    async def start(self, spec: WorkerSpec, incarnation: int) -> LaunchedWorker:
        self.asked += 1
        try:
            await asyncio.Future[None]()
        finally:
            self.withdrawn += 1
        raise AssertionError

    async def close(self) -> None:
        pass


@asynccontextmanager
async def supervisor(launcher: Launcher, exits: list[str]) -> AsyncIterator[WorkerSupervisor]:
    specs = [WorkerSpec("cpu", "target"), WorkerSpec("cpu", "drafter")]
    actor = WorkerSupervisor(launcher, timed_config(), specs, lambda _, spec, how: exits.append(f"{spec.role}: {how}"))
    actor.restarts = True
    task = asyncio.create_task(actor.run())
    try:
        yield actor
    finally:
        actor.stop()
        async with patience():
            await task


async def test_the_server_with_the_fewest_generations_leaves_and_is_not_started_again() -> None:
    launcher, exits = ScriptedLauncher(), list[str]()
    async with supervisor(launcher, exits) as actor:
        await until(lambda: len(launcher.workers) == 2)
        actor.grow(WorkerSpec("cuda:1", "target"))
        await until(lambda: len(launcher.workers) == 3)
        assert actor.target_servers == 2
        busy, idle = launcher.workers[2], launcher.workers[0]
        assert actor.shrink({busy.incarnation: 2, idle.incarnation: 1}) == WorkerSpec("cpu", "target")
        await until(lambda: exits)
        assert exits == [f"target: {NOT_NEEDED}"]
        assert [worker.told for worker in launcher.workers] == [["terminate"], [], []]
        assert actor.target_servers == 1
        assert len(launcher.workers) == 3


async def test_a_server_that_leaves_is_not_started_again_however_it_ends() -> None:
    launcher, exits = ScriptedLauncher(), list[str]()
    async with supervisor(launcher, exits) as actor:
        await until(lambda: len(launcher.workers) == 2)
        leaving: ScriptedWorker = launcher.workers[0]
        leaving.obeys = False
        actor.shrink({})
        leaving.end(1)
        await until(lambda: exits)
        launcher.workers[1].end(1)  # the drafter is started again, and so it would have been
        await until(lambda: len(launcher.workers) == 3)
        assert launcher.workers[2].spec.role == "drafter"


async def test_a_server_that_waits_for_a_place_is_withdrawn() -> None:
    launcher, exits = NoPlace(), list[str]()
    async with supervisor(launcher, exits) as actor:
        await until(lambda: launcher.asked == 2)
        actor.grow(WorkerSpec("gpu", "target"))
        await until(lambda: launcher.asked == 3)
        actor.shrink({})
        await until(lambda: launcher.withdrawn == 1)
        assert actor.target_servers == 1
    assert launcher.withdrawn == 3
    assert exits == []


async def test_nothing_changes_while_all_ends() -> None:
    launcher = ScriptedLauncher()
    async with supervisor(launcher, []) as actor:
        await until(lambda: len(launcher.workers) == 2)
        actor.restarts = False
        scaler = Autoscaler(
            actor, Demand(1, 3, shrink_after_s=1, grow_after_s=0), [WorkerSpec("cpu", "target")] * 2,
            generations=lambda: 3, loads=dict,
        )  # fmt: skip
        task = asyncio.create_task(scaler.run())
        await asyncio.sleep(0)
        scaler.receive(Look())
        assert actor.target_servers == 1
        actor.restarts = True
        await until(lambda: actor.target_servers == 3)
        scaler.stop()
        async with patience():
            await task


async def test_servers_come_and_go_with_generations() -> None:
    """Real processes: three clients make two or three servers of one; the texts are those of plain decoding."""
    config = timed_config(target_ms=30, drafter_ms=3, sp=None, target_servers=(1, 3), shrink_after_s=1.0)
    sampling, grown = dsi_actors.Sampling(max_tokens=50), asyncio.Event()
    async with dsi_actors.Orchestrator(config) as orchestrator:

        def targets() -> int:
            return sum(worker.role == "target" for worker in orchestrator.workers)

        async def ask(prompt: list[int]) -> None:
            while not grown.is_set():
                assert await text_of(orchestrator.generate(prompt, sampling)) == plain_decoding(prompt, 50)

        assert targets() == 1
        clients = [asyncio.create_task(ask([*PROMPT, number])) for number in range(3)]
        await until(lambda: targets() > 1, 60)
        seen = set(orchestrator.process_ids)
        grown.set()
        await asyncio.gather(*clients)
        again = asyncio.create_task(text_of(orchestrator.generate(PROMPT, sampling)))
        await until(lambda: targets() == 1, 60)
        left = await until(lambda: seen - set(orchestrator.process_ids))
        await until(lambda: gone(left))
        assert await asyncio.wait_for(again, limit_s(60)) == plain_decoding(PROMPT, 50)


def test_bad_numbers_of_servers_are_named() -> None:
    with pytest.raises(dsi_actors.ConfigError, match=r"a least and a most number within \[1, 1024\], not 3 and 2"):
        dsi_actors.Config(target_servers=(3, 2))
    with pytest.raises(dsi_actors.ConfigError, match="target_servers is for workers that are started here"):
        dsi_actors.Config(target_servers=(1, 2), listen="ipc:///tmp/x")
    with pytest.raises(dsi_actors.ConfigError, match="shrink_after_s must be positive"):
        dsi_actors.Config(shrink_after_s=0)

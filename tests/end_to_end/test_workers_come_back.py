"""Workers that were started by hand outlive their orchestrator: they keep their model and join the next one."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsi_actors
from dsi_actors.workforce.workforce import FoundUseless
from end_to_end.test_worker_processes import start_orchestrator
from support.forked_process import Process
from support.patience import limit_s, slowness
from support.timed import PROMPT, plain_decoding, start_worker, text_of, timed_config

TOKENS = 30


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/dsi.sock"


@pytest.fixture
def workers(endpoint: str) -> Iterator[list[Process]]:
    """Two target servers and a drafter, of which each was told what to be by the first orchestrator."""
    started = [start_worker(endpoint, once=False) for _ in range(3)]
    yield started
    for worker in started:
        with worker:
            worker.kill()


def process_ids(orchestrator: dsi_actors.Orchestrator) -> set[int]:
    return {worker.hello.process for worker in orchestrator.workers}


async def everybody(orchestrator: dsi_actors.Orchestrator) -> bool:
    return await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=limit_s())


async def text(orchestrator: dsi_actors.Orchestrator) -> list[int]:
    return await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)))


def loads(worker: Process) -> int:
    """Ends the worker. How often it loaded an engine."""
    worker.terminate()
    _, said = worker.communicate()
    return sum(" loading " in line for line in said.splitlines())


async def test_they_join_the_next_orchestrator_with_what_they_have_loaded(
    endpoint: str, workers: list[Process]
) -> None:
    roles = []
    for _ in range(3):
        async with dsi_actors.Orchestrator(timed_config(listen=endpoint)) as orchestrator:
            assert await everybody(orchestrator)
            roles.append({worker.hello.process: worker.role for worker in orchestrator.workers})
            assert await text(orchestrator) == plain_decoding(PROMPT, TOKENS)
    assert roles[0] == roles[1] == roles[2]
    assert [loads(worker) for worker in workers] == [1, 1, 1]


async def test_they_wait_for_one_that_was_killed_to_be_started_again(endpoint: str, workers: list[Process]) -> None:
    killed = start_orchestrator(endpoint, 600_000)
    assert killed.stdout is not None
    before = {int(word) for word in killed.stdout.readline().split()[1:]}
    killed.kill()
    killed.communicate()
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint)) as orchestrator:
        assert await everybody(orchestrator)
        assert process_ids(orchestrator) == before
        assert await text(orchestrator) == plain_decoding(PROMPT, TOKENS)
    assert [loads(worker) for worker in workers] == [1, 1, 1]


async def test_they_load_what_the_next_one_wants(endpoint: str, workers: list[Process]) -> None:
    before = set()
    for latency_ms in (4, 5):
        config = timed_config(listen=endpoint, target_ms=latency_ms)
        async with dsi_actors.Orchestrator(config) as orchestrator:
            assert await everybody(orchestrator)
            before.add(frozenset(process_ids(orchestrator)))
    assert len(before) == 1, "in the same processes"
    assert sorted(loads(worker) for worker in workers) == [1, 2, 2], "the drafter is as it was"


async def test_one_that_was_taken_for_dead_joins_again(endpoint: str, workers: list[Process]) -> None:
    config = timed_config(listen=endpoint, silence_ms=round(1000 * slowness()))
    async with dsi_actors.Orchestrator(config) as orchestrator:
        assert await everybody(orchestrator)
        before, numbers = process_ids(orchestrator), {worker.number for worker in orchestrator.workers}
        os.kill(workers[0].pid, signal.SIGSTOP)
        assert orchestrator._root is not None
        assert await orchestrator._root.wait_until(lambda: len(orchestrator.workers) == 2, limit_s())
        os.kill(workers[0].pid, signal.SIGCONT)
        assert await everybody(orchestrator)
        assert process_ids(orchestrator) == before
        assert {worker.number for worker in orchestrator.workers} != numbers, "as another worker"
        assert await text(orchestrator) == plain_decoding(PROMPT, TOKENS)
    assert loads(workers[0]) == 1


async def test_one_that_was_of_no_use_ends(endpoint: str, workers: list[Process]) -> None:
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint)) as orchestrator:
        assert await everybody(orchestrator)
        victim = next(worker for worker in orchestrator.workers if worker.role == "target")
        [process] = [worker for worker in workers if worker.pid == victim.hello.process]
        assert orchestrator._root is not None
        orchestrator._root.workforce.tell(FoundUseless(victim, "it was faulty"))
        _, said = await asyncio.to_thread(process.communicate)
        assert process.returncode == 1
        assert "dismissed this worker: it was faulty" in said


@pytest.mark.parametrize("once", [True, False], ids=["--once", "again"])
async def test_an_orchestrator_whose_loop_is_blocked_keeps_its_workers(endpoint: str, once: bool) -> None:
    """The Jupyter cell that computes for a while: the process lives, but answers no heartbeat."""
    silence_ms = round(300 * slowness())
    config = timed_config(listen=endpoint, heartbeat_ms=50, silence_ms=silence_ms, drafter=None, sp=1)
    worker = start_worker(endpoint, "--role", "target", once=once)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
        [before] = orchestrator.workers
        time.sleep(10 * silence_ms / 1e3)  # noqa: ASYNC251  twice as long as a worker waits for an orchestrator that is gone
        assert await text(orchestrator) == plain_decoding(PROMPT, TOKENS)
        assert orchestrator.workers == [before]
        assert not before.lost
    assert loads(worker) == 1

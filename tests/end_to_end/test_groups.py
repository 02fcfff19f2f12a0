"""A worker on several devices: it serves like any other, and ends as a whole, whichever of its processes is lost."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

import dsi_actors
from support.forked_process import Process
from support.group import config_of_a_group, make_uneven_model
from support.patience import limit_s, slowness, until
from support.timed import start_worker, text_of, wait_for_end

PROMPT = [3, 1, 4, 1, 5, 9]
DEVICES = "cpu:0,cpu:1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_uneven_model(tmp_path_factory.mktemp("uneven"))


@asynccontextmanager
async def serving(
    model: Path, tmp_path: Path, *arguments: str
) -> AsyncIterator[tuple[dsi_actors.Orchestrator, Process, psutil.Process]]:
    """An orchestrator with a worker on two devices, and the process of its second rank. At the end none is left."""
    config = dsi_actors.Config(
        target=str(model), drafter=None, listen=f"ipc://{tmp_path}/dsi.sock", sp=1, calibrate=False,
        target_options={"max_length": 128, "slots": 2}, silence_ms=round(4000 * slowness()), ready_timeout_s=600,
        request_timeout_s=600,
    )  # fmt: skip
    async with dsi_actors.Orchestrator(config) as orchestrator:
        worker = start_worker(orchestrator.endpoint, "--role", "target", *arguments, device=DEVICES)
        try:
            assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s(60))
            [rank] = psutil.Process(worker.pid).children(recursive=True)
            yield orchestrator, worker, rank
            await asyncio.to_thread(wait_for_end, [worker.pid, rank.pid])
        finally:
            worker.kill()
            worker.communicate()


async def test_a_group_serves_and_leaves_with_its_orchestrator(model: Path, tmp_path: Path) -> None:
    sampling = dsi_actors.Sampling(max_tokens=20)
    async with serving(model, tmp_path) as (orchestrator, worker, _):
        [handle] = orchestrator.workers
        assert handle.hello.device == DEVICES
        text = await text_of(orchestrator.generate(PROMPT, sampling))
        worker.terminate()
        assert await asyncio.to_thread(worker.wait, limit_s()) == 0
    alone = dsi_actors.Config(
        target=str(model), drafter=None, sp=1, calibrate=False, devices=("cpu",), target_options={"max_length": 128}
    )
    async with dsi_actors.Orchestrator(alone) as orchestrator:
        assert text == await text_of(orchestrator.generate(PROMPT, sampling))


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)], ids=["killed", "stopped"]
)
async def test_a_rank_that_is_lost_ends_the_group(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    async with serving(model, tmp_path) as (orchestrator, worker, rank):
        rank.send_signal(number)
        assert await asyncio.to_thread(worker.wait, limit_s(60)) == 1
        await until(lambda: not orchestrator.workers)
        assert worker.stderr is not None
        said = worker.stderr.read()
        assert "the group ends" in said
        assert "rank 1 of the group, on cpu:1" in said


@pytest.mark.long
async def test_a_rank_that_is_lost_in_a_forward_ends_the_group(model: Path, tmp_path: Path) -> None:
    async with serving(model, tmp_path) as (orchestrator, worker, rank):
        rank.suspend()
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=100))
        assert await asyncio.to_thread(worker.wait, limit_s(60)) == 1
        again = start_worker(orchestrator.endpoint, "--role", "target", device=DEVICES)
        assert len(await text_of(stream)) == 100
        again.terminate()
        await asyncio.to_thread(again.communicate, timeout=limit_s())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a stopped process with its parent")
async def test_no_rank_outlives_the_first_one(model: Path, tmp_path: Path) -> None:
    async with serving(model, tmp_path) as (_, worker, rank):
        rank.suspend()
        worker.kill()


async def test_what_a_rank_cannot_load_is_said_in_one_sentence(tmp_path: Path, model: Path) -> None:
    config = dsi_actors.Config(target=str(model), listen=f"ipc://{tmp_path}/dsi.sock", drafter=None)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        worker = start_worker(orchestrator.endpoint, device="cpu:0,cpu:1,cpu:2,cpu:3")
        _, said = await asyncio.to_thread(worker.communicate, timeout=limit_s(60))
    assert worker.returncode == 1
    assert "has 3 KV heads, which cannot be divided among 4 devices: give it at most 3" in said
    assert "Traceback" not in said


@pytest.mark.long
async def test_a_local_group_that_loses_a_rank_is_started_again_as_a_whole(model: Path) -> None:
    sampling = dsi_actors.Sampling(max_tokens=100)
    async with dsi_actors.Orchestrator(config_of_a_group(model)) as orchestrator:
        [handle] = orchestrator.workers
        assert handle.hello.device == "cpu:0,cpu:0"
        assert handle.ready is not None
        assert handle.ready.devices == 2
        expected = await text_of(orchestrator.generate(PROMPT, sampling))
        [rank] = psutil.Process(handle.hello.process).children(recursive=True)
        stream = orchestrator.generate(PROMPT, sampling)
        rank.kill()
        assert await text_of(stream) == expected
        [again] = orchestrator.workers
        assert again.hello.process != handle.hello.process
        left = [handle.hello.process, rank.pid, again.hello.process]
        left += [process.pid for process in psutil.Process(again.hello.process).children(recursive=True)]
    await asyncio.to_thread(wait_for_end, left)

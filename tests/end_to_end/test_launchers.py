"""An orchestrator whose workers are started by another launcher than its own."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

import dsi_actors
from support.launchers import MultiprocessingLauncher, SlowLauncher
from support.patience import limit_s, patience, until
from support.timed import PROMPT, gone, plain_decoding, text_of, timed_config

TOKENS = 60


async def test_workers_of_another_launcher_serve_and_are_started_again(tmp_path: Path) -> None:
    launcher = MultiprocessingLauncher(tmp_path)
    async with dsi_actors.Orchestrator(timed_config(sp=1), launcher=launcher) as orchestrator:
        assert orchestrator.process_ids == [], "where they run is the launcher's business"
        before = [worker.hello.process for worker in orchestrator.workers]
        victim = next(worker for worker in orchestrator.workers if worker.role == "target")
        text: list[int] = []
        async with patience():
            async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)):
                text.extend(tokens)
                if len(text) > 10 and len(text) - len(tokens) <= 10:
                    os.kill(victim.hello.process, signal.SIGKILL)
        assert text == plain_decoding(PROMPT, TOKENS)
        assert [spec.role for spec in launcher.started] == ["target", "drafter", "target"]
        assert await orchestrator.wait_for_workers(targets=1, drafters=1, timeout_s=limit_s())
        assert await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=5))) == text[:5]
        processes = before + [worker.hello.process for worker in orchestrator.workers]
    assert launcher.closed
    await until(lambda: gone(processes))


async def test_a_launcher_that_cannot_open_is_closed(tmp_path: Path) -> None:
    class Broken(MultiprocessingLauncher):
        async def open(self) -> str:
            raise dsi_actors.ConfigError("there is no cluster")

    launcher = Broken(tmp_path)
    with pytest.raises(dsi_actors.ConfigError, match="there is no cluster"):
        async with dsi_actors.Orchestrator(timed_config(), launcher=launcher):
            pass
    assert launcher.closed


async def test_a_worker_that_is_launched_while_others_end_has_ended_before_the_launcher_is_closed() -> None:
    launcher = SlowLauncher()
    starting = asyncio.create_task(dsi_actors.Orchestrator(timed_config(sp=1), launcher=launcher).__aenter__())
    await until(lambda: launcher.workers)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert [worker.told for worker in launcher.workers] == [["terminate"], ["kill"]]
    assert launcher.all_had_ended

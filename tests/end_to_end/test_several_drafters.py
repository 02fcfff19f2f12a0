"""Several drafters of one orchestrator: each generation finds the one that is the fastest for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import dsi_actors
from support.patience import limit_s
from support.timed import PROMPT, plain_decoding, text_of, timed_config, workers
from support.together import Together

pytestmark = pytest.mark.usefixtures("forked_workers")

#: Never right, and nine times in ten.
DRAFTERS = ("random", "good")


@pytest.fixture
def config() -> dsi_actors.Config:
    """With the good one a token takes a tenth of the time, so that no load of the machine hides which one it is."""
    return timed_config(drafter=DRAFTERS, target_ms=40, drafter_ms=1, acceptance=0.95)


async def test_each_generation_takes_the_fastest(config: dsi_actors.Config) -> None:
    expected = plain_decoding(PROMPT, 160)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        assert sorted(worker.kind for worker in orchestrator.workers) == ["", "", *sorted(DRAFTERS)]
        reports = []
        for _ in range(2):
            stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=160))
            assert await text_of(stream) == expected
            reports.append(await stream.report())
        learnt = orchestrator.estimates
    first, second = reports
    assert all("good" in report.drafter for report in reports), "alone, or beside the other one"
    assert first.rejections > second.rejections, "the second one has begun with it"
    assert learnt.acceptance > 0.8


async def test_a_drafter_that_dies_leaves_the_others(config: dsi_actors.Config) -> None:
    expected = plain_decoding(PROMPT, 160)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=100)))
        [good] = [worker for worker in orchestrator.workers if worker.kind == "good"]
        found: list[int] = []
        async with orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=160)) as stream:
            async for tokens in stream:
                found += tokens
                if not 40 <= len(found) < 40 + len(tokens):
                    continue
                os.kill(good.hello.process, signal.SIGKILL)
        assert found == expected
        assert await orchestrator.wait_for_workers(targets=2, drafters=2, timeout_s=limit_s()), "it is started again"
        assert await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=160))) == expected


async def test_plain_decoding_asks_no_drafter(config: dsi_actors.Config) -> None:
    async with dsi_actors.Orchestrator(config) as orchestrator:
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=40), algorithm="ar")
        assert await text_of(stream) == plain_decoding(PROMPT, 40)
        report = await stream.report()
    assert (report.drafter, report.drafted_tokens) == ("", 0)


async def test_workers_that_ask_become_what_is_missing(tmp_path: Path) -> None:
    """One after another: a target server first, then a drafter of each kind, then more target servers."""
    config = timed_config(drafter=DRAFTERS, listen=f"ipc://{tmp_path}/dsi.sock")
    async with dsi_actors.Orchestrator(config) as orchestrator:
        with workers(orchestrator.endpoint, [], [], [], []):
            assert await orchestrator.wait_for_workers(targets=2, drafters=2, timeout_s=limit_s())
            assert sorted(worker.kind for worker in orchestrator.workers) == ["", "", *sorted(DRAFTERS)]
            stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=40))
            assert await text_of(stream) == plain_decoding(PROMPT, 40)


async def test_drafters_draft_together_and_the_text_is_the_targets_own() -> None:
    """One that is right most of the time, and one that never is: after each had its turn, both at the same time."""
    together, expected = Together(), plain_decoding(PROMPT, 300)
    async with dsi_actors.Orchestrator(
        timed_config(drafter=DRAFTERS[::-1], target_ms=20, drafter_ms=1, acceptance=0.8)
    ) as orchestrator:
        orchestrator.observe(together)
        assert await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=300))) == expected
        drafters = {worker.number for worker in orchestrator.workers if worker.role == "drafter"}
    assert together.drafted == drafters


@pytest.mark.parametrize("dies", DRAFTERS)
async def test_a_drafter_that_dies_beside_another_one_comes_back(dies: str) -> None:
    together, found = Together(), list[int]()
    config = timed_config(drafter=DRAFTERS[::-1], target_ms=20, drafter_ms=1, acceptance=0.8)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        orchestrator.observe(together)
        before = {worker.kind: worker for worker in orchestrator.workers}
        killed = False
        async with orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=600)) as stream:
            async for tokens in stream:
                found += tokens
                if len(together.drafted) > 1 and together.there > 1 and not killed:
                    os.kill(before[dies].hello.process, signal.SIGKILL)
                    killed = True
        assert killed, "they drafted together"
        assert found == plain_decoding(PROMPT, 600)
        assert await orchestrator.wait_for_workers(targets=2, drafters=2, timeout_s=limit_s()), "it is started again"


async def test_drafters_draft_together_where_the_user_fixed_the_lookahead_and_rows() -> None:
    together, expected = Together(), plain_decoding(PROMPT, 300)
    config = timed_config(drafter=DRAFTERS[::-1], target_ms=10, drafter_ms=1, acceptance=0.8, alternatives=0.5)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        orchestrator.observe(together)
        for rows in (1, 4):
            for algorithm in ("si", "dsi"):
                stream = orchestrator.generate(
                    PROMPT, dsi_actors.Sampling(max_tokens=300), algorithm=algorithm, lookahead=3, rows=rows
                )
                assert await text_of(stream) == expected
            assert len(together.drafted) == (0 if rows == 1 else 2), "never where chains were asked for"

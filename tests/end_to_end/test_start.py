"""What an orchestrator knows when it has started its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dsi_actors
from dsi_actors.core.actions import EmitTokens, StartDraft
from dsi_actors.core.events import VerificationFinished
from dsi_actors.generation.knowledge import Knowledge
from dsi_actors.planning.estimates import Estimates
from dsi_protocol import Ready
from support.engines import make_tiny_model
from support.timed import timed_config

pytestmark = pytest.mark.usefixtures("forked_workers")


async def started(config: dsi_actors.Config) -> tuple[list[Any], Estimates, dict[str, Ready]]:
    """What the cores did before anybody asked for anything, what is known then, and what the workers said, by role."""
    orchestrator = dsi_actors.Orchestrator(config)
    seen: list[Any] = []
    orchestrator.observe(lambda generation, item: seen.append(item))
    async with orchestrator:
        assert orchestrator.running == 0
        said = {worker.role: worker.ready for worker in orchestrator.workers if worker.ready is not None}
        return seen, orchestrator.estimates, said


async def test_on_processors_plain_decoding_is_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers measured themselves while others started: what counts is a generation when all of them are there."""
    measured: list[float] = []
    original = Knowledge.measured_alone

    def measured_alone(knowledge: Knowledge, target_ms: float) -> None:
        """Another time than any worker can have said."""
        measured.append(target_ms)
        original(knowledge, target_ms + 1000.0)

    monkeypatch.setattr(Knowledge, "measured_alone", measured_alone)
    config = dsi_actors.Config(target=str(make_tiny_model(tmp_path / "tiny")), drafter="self-int8", sp=1)
    seen, estimates, said = await started(config)
    [target_ms] = measured
    assert target_ms > 0
    assert estimates.target_ms == estimates.calibrated_ms == target_ms + 1000.0
    target, drafter = said["target"], said["drafter"]
    assert estimates.window_ms / estimates.target_ms == pytest.approx(target.window_latency_us / target.latency_us)
    assert estimates.drafter_ms == drafter.latency_us / 1e3
    assert not any(isinstance(item, StartDraft) for item in seen), "nobody drafts meanwhile"
    assert sum(isinstance(item, VerificationFinished) for item in seen) == 3
    assert sum(len(item.tokens) for item in seen if isinstance(item, EmitTokens)) == 3


async def test_timed_workers_take_what_they_say() -> None:
    seen, estimates, _ = await started(timed_config(target_ms=8, drafter_ms=1))
    assert seen == []
    assert estimates.target_ms == 8


async def test_without_calibration_nothing_is_measured(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "tiny"))
    config = dsi_actors.Config(target=model, drafter="self-int8", sp=1, calibrate=False)
    seen, estimates, _ = await started(config)
    assert seen == []
    assert estimates.target_ms == 0

"""What an orchestrator knows when it has started its workers."""

from __future__ import annotations

from pathlib import Path

import dsi_actors
from support.engines import make_tiny_model
from support.timed import timed_config


async def test_on_processors_plain_decoding_is_measured_alone(tmp_path: Path) -> None:
    """Workers measured themselves while others started."""
    config = dsi_actors.Config(target=str(make_tiny_model(tmp_path / "tiny")), drafter="self-int8", sp=1)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        estimates, running = orchestrator.estimates, orchestrator.running
        [said_us] = [worker.ready.latency_us for worker in orchestrator.workers if worker.ready and not worker.kind]
    assert running == 0
    assert 0 < estimates.target_ms == estimates.calibrated_ms
    assert estimates.target_ms != said_us / 1e3
    assert estimates.drafter_ms > 0


async def test_timed_workers_take_what_they_say() -> None:
    async with dsi_actors.Orchestrator(timed_config(target_ms=8, drafter_ms=1)) as orchestrator:
        assert orchestrator.estimates.target_ms == 8

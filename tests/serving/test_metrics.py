"""What Prometheus is told of the service itself, and of generations that do not come to their end."""

from __future__ import annotations

import asyncio
import os
import platform
from importlib import metadata

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsi_actors.serving.metrics import Metrics
from dsi_protocol import PROTOCOL_VERSION


def metrics() -> Metrics:
    return Metrics("m", workers=lambda role: 0, waiting=lambda: 0)


def samples(found: Metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    """By name."""
    told: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(found.text().decode()):
        for sample in family.samples:
            told.setdefault(sample.name, []).append((sample.labels, sample.value))
    return told


def test_nothing_says_when_a_series_began() -> None:
    found = metrics()
    found.request("ok")
    assert not [name for name in samples(found) if name.endswith("_created")]
    assert samples(found)["dsi_requests_total"] == [({"model": "m", "outcome": "ok"}, 1.0)]


def test_the_process_and_the_version_are_told() -> None:
    told = samples(metrics())
    [(labels, value)] = told["dsi_build_info"]
    assert value == 1
    assert labels == {
        "model": "m", "version": metadata.version("dsi-actors"), "protocol": str(PROTOCOL_VERSION),
        "python": platform.python_version(),
    }  # fmt: skip
    [(_, began_s)] = told["process_start_time_seconds"]
    assert began_s == pytest.approx(psutil.Process(os.getpid()).create_time(), abs=1)
    assert told["process_resident_memory_bytes"][0][1] > 1 << 20


@pytest.mark.parametrize(("error", "reason"), [(asyncio.CancelledError(), "cancelled"), (ValueError(), "error")])
def test_a_generation_that_is_broken_off_is_counted(error: BaseException, reason: str) -> None:
    found = metrics()
    with pytest.raises(type(error)), found.running():
        raise error
    told = samples(found)
    assert told["dsi_generations_total"] == [({"model": "m", "reason": reason}, 1.0)]
    assert told["dsi_generations_running"] == [({"model": "m"}, 0.0)]

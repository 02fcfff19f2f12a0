"""Settings of all tests: no test fails because the machine is slow."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from support import patience

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_runtest_setup() -> None:
    patience.measure()

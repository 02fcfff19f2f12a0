"""What a worker tells of the process that fetches its model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import pytest

from dsi_protocol import Goodbye, Message, Preparing
from dsi_workers.connection import WorkSocket
from dsi_workers.models.files import unreported
from dsi_workers.prepare_models import NotNeeded, _Preparing
from support.engines import make_tiny_model
from support.hub import LoopbackHub

NAME = "org/tiny"


class LateSocket:
    """Waits for messages for so long that the process has ended at the second look."""

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        for thread in threading.enumerate():
            if thread.name == "preparation":
                thread.join()
        return None

    def try_send(self, message: Message) -> bool:
        return True


def test_the_end_of_a_fetch_is_reported_though_nobody_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[tuple[str, float | None]] = []
    with LoopbackHub() as hub:
        hub.add(NAME, make_tiny_model(tmp_path / "tiny"))
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        preparing = _Preparing(
            cast(WorkSocket, LateSocket()), lambda: True, lambda what, done, _: reported.append((what, done))
        )
        directory = preparing.directory_of(NAME)
    assert Path(directory, "model.safetensors").is_file()
    assert reported[-1] == (f"fetching {NAME}", 1.0)


class Dismissing(LateSocket):
    """Has a Goodbye from the beginning."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        return Goodbye("the orchestrator ends", again=True)

    def try_send(self, message: Message) -> bool:
        self.sent.append(message)
        return True


def test_a_worker_says_that_it_prepares_its_model_before_the_process_that_does_says_anything() -> None:
    """Until then its orchestrator takes it for one that loads, reads nothing, and need not be waited for."""
    socket = Dismissing()
    with pytest.raises(NotNeeded):
        _Preparing(cast(WorkSocket, socket), lambda: True, unreported).directory_of(NAME)
    assert socket.sent == [Preparing(f"preparing {NAME}", 0)]

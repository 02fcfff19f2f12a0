"""Lines of the log: the same for orchestrators and workers, whole, and left to the application that embeds us."""

from __future__ import annotations

import io
import json
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Literal, TypeAlias

import pytest
import structlog

from dsi_actors.logs import get_logger, show_logs

Form: TypeAlias = Literal["text", "json"]


class Stream(io.StringIO):
    """Standard error that keeps what each write brings."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Form], Stream]]:
    """Shows logs on a standard error of its own. Afterwards loggers are as they were."""
    loggers = [logging.getLogger(name) for name in ("dsi", "uvicorn")]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]

    def show(form: Form) -> Stream:
        stream = Stream()
        monkeypatch.setattr(sys, "stderr", stream)
        show_logs("info", form)
        return stream

    yield show
    structlog.reset_defaults()
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def of_the_orchestrator() -> Any:
    return get_logger("test")


def of_a_worker() -> Any:
    """As the modules of dsi_workers make theirs, which know nothing of dsi_actors."""
    return structlog.get_logger("dsi.test")


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("logger", [of_the_orchestrator, of_a_worker])
def test_a_line_is_written_in_one_piece_and_names_its_host(
    shown: Callable[[Form], Stream], form: Form, logger: Callable[[], Any]
) -> None:
    """Several processes, perhaps of several machines, write to one file."""
    stream = shown(form)
    logger().debug("nobody asked for this")
    logger().info("something", number=1, told="two words")
    [line] = stream.written
    assert "something" in line
    assert socket.gethostname() in line
    assert line.count("\n") == 1
    assert line.endswith("\n")


def test_json_has_the_same_keys_whoever_writes(shown: Callable[[Form], Stream]) -> None:
    stream = shown("json")
    for logger in (of_the_orchestrator(), of_a_worker()):
        try:
            raise ValueError("no")
        except ValueError:
            logger.exception("it failed", number=1)
    logging.getLogger("uvicorn.error").warning("of a %s", "library")
    ours, workers, library = map(json.loads, stream.written)
    assert list(ours) == list(workers) == ["time", "level", "logger", "host", "event", "number", "exception"]
    for line in (ours, workers):
        assert (line["level"], line["logger"], line["event"]) == ("error", "dsi.test", "it failed")
        assert line["exception"].endswith("ValueError: no")
    assert (library["level"], library["logger"], library["event"]) == ("warning", "uvicorn.error", "of a library")
    for line in (ours, workers, library):
        assert line["host"] == socket.gethostname()
        assert datetime.fromisoformat(line["time"]).utcoffset() is not None


def test_an_application_that_shows_nothing_of_ours_gets_text(caplog: pytest.LogCaptureFixture) -> None:
    """Its own handlers and formatters see a message with all that is known."""
    get_logger("test").warning("something", number=1, told="two words")
    [record] = caplog.records
    assert (record.name, record.levelno) == ("dsi.test", logging.WARNING)
    assert record.getMessage() == 'event=something number=1 told="two words"'

"""A recording: the core's own events and actions with their times, one JSON object in each line.

The first line says what is recorded and who took part, the last one has the text of each token, if it is known.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dsi_actors.core.actions import Action
from dsi_actors.core.events import Event
from dsi_actors.errors import ConfigError

_VERSION = 1
_BEGINNING = b'{"recording": '


@dataclass(frozen=True, slots=True)
class Moment:
    """One event or action: its name, as in dsi_actors/core, and its fields."""

    at_ms: float
    generation: int
    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Recording:
    workers: Mapping[int, str]
    moments: Sequence[Moment]
    #: The text of each committed token of the generation that was recorded.
    texts: Sequence[str]


class Recorder:
    """An observer for `Orchestrator.observe` that writes to a file as it goes. `clock` gives the time in seconds."""

    def __init__(
        self, file: IO[str], workers: Mapping[int, str], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._file = file
        self._clock = clock
        self._begun_s = clock()
        self._write({"recording": _VERSION, "workers": {str(number): name for number, name in workers.items()}})

    def __call__(self, generation: int, item: Event | Action) -> None:
        at_ms = round((self._clock() - self._begun_s) * 1e3, 3)
        self._write({"at_ms": at_ms, "generation": generation, type(item).__name__: asdict(item)})

    def end(self, texts: Iterable[str]) -> None:
        self._write({"texts": list(texts)})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")


def open_recording(path: str | Path) -> IO[str]:
    """A file for a Recorder. Takes the place of an earlier recording, and of nothing else. Raises ConfigError."""
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size and not _begins_like_one(path):
            raise ConfigError(f"--record {path} exists and is no recording: give the name of a new file")
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write --record {path}: {error.strerror}") from None


def _begins_like_one(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_BEGINNING)) == _BEGINNING


def read_recording(path: str | Path) -> Recording:
    """Raises ConfigError."""
    problem = f"{path} is no recording: make one with dsi-actors generate PROMPT --record NEW-FILE"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(problem) from None
    try:
        head, *rest = [json.loads(line) for line in lines]
        if head["recording"] != _VERSION:
            raise ConfigError(f"{path} was recorded by another version ({head['recording']}): record it again")
        workers = {int(number): str(name) for number, name in head["workers"].items()}
        texts = rest.pop()["texts"] if rest and "texts" in rest[-1] else []
        moments = [_moment(line) for line in rest]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(problem) from None
    if not moments:
        raise ConfigError(f"nothing happened in {path}")
    return Recording(workers, moments, texts)


def _moment(line: dict[str, Any]) -> Moment:
    [(name, fields)] = [(name, value) for name, value in line.items() if name not in ("at_ms", "generation")]
    return Moment(float(line["at_ms"]), int(line["generation"]), name, dict(fields))

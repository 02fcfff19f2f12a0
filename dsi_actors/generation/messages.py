"""What comes to the mailbox of a generation: events for its core, meanings of replies, and news of its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dsi_actors.core.events import Event
from dsi_actors.generation.answers import Meaning
from dsi_actors.workforce.worker_handle import WorkerHandle


@dataclass(frozen=True, slots=True)
class Granted:
    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """The server is another generation's now; or the drafter was exchanged for others, which are granted next."""

    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class WaitedForTarget:
    """The `waits`-th wait for a target server is over."""

    waits: int


@dataclass(frozen=True, slots=True)
class Settled:
    """The last reply is in, or waiting for it took too long."""


GenerationMessage: TypeAlias = Event | Meaning | Granted | Reclaimed | WaitedForTarget | Settled

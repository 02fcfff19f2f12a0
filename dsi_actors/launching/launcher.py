"""The interface of a launcher: it starts workers somewhere, stops them, and tells when they end.

The supervisor (dsi_actors/supervision/supervisor.py) decides when a worker is started and whether it is started again. A
launcher only carries that out: it has no restarts of its own, and it keeps no worker alive.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from dsi_actors.keys import AllowedKeys

#: The environment variable by which a worker learns its incarnation. Other users cannot read a process's environment.
INCARNATION_VARIABLE = "DSI_INCARNATION"


class LaunchError(Exception):
    """A worker could not be started: no memory, too many processes. The message is the reason. Another attempt may succeed."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker to start. It runs `python -m dsi_actors.worker` with `arguments`, and with `environment` beside its own."""

    #: As --gpu takes it, such as `0` or `0,1`. On a cluster `gpu`, `gpu,gpu` or `cpu`: the cluster chooses which GPUs.
    device: str
    role: str
    #: The kind of drafter, if there are several kinds; else "".
    model: str = ""
    #: Where the orchestrator listens.
    endpoint: str = ""
    log_level: str = "warning"
    log_format: str = "text"
    #: The models are on the worker's machine already. It fetches nothing: all workers load the same files.
    models_are_there: bool = False

    def arguments(self) -> list[str]:
        """All but `--gpu`, for which a launcher may have its own name."""
        return [
            "--connect", self.endpoint, "--role", self.role, *(["--model", self.model] if self.model else []),
            "--log-level", self.log_level, "--log-format", self.log_format, "--supervised",
            *(["--no-fetch"] if self.models_are_there else []),
        ]  # fmt: skip

    def environment(self, incarnation: int) -> Mapping[str, str]:
        offline = {"HF_HUB_OFFLINE": "1"} if self.models_are_there else {}
        return {INCARNATION_VARIABLE: str(incarnation), **offline}


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended. `code`: its exit status, or -N if signal N ended it. None: unknown, since its machine is gone."""

    code: int | None

    @property
    def was_asked_for(self) -> bool:
        """True if the worker ended as one does that was asked to leave."""
        return self.code in (0, -signal.SIGTERM)

    def __str__(self) -> str:
        return "its machine is gone" if self.code is None else f"it ended with exit code {self.code}"


class LaunchedWorker(ABC):
    """One worker that was started. Once it has ended, `terminate` and `kill` do nothing."""

    @abstractmethod
    def terminate(self) -> None:
        """Ask the worker to finish what it has been asked and to end. Returns at once."""

    @abstractmethod
    def kill(self) -> None:
        """End the worker whatever state it is in, stopped or hanging. Returns at once."""

    @abstractmethod
    async def wait(self) -> Exit:
        """Return when the worker has ended. May be called several times. Always returns some time after `kill`, even if the
        worker's machine is gone."""

    @property
    def process_id(self) -> int | None:
        """The worker's process on this machine; None if it runs elsewhere."""
        return None


class Launcher(ABC):
    """Starts the workers of one orchestrator. Everything runs in the orchestrator's event loop."""

    #: Who may connect to the endpoint. None: anybody who can reach it.
    keyring: AllowedKeys | None = None

    @abstractmethod
    async def open(self) -> str:
        """Prepare to start workers. Returns the endpoint at which the orchestrator must listen, so that these workers reach
        it. Called once, before all else. Raises ConfigError."""

    @abstractmethod
    async def start(self, spec: WorkerSpec, incarnation: int) -> LaunchedWorker:
        """Start a worker. It says Hello with `incarnation`, by which the orchestrator recognizes it. If this is cancelled, no
        worker is left. Raises LaunchError."""

    @abstractmethod
    async def close(self) -> None:
        """Give back what `open` took. Called once, when no worker is left, also if `open` failed or was never called."""

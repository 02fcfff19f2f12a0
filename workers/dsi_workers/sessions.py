"""A worker's open generations. If there are too many, the one that has been idle longest is closed."""

from __future__ import annotations

from collections.abc import Container

import structlog

from dsi_protocol import OpenGeneration
from dsi_workers.session import Session

log = structlog.get_logger("dsi.worker")

MAX_SESSIONS = 256


class Sessions:
    """Sessions by generation. Those that are closed are kept until the engine has been told."""

    def __init__(self) -> None:
        #: The least recently used first.
        self._open: dict[int, Session] = {}
        self._closed: list[Session] = []

    def get(self, generation: int) -> Session | None:
        return self._open.get(generation)

    def use(self, generation: int) -> Session | None:
        """The session of this generation, which is the most recently used one from now on."""
        session = self._open.pop(generation, None)
        if session is not None:
            self._open[generation] = session
        return session

    def open(self, opened: OpenGeneration, busy: Container[int]) -> None:
        """Open a generation, unless it is open. `busy`: generations with unfinished requests, which are not closed for it."""
        if opened.generation in self._open:
            return
        if len(self._open) >= MAX_SESSIONS and not self._evict(busy):
            log.warning("too many generations are open: a new one is refused", limit=MAX_SESSIONS)
            return
        self._open[opened.generation] = Session(
            opened.generation, opened.prompt_length, opened.correlation, opened.sampling
        )

    def _evict(self, busy: Container[int]) -> bool:
        """Close the generation that has been idle longest: its CloseGeneration may be lost. Returns False if none is idle.

        If that generation continues, the orchestrator opens it again.
        """
        idle = next((generation for generation in self._open if generation not in busy), None)
        if idle is not None:
            self.close(idle)
        return idle is not None

    def close(self, generation: int) -> None:
        """Close a generation, if it is open. All its requests are cancelled."""
        session = self._open.pop(generation, None)
        if session is not None:
            session.cancelled_to = 2**64
            self._closed.append(session)

    def close_all(self) -> None:
        for generation in list(self._open):
            self.close(generation)

    def take_closed(self) -> list[Session]:
        """The sessions that were closed since the last call."""
        closed, self._closed = self._closed, []
        return closed

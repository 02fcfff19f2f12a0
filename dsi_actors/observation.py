"""Observers of generations. Any number may look on at once; one that fails harms neither a generation nor another observer."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeAlias

from dsi_actors.core.actions import Action
from dsi_actors.core.events import Event
from dsi_actors.logs import get_logger

log = get_logger("observation")

#: Called with a generation's number and an event or action of its core. It must return at once.
Observer: TypeAlias = Callable[[int, Event | Action], None]


class Observation:
    """One observer, from `Orchestrator.observe` to `end`. As a context manager it ends with its block."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.ended = False

    def tell(self, generation: int, item: Event | Action) -> None:
        """The first error of the observer is logged and ends the observation."""
        if self.ended:
            return
        try:
            self._observer(generation, item)
        except Exception:
            self.end()
            log.exception("an observer failed and is told no more")

    def end(self) -> None:
        """The observer is told nothing more, also of generations that still run. Calling this again changes nothing."""
        self.ended = True

    def __enter__(self) -> Observation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()


class Observations:
    """Those of one orchestrator."""

    def __init__(self) -> None:
        self._observations: list[Observation] = []

    def add(self, observer: Observer) -> Observation:
        observation = Observation(observer)
        self._observations = [*self._present(), observation]
        return observation

    def teller(self) -> Observer | None:
        """What a generation that starts now calls for each event and action. None: nobody observes."""
        present = self._present()
        if not present:
            return None

        def tell(generation: int, item: Event | Action) -> None:
            for observation in present:
                observation.tell(generation, item)

        return tell

    def _present(self) -> list[Observation]:
        return [observation for observation in self._observations if not observation.ended]

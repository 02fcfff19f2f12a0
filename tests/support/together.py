"""Test support: sees from outside when several drafters serve a generation at the same time."""

from __future__ import annotations

from dsi_actors.core.actions import Action
from dsi_actors.core.events import DrafterJoined, DrafterLost, DraftsArrived, Event


class Together:
    """An observer for `Orchestrator.observe`."""

    def __init__(self) -> None:
        #: Drafters of each generation.
        self._there: dict[int, set[int]] = {}
        #: Those whose drafts came while several were there, most often the ones of all of them.
        self.drafted: set[int] = set()

    def __call__(self, generation: int, item: Event | Action) -> None:
        there = self._there.setdefault(generation, set())
        match item:
            case DrafterJoined(drafter):
                there.add(drafter)
            case DrafterLost(drafter):
                there.discard(drafter)
            case DraftsArrived(drafter=drafter) if len(there) > 1:
                self.drafted.add(drafter)

    @property
    def there(self) -> int:
        """How many drafters serve the generation that began last."""
        return len(self._there[max(self._there)]) if self._there else 0

"""The drafters that are lent to one generation: who leads, and what each was asked last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsi_actors.core.actions import StartDraft
from dsi_actors.workforce.worker_handle import WorkerHandle

#: A drafter that reads the text is not judged, until this number of tokens was committed since it was lent.
_MOST_READING = 128


@dataclass(slots=True, eq=False)
class LentDrafter:
    """A drafter from the time that it is lent until it is lost or taken back. Lent again, it is another one of these."""

    worker: WorkerHandle
    #: Of several the one with the lowest rank leads (core/drafting.py).
    rank: int
    last_attempt: int = 0
    #: Requests up to this attempt are cancelled.
    cancelled_to: int = 0
    #: How many tokens were committed when it was lent.
    committed_before: int = 0
    #: Whether it has answered, and so has read the text.
    has_read: bool = False
    #: When it sent its last block of drafts, in seconds of time.perf_counter.
    heard_s: float = 0.0
    #: For how long its generation had verified something by then.
    heard_verified_ms: float = 0.0

    def asked(self, action: StartDraft) -> None:
        self.last_attempt = action.attempt
        if action.start == action.base + len(action.tokens):  # it ends those before it
            self.cancelled_to = action.attempt - 1


class LentDrafters:
    """All of one generation, by the number of the worker."""

    def __init__(self) -> None:
        self._lent: dict[int, LentDrafter] = {}
        #: What the last ones are called, the leader first.
        self.name = ""

    def __getitem__(self, number: int) -> LentDrafter:
        return self._lent[number]

    def __contains__(self, number: int) -> bool:
        return number in self._lent

    def __len__(self) -> int:
        return len(self._lent)

    def __iter__(self) -> Iterator[LentDrafter]:
        """The leader first."""
        return iter(self._lent.values())

    @property
    def leader(self) -> LentDrafter | None:
        return next(iter(self), None)

    @property
    def kinds(self) -> list[str]:
        return [lent.worker.kind for lent in self]

    @property
    def workers(self) -> list[WorkerHandle]:
        return [lent.worker for lent in self]

    def read(self, committed: int) -> bool:
        """Whether some drafter has yet to read the text, which has this number of committed tokens. After `_MOST_READING` further
        tokens a drafter counts as slow, and no longer as one that reads."""
        return any(not lent.has_read and committed - lent.committed_before < _MOST_READING for lent in self)

    def add(self, worker: WorkerHandle, rank: int, committed: int) -> LentDrafter:
        lent = self._lent[worker.number] = LentDrafter(worker, rank, committed_before=committed)
        self._lent = dict(sorted(self._lent.items(), key=lambda item: item[1].rank))
        self._rename()
        return lent

    def remove(self, number: int) -> None:
        """All that it was asked is cancelled: it was closed, or is gone."""
        lent = self._lent.pop(number)
        lent.cancelled_to = lent.last_attempt
        self._rename()

    def _rename(self) -> None:
        self.name = " & ".join(self.kinds) or self.name

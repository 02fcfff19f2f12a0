"""Requests in hand, and which of them the next step works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsi_protocol import Draft, Verify
from dsi_workers.engine import Engine, Task
from dsi_workers.session import Session
from dsi_workers.tree import Branch


@dataclass(slots=True, eq=False)
class Work:
    """A request in hand, and what it has cost since the last reply to it."""

    request: Draft | Verify
    session: Session
    #: What the engine is asked, once the session's tokens agree with the request. A draft has one for each step.
    task: Task | None = None
    forwards: int = 0
    #: Its share of the steps that it was in.
    busy_s: float = 0.0
    #: Verify: what is checked beside the session's tokens.
    branches: Sequence[Branch] = ()
    #: Draft: a later one brought its own prefix. The step that runs is finished, since its drafts may be of use to that one.
    superseded: bool = False
    #: The number of the last step that worked on it.
    turn: int = 0

    def wanted(self) -> bool:
        return self.request.attempt > self.session.cancelled_to

    def begin_task(self) -> None:
        session, request = self.session, self.request
        if isinstance(request, Verify):
            self.task = Task(session, request.start, branches=self.branches)
            return
        length = len(session.tokens)
        self.task = Task(session, length, request.start + request.count - length, alternatives=request.rows > 1)
        if request.rows > 1:
            self.task.branches = session.drafts.branches[: request.rows - 1]

    def take_busy_us(self) -> int:
        busy_s, self.busy_s = self.busy_s, 0.0
        return round(busy_s * 1e6)


class WorkQueue:
    """In the order of arrival. Requests of one session are worked on one after another, those of several together."""

    def __init__(self) -> None:
        self._works: list[Work] = []
        self._steps = 0
        self._read_last = False

    def __len__(self) -> int:
        return len(self._works)

    def __iter__(self) -> Iterator[Work]:
        return iter(tuple(self._works))

    def add(self, work: Work) -> None:
        self._works.append(work)

    def remove(self, work: Work) -> None:
        self._works.remove(work)

    def choose(self, works: Sequence[Work], engine: Engine) -> list[Work]:
        """Of `works`, one for each session: those for the next step, who waited longest first.

        Pieces of long texts and batches of all others take turns: nobody waits for the whole of a long prompt.
        """
        tasks = {work: work.task for work in sorted(works, key=lambda work: work.turn) if work.task is not None}
        reading = [work for work, task in tasks.items() if engine.reads_alone(task)]
        batch = [work for work in tasks if work not in reading][: max(1, engine.info.slots)]
        reads = bool(reading) and (not batch or not self._read_last)
        if reads:
            batch = reading[:1]
        self._read_last = reads
        self._steps += 1
        for work in batch:
            work.turn = self._steps
        return batch

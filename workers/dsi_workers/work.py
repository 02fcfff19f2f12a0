"""The queue of a worker's unfinished requests, and the choice of the requests for the next step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dsi_protocol import Request, Score, Verify
from dsi_workers.engine import Engine, Task
from dsi_workers.session import Session
from dsi_workers.tree import Branch, Walk


@dataclass(slots=True, eq=False)
class Work:
    """An unfinished request, and its cost so far."""

    request: Request
    session: Session
    #: The engine's task, set once the session's tokens match the request. A draft gets a new task for each step.
    task: Task | None = None
    #: Forward passes in which the request took part, since the last Verified.
    forwards: int = 0
    #: The request's share of the time of its steps, since the last reply to it.
    busy_s: float = 0.0
    #: Of a Verify: branches to verify besides the session's tokens.
    branches: Sequence[Branch] = ()
    #: True for a Draft after which another one arrived with a prefix of its own. The earlier Draft ends after the current step,
    #: because the later one may use what this step drafts.
    superseded: bool = False
    #: True if even the current step is of no use, and is aborted. A Draft is useless if the later one goes on behind tokens that
    #: were not drafted here. A Verify that goes on by itself is useless once another Verify arrived.
    useless: bool = False
    #: The number of the last step in which the request took part.
    last_step: int = 0
    #: The position of the first token of the next answer to a Verify or a Score.
    start: int = field(init=False)
    #: How many further answers to a Verify may follow the next one (SPEC.md section 5.18).
    ahead: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.request.start
        self.ahead = self.request.ahead if isinstance(self.request, Verify) else 0

    def wanted(self) -> bool:
        return self.request.attempt > self.session.cancelled_to and not self.useless

    def begin_task(self) -> None:
        session, request = self.session, self.request
        if isinstance(request, Verify):
            self.task = Task(session, self.start, branches=self.branches)
            return
        if isinstance(request, Score):
            self.task = Task(session, self.start, score=True)
            return
        length = len(session.tokens)
        block = max(1, request.block - session.drafts.unsent)
        count = request.start + request.count - length
        self.task = Task(session, length, count, alternatives=request.rows > 1, block=block)
        if request.rows > 1:
            self.task.branches = session.drafts.branches[: request.rows - 1]

    @property
    def goes_on(self) -> bool:
        """Whether a Verify was answered and goes on by itself."""
        return isinstance(self.request, Verify) and self.start > self.request.start

    def may_go_on(self, answer: Sequence[int]) -> bool:
        """Whether the server may go on by itself behind this answer to a Verify. Not if all guesses were right: the next Verify
        brings further guesses then."""
        tokens = self.session.tokens
        guesses = self.branches or self.start < len(tokens)
        return self.ahead > 0 and not (guesses and Walk(tokens, self.branches, self.start).ends_with(answer))

    def go_on(self, answer: Sequence[int]) -> None:
        """Begin the forward for the token that follows this answer."""
        self.session.write(self.start, answer)
        self.start += len(answer)
        self.session.truncate(self.start)
        self.ahead -= 1
        self.branches = ()
        self.begin_task()

    def take_forwards(self) -> int:
        forwards, self.forwards = self.forwards, 0
        return forwards

    def take_busy_us(self) -> int:
        busy_s, self.busy_s = self.busy_s, 0.0
        return round(busy_s * 1e6)


class WorkQueue:
    """Unfinished requests in the order of arrival.

    Requests of one session are served one after another. Requests of different sessions can share a step.
    """

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

    def reads_on(self, session: Session) -> bool:
        """Whether the step that was chosen last reads a part of this session's prompt, which some request needs.

        Then it goes on, although its own request was cancelled. A worker that is slower than others is given up and asked anew,
        further on in the text. If it read the same part from the start each time, it might never come to its end.
        """
        reads = self._read_last and session.computed < session.prompt_length
        return reads and any(work.session is session and work.wanted() for work in self._works)

    def choose(self, works: Sequence[Work], engine: Engine) -> list[Work]:
        """Choose the requests for the next step from `works`, which has one request per session.

        Requests that have waited longest come first. Chunks of long prompts alternate with batches of the other requests, so
        that no request waits for a whole prompt.
        """
        tasks = {work: work.task for work in sorted(works, key=lambda work: work.last_step) if work.task is not None}
        reading = [work for work, task in tasks.items() if engine.reads_alone(task)]
        batch = [work for work in tasks if work not in reading][: max(1, engine.info.slots)]
        reads = bool(reading) and (not batch or not self._read_last)
        if reads:
            batch = reading[:1]
        self._read_last = reads
        self._steps += 1
        for work in batch:
            work.last_step = self._steps
        return batch

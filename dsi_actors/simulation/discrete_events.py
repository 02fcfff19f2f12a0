"""Drives a `GenerationCore` through virtual time: scripted truth, scripted drafts, latencies from functions.

No processes and no sleeping, so a generation takes microseconds; the decisions are the very ones of the real
orchestrator, since the core is the same class. Messages take no time here, cancels take effect at once, and a server
reads any number of tokens in one forward: this is the ideal that a real run is compared with.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsi_actors.core.actions import Action, CancelDrafts, CancelVerify, EmitTokens, Finish, StartDraft, StartVerify
from dsi_actors.core.events import (
    DraftEnded,
    DrafterJoined,
    DraftsArrived,
    Event,
    ServerJoined,
    VerificationAbandoned,
    VerificationFinished,
)
from dsi_actors.core.generation import GenerationCore

#: The next token after a prefix.
NextToken = Callable[[Sequence[int]], int]


def target_answer(target: NextToken, tokens: Sequence[int], start: int) -> tuple[int, ...]:
    """What a target server answers when asked to verify `tokens` from position `start` on (Verified in SPEC.md)."""
    answer: list[int] = []
    for position in range(start, len(tokens) + 1):
        answer.append(target(tokens[:position]))
        if position < len(tokens) and answer[-1] != tokens[position]:
            break
    return tuple(answer)


@dataclass(slots=True)
class _Drafting:
    """What the simulated drafter does: its own list of tokens, and the requests in order."""

    tokens: list[int] = field(default_factory=list)
    queue: list[StartDraft] = field(default_factory=list)
    #: Tokens before this position were reported.
    reported: int = 0
    #: Counts the tokens begun: one that was dropped finds another number here when its time comes.
    ticket: int = 0


class DiscreteEventDriver:
    """Runs one generation to its end. Times are in milliseconds of virtual time."""

    def __init__(
        self,
        core: GenerationCore,
        *,
        target: NextToken,
        drafter: NextToken | None,
        target_ms: Callable[[], float],
        drafter_ms: Callable[[], float],
        servers: int,
        check: bool = False,
    ) -> None:
        self.core = core
        self.now_ms = 0.0
        #: (time, position one past the last token committed then), one entry for each commit.
        self.commits: list[tuple[float, int]] = []
        self.target_busy_ms = 0.0
        self._target, self._drafter = target, drafter
        self._target_ms, self._drafter_ms = target_ms, drafter_ms
        self._check = check
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._held: dict[int, list[int]] = {server: [] for server in range(servers)}
        self._running: dict[int, tuple[int, float]] = {}  # server -> (attempt, since)
        self._drafting = _Drafting()

    def run(self) -> None:
        for server in self._held:
            self._feed(ServerJoined(server))
        if self._drafter is not None:
            self._feed(DrafterJoined())
        while self._agenda and not self.core.finished:
            self.now_ms, _, happen = heapq.heappop(self._agenda)
            happen()
        assert self.core.finished, "nothing is left to happen and the generation is not finished"

    def _feed(self, event: Event) -> None:
        actions = self.core.handle(event)
        if self._check:
            self.core.check()
        for action in actions:
            self._do(action)

    def _at(self, delay_ms: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now_ms + delay_ms, next(self._order), happen))

    def _do(self, action: Action) -> None:
        match action:
            case StartVerify(attempt, server, base, tokens, start):
                held = self._held[server]
                assert base <= len(held)
                held[base:] = tokens
                answer = target_answer(self._target, tuple(held), start)
                self._running[server] = (attempt, self.now_ms)
                self._at(self._target_ms(), lambda: self._verified(attempt, server, start, answer))
            case CancelVerify(attempt, server):
                self._at(0.0, lambda: self._abandon(attempt, server))
            case StartDraft():
                self._drafting.queue.append(action)
                if len(self._drafting.queue) == 1:
                    self._begin_draft()
            case CancelDrafts(attempt):
                alive = [request for request in self._drafting.queue if request.attempt > attempt]
                if alive != self._drafting.queue:
                    self._drafting.queue = alive
                    self._drafting.ticket += 1  # the token in progress is dropped
                    if alive:
                        self._begin_draft()
            case EmitTokens(start, tokens, _):
                self.commits.append((self.now_ms, start + len(tokens)))
            case Finish():
                pass

    def _verified(self, attempt: int, server: int, start: int, answer: tuple[int, ...]) -> None:
        if self._running.get(server, (0, 0.0))[0] == attempt:
            self._stop(server)
            self._feed(VerificationFinished(attempt, server, start, answer))

    def _abandon(self, attempt: int, server: int) -> None:
        if self._running.get(server, (0, 0.0))[0] == attempt:
            self._stop(server)
            self._feed(VerificationAbandoned(attempt, server))

    def _stop(self, server: int) -> None:
        self.target_busy_ms += self.now_ms - self._running.pop(server)[1]

    def _begin_draft(self) -> None:
        drafting = self._drafting
        request = drafting.queue[0]
        if request.start <= request.base + len(request.tokens):
            drafting.tokens[request.base :] = request.tokens
        assert len(drafting.tokens) == request.start
        drafting.reported = request.start
        self._next_draft(request)

    def _next_draft(self, request: StartDraft) -> None:
        self._drafting.ticket += 1
        ticket = self._drafting.ticket
        self._at(self._drafter_ms(), lambda: self._drafted(request, ticket))

    def _drafted(self, request: StartDraft, ticket: int) -> None:
        drafting = self._drafting
        if ticket != drafting.ticket:
            return
        assert self._drafter is not None
        drafting.tokens.append(self._drafter(drafting.tokens))
        end = request.start + request.count
        done = len(drafting.tokens) == end
        first, block = drafting.reported, tuple(drafting.tokens[drafting.reported :])
        report = done or len(block) == request.block
        if report:
            drafting.reported = len(drafting.tokens)
        if done:
            drafting.queue.pop(0)
            if drafting.queue:
                self._begin_draft()
        else:
            self._next_draft(request)
        if report:
            self._feed(DraftsArrived(request.attempt, first, block))
        if done:
            self._feed(DraftEnded(request.attempt, complete=True))

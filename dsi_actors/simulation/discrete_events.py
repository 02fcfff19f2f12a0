"""Drives a `GenerationCore` through virtual time: scripted truth, scripted drafts, latencies from functions.

No processes and no sleeping, so a generation takes microseconds; the decisions are the very ones of the real
orchestrator, since the core is the same class. Messages take no time here and a server reads any number of tokens in one
verification: this is the ideal that a real run is compared with.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsi_actors.core.actions import (
    Action,
    CancelDrafts,
    CancelVerify,
    EmitTokens,
    Finish,
    Judged,
    StartDraft,
    StartVerify,
    VerifyGoesOn,
)
from dsi_actors.core.events import (
    DraftEnded,
    DrafterJoined,
    DraftsArrived,
    Event,
    PolicyChanged,
    ServerJoined,
    VerificationAbandoned,
    VerificationFinished,
)
from dsi_actors.core.generation import GenerationCore
from dsi_actors.core.tree import main_path_end
from dsi_actors.planning.controller import Controller
from dsi_actors.simulation.drafter import Guesses, SimulatedDrafter
from dsi_actors.simulation.scripts import LatencyMs, Script, walk


@dataclass(slots=True)
class _Drafting:
    """What a simulated drafter is asked, in order, and how far it is."""

    number: int
    drafter: SimulatedDrafter
    latency_ms: LatencyMs
    queue: list[StartDraft] = field(default_factory=list)
    #: Tokens of the main path before this position were reported.
    reported: int = 0
    #: What the steps after them took.
    block_ms: float = 0.0
    #: Tokens before this position are committed, as far as the drafter heard.
    committed: int = 0
    #: Counts the steps begun: one that was dropped finds another number here when its time comes.
    ticket: int = 0
    #: Whether a step is under way.
    steps: bool = False


@dataclass(slots=True)
class _Verifying:
    """What a simulated server does."""

    attempt: int
    since_ms: float
    took_ms: float
    #: Of the text, and on branches.
    positions: int
    branches: int


class DiscreteEventDriver:
    """Runs one generation to its end. Times are in milliseconds of virtual time."""

    def __init__(
        self,
        core: GenerationCore,
        script: Script,
        *,
        target_ms: LatencyMs,
        drafter_ms: LatencyMs | None,
        servers: int,
        others: Sequence[tuple[Guesses, LatencyMs]] = (),
        controller: Controller | None = None,
        cancel_ms: float = 0.0,
        check: bool = False,
    ) -> None:
        """`drafter_ms` None: there is no drafter. `others`: drafters that draft beside it, behind it in rank: what each says, and
        how long a token takes. A cancelled verification ends with the multiple of `cancel_ms` (a
        layer, say) that it is in; 0: at once. A `controller` hears of all latencies and may change the policy."""
        self.core = core
        self.now_ms = 0.0
        #: (time, position one past the last token committed then), one entry for each commit.
        self.commits: list[tuple[float, int]] = []
        self.target_busy_ms = 0.0
        self.drafter_busy_ms = 0.0
        self._script = script
        self._target_ms = target_ms
        self._controller = controller
        self._cancel_ms = cancel_ms
        self._check = check
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._held: dict[int, list[int]] = {server: [] for server in range(servers)}
        #: How far each server has read its list.
        self._read = [0] * servers
        self._running: dict[int, _Verifying] = {}
        drafters = [] if drafter_ms is None else [(script, drafter_ms), *others]
        self._drafting = [
            _Drafting(number, SimulatedDrafter(guesses), latency_ms)
            for number, (guesses, latency_ms) in enumerate(drafters)
        ]

    def run(self) -> None:
        for drafting in self._drafting:
            self._feed(DrafterJoined(drafting.number, rank=drafting.number))
        for server in self._held:
            self._feed(ServerJoined(server))
        while self._agenda and not self.core.finished:
            self.now_ms, _, happen = heapq.heappop(self._agenda)
            happen()
        assert self.core.finished, "nothing is left to happen and the generation is not finished"
        for running in self._running.values():
            self.target_busy_ms += self.now_ms - running.since_ms

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
            case StartVerify(attempt, server, base, tokens, start, parents):
                held = self._held[server]
                assert base <= len(held)
                end, branches = main_path_end(base, tokens, parents)
                if parents:
                    del held[base:]
                    answer = walk(self._script.truth, held, tokens, parents, start)
                    held.extend(tokens[: end - base])
                else:
                    held[base:] = tokens
                    answer = self._script.answer(held, start)
                positions = len(held) - min(self._read[server], base, start - 1)
                self._read[server] = len(held)
                took_ms = self._target_ms(positions + branches)
                self._running[server] = _Verifying(attempt, self.now_ms, took_ms, positions, branches)
                self._at(took_ms, lambda: self._verified(attempt, server, start, answer))
            case CancelVerify(attempt, server):
                running = self._running[server]
                delay_ms = 0.0
                if self._cancel_ms:
                    delay_ms = self._cancel_ms - (self.now_ms - running.since_ms) % self._cancel_ms
                left_ms = running.since_ms + running.took_ms - self.now_ms
                self._at(min(delay_ms, left_ms), lambda: self._abandon(attempt, server))
            case StartDraft():
                self._start_draft(action)
            case CancelDrafts(attempt, number):
                drafting = self._drafting[number]
                alive = [request for request in drafting.queue if request.attempt > attempt]
                if len(alive) != len(drafting.queue):
                    drafting.queue = alive
                    drafting.ticket += 1  # the step in progress is dropped
                    drafting.steps = False
                    assert not alive
            case EmitTokens(start, tokens):
                if self._controller is not None and self.commits:
                    took_ms = self.now_ms - self.commits[-1][0]
                    self._controller.committed(len(tokens), took_ms, self.core.committed, drafts=True)
                self.commits.append((self.now_ms, start + len(tokens)))
            case Judged():
                if self._controller is not None:
                    self._controller.judged(action, self.core.committed)
            case Finish():
                pass
            case VerifyGoesOn():
                raise AssertionError("no simulated server goes on by itself: messages take no time here")

    def _verified(self, attempt: int, server: int, start: int, answer: tuple[int, ...]) -> None:
        running = self._running.get(server)
        if running is not None and running.attempt == attempt:
            self._stop(server)
            self._feed(VerificationFinished(attempt, server, start, answer))
            if self._controller is not None:
                self._controller.tuner.verified(running.positions, running.took_ms, branches=running.branches)
                if (policy := self._controller.retune()) is not None:
                    self._feed(PolicyChanged(policy))

    def _abandon(self, attempt: int, server: int) -> None:
        running = self._running.get(server)
        if running is not None and running.attempt == attempt:
            self._stop(server)
            self._feed(VerificationAbandoned(attempt, server))

    def _stop(self, server: int) -> None:
        self.target_busy_ms += self.now_ms - self._running.pop(server).since_ms

    def _start_draft(self, request: StartDraft) -> None:
        drafting = self._drafting[request.drafter]
        drafting.committed = max(drafting.committed, request.committed)
        if request.start <= request.base + len(request.tokens):  # it ends the requests before it
            drafting.queue.clear()
            known = drafting.drafter.go_on(request.base, request.tokens, request.start + request.count)
            drafting.reported = request.start
            if not known and drafting.steps:
                drafting.ticket += 1
                drafting.steps = False
                drafting.block_ms = 0.0
            if len(drafting.drafter.tokens) > drafting.reported:
                self._at(0.0, lambda: self._report_what_is_known(drafting))
        drafting.queue.append(request)
        if not drafting.steps and len(drafting.queue) == 1:
            self._next_step(drafting)

    def _next_step(self, drafting: _Drafting) -> None:
        drafting.ticket += 1
        drafting.steps = True
        ticket, took_ms = drafting.ticket, drafting.latency_ms(1)
        self.drafter_busy_ms += took_ms
        drafting.block_ms += took_ms
        self._at(took_ms, lambda: self._stepped(drafting, ticket))

    def _stepped(self, drafting: _Drafting, ticket: int) -> None:
        if ticket != drafting.ticket:
            return
        drafting.steps = False
        if not drafting.queue:
            return
        request, drafter = drafting.queue[0], drafting.drafter
        if len(drafter.tokens) < request.start + request.count:
            drafter.step(request.rows, drafting.committed)
        done = len(drafter.tokens) >= request.start + request.count
        if done:
            drafting.queue.pop(0)
        if drafting.queue:
            self._next_step(drafting)
        if done or len(drafter.tokens) - drafting.reported >= request.block:
            self._report(drafting, request)
        if done:
            self._feed(DraftEnded(request.attempt, complete=True, drafter=drafting.number))

    def _report_what_is_known(self, drafting: _Drafting) -> None:
        if drafting.queue:
            self._report(drafting, drafting.queue[0])

    def _report(self, drafting: _Drafting, request: StartDraft) -> None:
        first, tokens, parents = drafting.drafter.report()
        if not tokens:
            return
        made = len(drafting.drafter.tokens) - drafting.reported
        drafting.reported = len(drafting.drafter.tokens)
        if self._controller is not None and drafting.block_ms and drafting is self._drafting[0]:
            self._controller.tuner.drafted(made, drafting.block_ms)
        drafting.block_ms = 0.0
        self._feed(DraftsArrived(request.attempt, first, tokens, parents, drafting.number))

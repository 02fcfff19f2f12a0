"""The state machine of one generation: which tokens are settled, which are guessed, who checks what.

Theory of operation
===================

A generation is one growing list of tokens::

    tokens:   [ prompt | committed | drafted )
                       ^           ^         ^
                 prompt_length  committed   len(tokens)

*Committed* tokens are the target's own and never change. *Drafted* tokens are guesses of the drafter. Target servers
are asked, several at a time, to *verify*: to read everything not yet committed (or as much of it as the policy's span
allows) and to answer with the target's own tokens from there on, up to and including the first that differs from the
guess, or one beyond the last guess.

Lossless argument. A verification answers with the target's continuation of the prefix before its `start`. When it
was started, `start` was the committed length, so that prefix was committed, and committed tokens never change. Hence
every token of every answer is what the target itself says at that position after the committed prefix, whichever
answer comes first, however late, whatever was guessed. By induction the committed list is the target's own output;
drafts, cancels and lost messages decide only when it grows. Nothing here depends on a cancel being obeyed: an answer
that is no longer wanted is dropped because its attempt id is dead.

A rejection. The first committed token that differs from the drafted one at its place makes everything after it
worthless: the drafts are dropped, every live verification (each read that draft, or ends before it) and every live
draft attempt is cancelled, and both drafter and the server that just answered start again behind the correction.

Never slower than plain decoding. After each commit the server that answered is free and holds the prefix, and if no
other live verification reaches beyond what is committed it starts at once on everything not yet committed. So there is
always a verification running that yields the next token, and it started no later than a plain decoder's forward would.
(For policies with first_wait = 0. AR and SI are settings of the same machine: see policy.py.)

Rules of this file
==================

* `handle(event) -> list[Action]` is the only mutator. No clock, no I/O, no randomness: the same events give the same
  actions. The asyncio orchestrator and the discrete-event simulator drive this same class.
* Every piece of work has a fresh attempt id. Attempts are never revived. An event of a dead attempt is normal: it is
  counted and dropped, except that a server that answers is idle again.
* The driver tells the end of each verification exactly once (finished, abandoned, or its server lost); events may come
  late and in any order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dsi_actors.core.actions import (
    Action,
    CancelDrafts,
    CancelVerify,
    EmitTokens,
    Finish,
    StartDraft,
    StartVerify,
)
from dsi_actors.core.events import (
    CancelRequested,
    DraftEnded,
    DrafterJoined,
    DrafterLost,
    DraftsArrived,
    DraftsLate,
    Event,
    PolicyChanged,
    ServerJoined,
    ServerLost,
    VerificationAbandoned,
    VerificationFinished,
)
from dsi_actors.core.policy import Policy

#: What starts work goes first, since telling takes time; each list keeps its order among equals.
_URGENCY = {StartVerify: 0, CancelDrafts: 1, StartDraft: 2, CancelVerify: 3, EmitTokens: 4, Finish: 5}


def _urgency(action: Action) -> int:
    return _URGENCY[type(action)]


@dataclass(slots=True)
class _Server:
    #: The server holds tokens[:held] of the current list (it may hold more, of lists that are dead).
    held: int = 0
    #: What it was last asked and has not answered; live if and only if the attempt is in `_verifications`.
    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class _Verification:
    """Checks tokens [start, end) and so can yield the target's tokens at [start, end]."""

    server: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Draft:
    """Asked to guess [start, end)."""

    start: int
    end: int


@dataclass(slots=True)
class Counters:
    """What happened so far. All count from the start of the generation."""

    drafted: int = 0  #: tokens that arrived from a live draft attempt
    judged: int = 0  #: drafted tokens that were compared with the target's own
    accepted: int = 0  #: of those, equal
    rejections: int = 0  #: corrections that dropped work
    verifications: int = 0  #: verifications started
    useful_verifications: int = 0  #: verifications that committed at least one token
    stale_events: int = 0  #: replies of dead attempts
    disagreements: int = 0  #: answers that contradict committed tokens or answer what was not asked: dropped


class GenerationCore:
    """One generation. `handle` events, do the actions; see the head of this file."""

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        policy: Policy,
        max_tokens: int,
        stop_tokens: Collection[int] = (),
        resumed: Sequence[int] = (),
    ) -> None:
        """`resumed`: what an earlier run committed after the prompt. It counts among `max_tokens`; the rest follows."""
        if not prompt:
            raise ValueError("the prompt must have at least one token")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        self.policy = policy
        self.prompt_length = len(prompt)
        #: One past the last position that may be committed.
        self.end = len(prompt) + max_tokens
        self.stop_tokens = frozenset(stop_tokens)
        self.tokens = [*prompt, *resumed]
        #: tokens[:committed] never changes.
        self.committed = len(self.tokens)
        self.finish_reason: str | None = None
        if self.committed >= self.end:
            self.finish_reason = "length"
        if resumed and resumed[-1] in self.stop_tokens:
            self.finish_reason = "stop"
        self.counters = Counters()
        self._next_attempt = 1
        self._servers: dict[int, _Server] = {}
        #: Live verifications by attempt. Ends rise strictly with the attempt; each end >= committed.
        self._verifications: dict[int, _Verification] = {}
        self._drafter_present = False
        #: The drafter's own list starts with tokens[:_drafter_held]; its next draft is for that position.
        self._drafter_held = 0
        #: Live draft attempts: contiguous, in order; the first one's next token is for position _drafter_held.
        self._drafts: dict[int, _Draft] = {}
        #: The drafter had nothing to offer here. Ask again after the next commit.
        self._drafter_exhausted = False
        #: Nothing waits for drafts until some come.
        self._drafts_late = False
        #: The server that answered last: it holds the prefix and its KV cache is warm.
        self._warm_server: int | None = None
        self._actions: list[Action] = []

    @property
    def output(self) -> list[int]:
        """The committed tokens after the prompt."""
        return self.tokens[self.prompt_length : self.committed]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def waits_for_drafts(self) -> bool:
        """Whether a server is idle and nothing is verified because drafts are to come first."""
        return not (self.finished or self._verifications or self._drafts_late) and (
            self._draft_front() > len(self.tokens) and self._idle_server() is not None
        )

    def handle(self, event: Event) -> list[Action]:
        """Take in what happened; return what to do now, in this order."""
        match event:
            case VerificationFinished(attempt, server, start, tokens):
                self._on_verification_finished(attempt, server, start, tokens)
            case DraftsArrived(attempt, start, tokens):
                self._on_drafts_arrived(attempt, start, tokens)
            case DraftEnded(attempt, complete, held):
                self._on_draft_ended(attempt, complete, held)
            case VerificationAbandoned(attempt, server, held):
                self._on_verification_abandoned(attempt, server, held)
            case DraftsLate():
                self._drafts_late = True
            case ServerJoined(server):
                assert server not in self._servers, f"server {server} joined twice"
                self._servers[server] = _Server()
            case ServerLost(server):
                if server == self._warm_server:
                    self._warm_server = None
                lost = self._servers.pop(server, None)
                if lost is not None and lost.attempt is not None:
                    self._verifications.pop(lost.attempt, None)
            case DrafterJoined():
                self._drafter_present, self._drafter_held, self._drafter_exhausted = True, 0, False
                self._drafts_late = False
                self._drafts.clear()
            case DrafterLost():
                self._drafter_present = False
                self._drafts.clear()
            case PolicyChanged(policy):
                assert policy.sp >= self.policy.sp, "what runs must stay allowed"
                self.policy = policy
                if not policy.max_ahead:
                    self._cancel_drafts()  # nobody waits for them any more
            case CancelRequested():
                if not self.finished:
                    self._finish("cancelled")
                    self._actions.append(Finish("cancelled"))
        if not self.finished:
            self._plan_drafts()
            self._plan_verifications()
        actions, self._actions = self._actions, []
        if len(actions) > 1:
            actions.sort(key=_urgency)
        return actions

    # What happened to a verification

    def _on_verification_finished(self, attempt: int, server: int, start: int, tokens: tuple[int, ...]) -> None:
        verification = self._end_verification(attempt, server)
        if verification is None:
            return
        overlap = self.committed - verification.start
        if (
            start != verification.start
            or not overlap < len(tokens) <= verification.end - verification.start + 1
            or list(tokens[:overlap]) != self.tokens[start : self.committed]
        ):
            self.counters.disagreements += 1
            if server in self._servers:
                self._servers[server].held = 0  # prefer another one, and tell this one everything again
            return
        self._warm_server = server
        self.counters.useful_verifications += 1
        self._commit(tokens[overlap:])

    def _on_verification_abandoned(self, attempt: int, server: int, held: int | None) -> None:
        self._end_verification(attempt, server)
        if held is not None and server in self._servers:
            self._servers[server].held = min(self._servers[server].held, held)

    def _end_verification(self, attempt: int, server: int) -> _Verification | None:
        """The server is idle again. Returns the verification if its attempt was still live."""
        state = self._servers.get(server)
        if state is not None and state.attempt == attempt:
            state.attempt = None
        verification = self._verifications.pop(attempt, None)
        if verification is None:
            self.counters.stale_events += 1
        return verification

    def _commit(self, target_tokens: Sequence[int]) -> None:
        """Settle the target's own tokens at [committed, committed + len(target_tokens)), or fewer at a stop or the end."""
        start = self.committed
        accepted: list[bool] = []
        reason: str | None = None
        for token in target_tokens:
            drafted = self.tokens[self.committed] if self.committed < len(self.tokens) else None
            accepted.append(drafted == token)
            if drafted is not None:
                self._judge(drafted == token)
            if drafted != token:
                self._replace_from(self.committed, token)
            self.committed += 1
            if token in self.stop_tokens:
                reason = "stop"
            elif self.committed == self.end:
                reason = "length"
            if reason or drafted != token:
                break  # nothing that follows a correction comes from the committed prefix
        self._drafter_exhausted = False
        if reason is None:
            self._cancel_outrun_work()
        else:
            self._finish(reason)
        self._actions.append(EmitTokens(start, tuple(self.tokens[start : self.committed]), tuple(accepted)))
        if reason is not None:
            self._actions.append(Finish(reason))

    def _replace_from(self, position: int, token: int) -> None:
        """tokens[position] is `token`. If something else had been drafted there, all that was built on it is dead."""
        if position < len(self.tokens):
            self.counters.rejections += 1
            self._drop_everything_from(position)
        self.tokens.append(token)

    def _drop_everything_from(self, position: int) -> None:
        del self.tokens[position:]
        for server in self._servers.values():
            server.held = min(server.held, position)
        self._drafter_held = min(self._drafter_held, position)
        self._cancel_verifications(self._verifications)
        self._cancel_drafts()

    def _cancel_outrun_work(self) -> None:
        """Work that can yield nothing beyond the committed tokens is not wanted any more."""
        self._cancel_verifications([a for a, v in self._verifications.items() if v.end < self.committed])
        if self._drafts and self._draft_front() <= self.committed:
            self._cancel_drafts()  # the drafter fell behind altogether: let it skip ahead

    def _judge(self, accepted: bool) -> None:
        self.counters.judged += 1
        self.counters.accepted += accepted

    # What the drafter said

    def _on_drafts_arrived(self, attempt: int, start: int, tokens: tuple[int, ...]) -> None:
        draft = self._drafts.get(attempt)
        if draft is None:
            self.counters.stale_events += 1
            return
        if start != self._drafter_held or start + len(tokens) > draft.end:
            # A gap or an overrun: what came in between was lost, so what follows stands on nothing we know. Go on
            # without drafts until the next commit, or a drafter that always errs would keep us waiting.
            self._drafter_exhausted = True
            self._cancel_drafts()
            return
        self._drafts_late = False
        self.counters.drafted += len(tokens)
        for position, token in enumerate(tokens, start):
            if position < self.committed:  # the target was faster: compare late
                self._judge(token == self.tokens[position])
                if token != self.tokens[position]:
                    self._cancel_drafts()
                    return
            else:
                self.tokens.append(token)
            self._drafter_held = position + 1

    def _on_draft_ended(self, attempt: int, complete: bool, held: int | None) -> None:
        draft = self._drafts.pop(attempt, None)
        if draft is None:
            self.counters.stale_events += 1
        elif held is not None:
            self._drafter_held = min(self._drafter_held, held)  # it lost its prefix: send that again
            self._cancel_drafts()
        elif not complete or self._drafter_held < draft.end:
            self._drafter_exhausted = True
            self._cancel_drafts()
        else:  # and so are those before it, though their ends are still to come
            for earlier in [number for number in self._drafts if number < attempt]:
                del self._drafts[earlier]

    # What to do next

    def _plan_drafts(self) -> None:
        """Keep the drafter busy, `max_ahead` beyond the committed tokens and never past the last useful position."""
        if not self._drafter_present or self._drafter_exhausted:
            return
        limit = min(self.committed + self.policy.max_ahead, self.end - 1)
        front = self._draft_front()
        if front >= limit:
            return
        policy = self.policy
        if self._drafts:
            # Extend a running plan well before it runs out, but not by one token at each commit; and not while the
            # drafter is behind, where more of the same plan is of no use.
            remaining = front - self._drafter_held
            if self._drafter_held < self.committed or remaining > max(policy.lookahead, policy.max_ahead // 2):
                return
            tokens: tuple[int, ...] = ()
        else:
            tokens = tuple(self.tokens[self._drafter_held :])
        base = self._drafter_held
        self._drafter_held += len(tokens)
        wait = self.committed + policy.first_wait
        if front < wait < limit and policy.first_wait != policy.lookahead:
            # What the first verification waits for comes in one block, and no later than it is complete.
            self._start_draft(base, tokens, front, wait, wait - front)
            base, tokens, front = self._drafter_held, (), wait
        self._start_draft(base, tokens, front, limit, policy.lookahead)

    def _start_draft(self, base: int, tokens: tuple[int, ...], start: int, end: int, block: int) -> None:
        attempt = self._take_attempt()
        self._drafts[attempt] = _Draft(start, end)
        self._actions.append(StartDraft(attempt, base, tokens, start, end - start, block))

    def _draft_front(self) -> int:
        """One past the last position that the drafter has been asked for."""
        return next(reversed(self._drafts.values())).end if self._drafts else len(self.tokens)

    def _plan_verifications(self) -> None:
        while len(self._verifications) < self.policy.sp and self._worth_verifying():
            server = self._idle_server()
            if server is None:
                return
            state = self._servers[server]
            attempt = self._take_attempt()
            end = min(len(self.tokens), self._verified_front() + self.policy.span)
            base = min(state.held, end)
            self._verifications[attempt] = _Verification(server, self.committed, end)
            state.attempt, state.held = attempt, end
            self.counters.verifications += 1
            self._actions.append(StartVerify(attempt, server, base, tuple(self.tokens[base:end]), self.committed))

    def _worth_verifying(self) -> bool:
        drafts_coming = self._draft_front() > len(self.tokens)
        if not self._verifications:
            enough = len(self.tokens) - self.committed >= self.policy.first_wait
            return enough or not drafts_coming or self._drafts_late or self._has_much_to_read()
        wanted = self.policy.lookahead if drafts_coming else 1
        return self.policy.span > 0 and len(self.tokens) - self._verified_front() >= wanted

    def _has_much_to_read(self) -> bool:
        """Whether the server would read more before the drafts than there may be drafts. Then they come while it reads: DSI
        begins at once, and so does its first token."""
        server = self._idle_server()
        unread = 0 if server is None else self.committed - self._servers[server].held
        return self.policy.algorithm == "dsi" and unread > self.policy.max_ahead

    def _verified_front(self) -> int:
        """One past the last drafted token that is being verified."""
        return next(reversed(self._verifications.values())).end if self._verifications else self.committed

    def _idle_server(self) -> int | None:
        """The idle server with the least to read: the one that answered last, else the one that holds most."""
        idle = [number for number, server in self._servers.items() if server.attempt is None]
        if self._warm_server in idle:
            return self._warm_server
        return max(idle, key=lambda number: self._servers[number].held, default=None)

    # Ending work

    def _cancel_verifications(self, attempts: Collection[int]) -> None:
        for attempt in list(attempts):
            self._actions.append(CancelVerify(attempt, self._verifications.pop(attempt).server))

    def _cancel_drafts(self) -> None:
        if self._drafts:
            self._actions.append(CancelDrafts(max(self._drafts)))
            self._drafts.clear()

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._drop_everything_from(self.committed)

    def _take_attempt(self) -> int:
        attempt = self._next_attempt
        self._next_attempt += 1
        return attempt

    # Under test and when idle

    def check(self) -> None:
        """Assert the invariants: called after every event under test."""
        assert self.prompt_length <= self.committed <= len(self.tokens)
        assert self.committed <= self.end
        assert len(self._verifications) <= self.policy.sp
        ends = [v.end for v in self._verifications.values()]
        assert ends == sorted(set(ends)), "a later verification covers more"
        for attempt, verification in self._verifications.items():
            assert self._servers[verification.server].attempt == attempt, "a live verification has its server"
            assert verification.start <= self.committed <= verification.end <= len(self.tokens)
        for server in self._servers.values():
            assert 0 <= server.held <= len(self.tokens)
        assert self._drafter_held <= max(len(self.tokens), self._draft_front())
        expected = None
        for draft in self._drafts.values():
            assert expected is None or draft.start == expected, "live draft attempts are contiguous"
            assert draft.start < draft.end <= self.end - 1
            expected = draft.end
        if self.finished:
            assert not self._verifications, "a finished generation holds nothing"
            assert not self._drafts, "a finished generation holds nothing"
            assert len(self.tokens) == self.committed

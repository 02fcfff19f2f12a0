"""The state machine of one generation: which tokens are settled, which are guessed, who checks what.

Theory of operation
===================

A generation is one growing list of tokens, and a tree of guesses behind it::

    tokens:   [ prompt | committed | drafted: the main path )    and beside the main path its alternatives (tree.py)
                       ^           ^                        ^
                 prompt_length  committed              len(tokens)

*Committed* tokens are the target's own and never change. *Drafted* tokens are guesses of the drafter: the main path, and
branches that leave it where the drafter was unsure. Target servers are asked, several at a time, to *verify*: to read
everything not yet committed (or as much of it as the policy allows) and to answer with the target's own tokens from there
on, along the tree: up to and including the first that no branch has, or one beyond the end of a branch.

Lossless argument. A verification answers with the target's continuation of the prefix before its `start`. When it
was started, `start` was the committed length, so that prefix was committed, and committed tokens never change. Hence
every token of every answer is what the target itself says at that position after the committed prefix, whichever
answer comes first, however late, whatever was guessed. By induction the committed list is the target's own output;
drafts, cancels and lost messages decide only when it grows. Nothing here depends on a cancel being obeyed: an answer
that is no longer wanted is dropped because its attempt id is dead.

A rejection. The first committed token that differs from the main path's at its place makes the rest of the main path
worthless. If an *alternative* has this token, that branch becomes the main path: live verifications whose tree holds it go
on, and the drafter goes on from its end. If none has it, the token is a *correction*: all drafts are dropped, every live
verification and every live draft attempt is cancelled, and both drafter and the server that just answered start again
behind it.

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
    Judged,
    StartDraft,
    StartVerify,
)
from dsi_actors.core.drafter_view import DrafterView
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
from dsi_actors.core.policy import Policy, worth_verifying
from dsi_actors.core.tree import DraftTree, Node, Step

#: What starts work goes first, since telling takes time; each list keeps its order among equals.
_URGENCY = {StartVerify: 0, CancelDrafts: 1, StartDraft: 2, CancelVerify: 3, EmitTokens: 4, Judged: 5, Finish: 6}
_NOTHING_JUDGED = Judged()


def _urgency(action: Action) -> int:
    return _URGENCY[type(action)]


@dataclass(slots=True)
class _Server:
    #: The most tokens of one request that is a tree.
    rows: int
    #: The server holds tokens[:held] of the current list (it may hold more, of lists that are dead).
    held: int = 0
    #: What it was last asked and has not answered; live if and only if the attempt is in `_verifications`.
    attempt: int | None = None


@dataclass(slots=True)
class _Verification:
    """Checks main-path tokens [start, end) and some branches, and so can yield the target's tokens at [start, end]."""

    server: int
    start: int
    end: int
    #: The committed token before `start`, and every draft that is checked.
    nodes: set[Node]
    #: One past the last position of these.
    deepest: int


@dataclass(frozen=True, slots=True)
class _Draft:
    """Asked to extend the main path to [start, end)."""

    start: int
    end: int


@dataclass(slots=True)
class Counters:
    """What happened so far. All count from the start of the generation."""

    drafted: int = 0  #: tokens that arrived from a live draft attempt, branches included
    judged: int = 0  #: main-path tokens that were compared with the target's own
    accepted: int = 0  #: of those, equal
    offered: int = 0  #: of those that differed, those with an alternative beside them
    alternatives: int = 0  #: of those, the target's token was an alternative
    rejections: int = 0  #: corrections that dropped work: no draft had the target's token
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
        self._tree = DraftTree(self.tokens[-1], self.committed - 1)
        #: Live verifications by attempt. Ends rise strictly with the attempt; each holds the tree's root.
        self._verifications: dict[int, _Verification] = {}
        self._drafter_present = False
        #: The drafter's own main path starts with tokens[:_drafter_held]; it goes on from there.
        self._drafter_held = 0
        self._drafter = DrafterView(self._tree, self._judge_late)
        #: What was committed when the drafter last heard of it.
        self._drafter_heard = 0
        #: Live draft attempts: contiguous, in order; the first one extends the main path at _drafter_held.
        self._drafts: dict[int, _Draft] = {}
        #: The drafter had nothing to offer here. Ask again after the next commit.
        self._drafter_exhausted = False
        #: Nothing waits for drafts until some come.
        self._drafts_late = False
        #: The server that answered last: it holds the prefix and its KV cache is warm.
        self._warm_server: int | None = None
        self._actions: list[Action] = []
        #: Of the event in hand.
        self._judged = _NOTHING_JUDGED

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
            case DraftsArrived(attempt, start, tokens, parents):
                self._on_drafts_arrived(attempt, start, tokens, parents)
            case DraftEnded(attempt, complete, held):
                self._on_draft_ended(attempt, complete, held)
            case VerificationAbandoned(attempt, server, held):
                self._on_verification_abandoned(attempt, server, held)
            case DraftsLate():
                self._drafts_late = True
            case ServerJoined(server, rows):
                assert server not in self._servers, f"server {server} joined twice"
                self._servers[server] = _Server(rows)
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
        if self._judged is not _NOTHING_JUDGED:
            self._actions.append(self._judged)
            self._judged = _NOTHING_JUDGED
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
            or not overlap < len(tokens) <= verification.deepest - verification.start + 1
            or list(tokens[:overlap]) != self.tokens[start : self.committed]
        ):
            self.counters.disagreements += 1
            if server in self._servers:
                self._servers[server].held = 0  # prefer another one, and tell this one everything again
            return
        self._warm_server = server
        self.counters.useful_verifications += 1
        self._judged = Judged(attempt)
        self._commit(tokens[overlap:], verification.nodes)

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

    def _commit(self, target_tokens: Sequence[int], verified: set[Node]) -> None:
        """Settle the target's own tokens at [committed, committed + len(target_tokens)), or fewer at a stop or the end. What
        follows a token that is not among the `verified` ones does not come from the committed prefix."""
        start = self.committed
        accepted: list[bool] = []
        alternatives: list[int] = []
        reason: str | None = None
        for token in target_tokens:
            offered = len(self._tree.root.children) > 1
            step = self._tree.advance(token)
            accepted.append(step in (Step.ACCEPTED, Step.ALTERNATIVE))
            if step is Step.ALTERNATIVE:
                alternatives.append(self.committed)
            if step is not Step.UNDRAFTED:
                self._judge(step, offered=offered)
            if step is not Step.ACCEPTED:
                self._replace_main_path(self.committed, step)
            self.committed += 1
            if token in self.stop_tokens:
                reason = "stop"
            elif self.committed == self.end:
                reason = "length"
            if reason or self._tree.root not in verified:
                break
        self._drafter_exhausted = False
        if reason is None:
            self._cancel_outrun_work()
        else:
            self._finish(reason)
        committed = tuple(self.tokens[start : self.committed])
        self._actions.append(EmitTokens(start, committed, tuple(accepted), tuple(alternatives)))
        if reason is not None:
            self._actions.append(Finish(reason))

    def _replace_main_path(self, position: int, step: Step) -> None:
        """The root moved to `position` on another way than the main path: that is another one now."""
        self.counters.rejections += step is Step.CORRECTED
        del self.tokens[position:]
        for server in self._servers.values():
            server.held = min(server.held, position)
        self._drafter_held = min(self._drafter_held, position)
        self.tokens += (node.token for node in (self._tree.root, *self._tree.main))
        if step is Step.CORRECTED:
            self._cancel_drafts()

    def _cancel_outrun_work(self) -> None:
        """Work that can yield nothing beyond the committed tokens, or no more than earlier work, is not wanted any more."""
        front, root, outrun = -1, self._tree.root, []
        for attempt, verification in self._verifications.items():
            if root in verification.nodes:
                verification.end = self._tree.reach(verification.nodes)
                if verification.end > front:
                    front = verification.end
                    continue
            outrun.append(attempt)
        self._cancel_verifications(outrun)
        if self._drafts and self._draft_front() <= self.committed:
            self._cancel_drafts()  # the drafter fell behind altogether: let it skip ahead

    def _judge(self, step: Step, *, offered: bool) -> None:
        """What the drafter thought most probable was compared with the target's own. `offered`: it had an alternative, too."""
        now, counters = self._judged, self.counters
        accepted, wrong, hit = step is Step.ACCEPTED, step is not Step.ACCEPTED and offered, step is Step.ALTERNATIVE
        self._judged = Judged(
            now.attempt, now.judged + 1, now.accepted + accepted, now.offered + wrong, now.alternatives + hit
        )
        counters.judged += 1
        counters.accepted += accepted
        counters.offered += wrong
        counters.alternatives += hit

    def _judge_late(self, right: bool) -> None:
        self._judge(Step.ACCEPTED if right else Step.CORRECTED, offered=False)

    # What the drafter said

    def _on_drafts_arrived(self, attempt: int, start: int, tokens: Sequence[int], parents: Sequence[int]) -> None:
        draft = self._drafts.get(attempt)
        if draft is None:
            self.counters.stale_events += 1
            return
        placed = self._drafter.add(start, tokens, parents, draft.end)
        self.tokens += (node.token for node in self._tree.main[len(self.tokens) - self.committed :])
        if not placed:
            # A gap or an overrun: what came in between was lost, so what follows stands on nothing we know. Go on
            # without drafts until the next commit, or a drafter that always errs would keep us waiting.
            self._drafter_exhausted = True
            self._cancel_drafts()
            return
        self._drafts_late = False
        self.counters.drafted += len(tokens)
        if not self._drafter.astray:
            self._drafter_held = self._drafter.end.position + 1
        elif not self._drafter.knows_the_main_path:
            self._cancel_drafts()  # it goes on behind a token that the target has contradicted since

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
        policy = self.policy
        limit = min(self.committed + policy.max_ahead, self.end - 1)
        astray = bool(self._drafts) and self._drafter.astray
        front = len(self.tokens) if astray else self._draft_front()
        if front >= limit:
            if astray:
                self._cancel_drafts()
            return
        if astray:
            self._drafts.clear()  # the next request says where it goes on, and ends those before it
        if self._drafts:
            # Extend a running plan well before it runs out, but not by one token at each commit; and not while the
            # drafter is behind, where more of the same plan is of no use.
            remaining = front - self._drafter_held
            enough = remaining > max(policy.lookahead, policy.max_ahead // 2)
            branches_are_dead = policy.rows > 1 and self.committed - self._drafter_heard >= policy.lookahead
            if self._drafter_held < self.committed or (enough and not branches_are_dead):
                return
            tokens: tuple[int, ...] = ()
        else:
            tokens = tuple(self.tokens[self._drafter_held :])
        base = self._drafter_held
        if not self._drafts:  # it is told all of the main path, and numbers what it drafts from there on
            self._drafter_held = len(self.tokens)
            self._drafter.restart()
        wait = self.committed + policy.first_wait
        if front < wait < limit and policy.first_wait != policy.lookahead:
            # What the first verification waits for comes in one block, and no later than it is complete.
            self._start_draft(base, tokens, front, wait, wait - front)
            base, tokens, front = self._drafter_held, (), wait
        self._start_draft(base, tokens, front, limit, policy.lookahead)

    def _start_draft(self, base: int, tokens: tuple[int, ...], start: int, end: int, block: int) -> None:
        attempt = self._take_attempt()
        self._drafts[attempt] = _Draft(start, end)
        self._drafter_heard = self.committed
        self._actions.append(
            StartDraft(attempt, base, tokens, start, end - start, block, self.policy.rows, self.committed)
        )

    def _draft_front(self) -> int:
        """One past the last position that the drafter has been asked for."""
        return next(reversed(self._drafts.values())).end if self._drafts else len(self.tokens)

    def _plan_verifications(self) -> None:
        while len(self._verifications) < self.policy.sp and self._worth_verifying():
            server = self._idle_server()
            if server is None:
                return
            self._start_verification(server, self._servers[server])

    def _start_verification(self, server: int, state: _Server) -> None:
        attempt, start = self._take_attempt(), self.committed
        base, end = state.held, min(len(self.tokens), self._verified_front() + self.policy.span)
        nodes = set(self._tree.main[: end - start])
        nodes.add(self._tree.root)
        # A branch may leave the main path before what the server holds: all from the root on is told again, then. A server that
        # has a long text to read gets no branches with it.
        room = min(self.policy.branches, state.rows - (end - min(base, start)))
        branches = self._tree.branches(end, room) if room > 0 else ()
        if branches:
            base = min(base, start)
            nodes.update(branches)
            tokens = (*self.tokens[base:end], *(node.token for node in branches))
            parents = self._parents_of(base, end, branches)
        else:
            base = min(base, end)
            tokens, parents = tuple(self.tokens[base:end]), ()
        deepest = max([end, *(node.position + 1 for node in branches)])
        self._verifications[attempt] = _Verification(server, start, end, nodes, deepest)
        state.attempt, state.held = attempt, end
        self.counters.verifications += 1
        self._actions.append(StartVerify(attempt, server, base, tokens, start, parents))

    def _parents_of(self, base: int, end: int, branches: Sequence[Node]) -> tuple[int, ...]:
        """For tokens [base, end) and these nodes: the place among them of the token before each, counted from 1. 0 is the token
        at base - 1."""
        places = {self._tree.root: self.committed - base}
        for node in self._tree.main[: end - self.committed]:
            places[node] = node.position + 1 - base
        parents = list(range(end - base))
        for node in branches:
            assert node.parent is not None
            parents.append(places[node.parent])
            places[node] = len(parents)
        return tuple(parents)

    def _worth_verifying(self) -> bool:
        running = bool(self._verifications)
        front = len(self.tokens)
        drafts_coming = bool(self._drafts) and self._draft_front() > front
        drafted, covered = front - self.committed, self._verified_front() - self.committed
        if worth_verifying(self.policy, drafted, covered, running=running, drafts_coming=drafts_coming):
            return True
        return not running and (self._drafts_late or self._has_much_to_read())

    def _has_much_to_read(self) -> bool:
        """Whether the server would read more before the drafts than there may be drafts. Then they come while it reads: DSI
        begins at once, and so does its first token."""
        server = self._idle_server()
        if server is None or server == self._warm_server or self.policy.algorithm != "dsi":
            return False
        return self.committed - self._servers[server].held > self.policy.max_ahead

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
        self._tree.clear()
        del self.tokens[self.committed :]
        for server in self._servers.values():
            server.held = min(server.held, self.committed)
        self._drafter_held = min(self._drafter_held, self.committed)
        self._cancel_verifications(self._verifications)
        self._cancel_drafts()

    def _take_attempt(self) -> int:
        attempt = self._next_attempt
        self._next_attempt += 1
        return attempt

    # Under test and when idle

    def check(self) -> None:
        """Assert the invariants: called after every event under test."""
        tree = self._tree
        tree.check()
        assert self.prompt_length <= self.committed <= len(self.tokens)
        assert self.committed <= self.end
        assert (tree.root.token, tree.root.position) == (self.tokens[self.committed - 1], self.committed - 1)
        assert [node.token for node in tree.main] == self.tokens[self.committed :]
        assert len(self._verifications) <= self.policy.sp
        ends = [v.end for v in self._verifications.values()]
        assert ends == sorted(set(ends)), "a later verification covers more"
        for attempt, verification in self._verifications.items():
            assert self._servers[verification.server].attempt == attempt, "a live verification has its server"
            assert verification.start <= self.committed <= verification.end <= len(self.tokens)
            assert verification.end == tree.reach(verification.nodes), "and its tree holds the root"
            assert tree.root in verification.nodes
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

"""The state machine of one generation: which tokens are settled, which are guessed, who checks what.

Theory of operation
===================

A generation is one growing list of tokens, and a tree of guesses behind it::

    tokens:   [ prompt | committed | drafted: the main path )    and beside the main path its alternatives (tree.py)
                       ^           ^                        ^
                 prompt_length  committed              len(tokens)

*Committed* tokens are the target's own and never change. *Drafted* tokens are guesses of the drafters: the main path, and
branches that leave it where a drafter was unsure, or where several drafters said different things (drafting.py). Target
servers are asked, several at a time, to *verify*: to read everything not yet committed (or as much of it as the policy
allows) and to answer with the target's own tokens from there on, along the tree: up to and including the first that no
branch has, or one beyond the end of a branch.

Lossless argument. A verification answers with the target's continuation of the prefix before its `start`. When it
was started, `start` was the committed length, so that prefix was committed, and committed tokens never change. Hence
every token of every answer is what the target itself says at that position after the committed prefix, whichever
answer comes first, however late, whatever was guessed. By induction the committed list is the target's own output;
drafts, cancels and lost messages decide only when it grows. Nothing here depends on a cancel being obeyed: an answer
that is no longer wanted is dropped because its attempt id is dead.

A rejection. The first committed token that differs from the main path's at its place makes the rest of the main path
worthless. If an *alternative* has this token, that branch becomes the main path: live verifications whose tree holds it go
on, and so does the drafter that made it. If none has it, the token is a *correction*: all drafts are dropped, every live
verification and every live draft attempt is cancelled, and the drafters and the server that just answered start again
behind it.

Never slower than plain decoding. After each commit the server that answered is free and holds the prefix, and if no
other live verification reaches beyond what is committed it starts at once on everything not yet committed. So there is
always a verification running that yields the next token, and it started no later than a plain decoder's forward would.
(For policies with first_wait = 0. AR and SI are settings of the same machine: see policy.py.)

Going on. A message to the server and back takes as long as several percent of a forward. So a request allows the server to go on
by itself where the core would ask it for the token behind its answer and bring no drafts (`_ahead`): in plain decoding, behind a
correction, and after WRONG_IN_A_ROW wrong guesses in a row, since the next guess is probably wrong, too. Such an answer comes
with `more`. Then the server is *going on*: it counts as idle, and as the one with the least to read. If the next verification to
start is the one that it has begun, that becomes live under the same attempt, and nothing is sent. If it is another one, its
StartVerify ends the going on. Otherwise it is cancelled. So after each event every server that goes on does so for a live
verification. Answers of one attempt come in order. If one is lost, the next one stands behind tokens that the core does not know.
The attempt ends then, and the next request to this server allows no going on, lest one that always skips be asked for ever.

Rules of this file
==================

* `handle(event) -> list[Action]` is the only mutator. No clock, no I/O, no randomness: the same events give the same
  actions. The asyncio orchestrator and the discrete-event simulator drive this same class.
* Every piece of work has a fresh attempt id, but for what a server does by itself. Attempts are never revived. An event of a dead
  attempt is normal: it is counted and dropped, except that a server that answers is idle again.
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
    VerifyGoesOn,
)
from dsi_actors.core.counters import Counters
from dsi_actors.core.drafting import Drafting
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
_URGENCY = {
    StartVerify: 0, CancelDrafts: 1, StartDraft: 2, CancelVerify: 3, EmitTokens: 4, Judged: 5, VerifyGoesOn: 6, Finish: 7,
}  # fmt: skip
_NOTHING_JUDGED = Judged()
#: A server may give so many further answers by itself: so long it computes at most for a reader whom it has not heard leave.
MOST_ANSWERS_AHEAD = 256
#: After so many wrong guesses in a row, servers may go on by themselves although drafts are on their way.
WRONG_IN_A_ROW = 3


def _urgency(action: Action) -> int:
    return _URGENCY[type(action)]


@dataclass(slots=True)
class _Server:
    #: The most tokens of one request that is a tree.
    rows: int
    #: The server holds tokens[:held] of the current list (it may hold more, of lists that are dead).
    held: int = 0
    #: What it was last asked and has not answered to the end; live if and only if the attempt is in `_verifications`.
    attempt: int | None = None
    #: The position of the token that it has begun with by itself, for nobody yet; 0 if that is unknown. Only within an event.
    goes_on_at: int | None = None
    #: Whether an answer of it was lost, and it has given no other since.
    lost_one: bool = False


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
    #: Whether the server may go on by itself.
    ahead: bool


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
        #: Live verifications by attempt. Each holds the tree's root, and a draft that no earlier one holds: where there is one
        #: drafter their ends rise strictly.
        self._verifications: dict[int, _Verification] = {}
        self._actions: list[Action] = []
        self._drafting = Drafting(
            self._tree, self.tokens, take_attempt=self._take_attempt, act=self._act, on_late=self._judge_late
        )
        #: Nothing waits for drafts until some come.
        self._drafts_late = False
        #: The server that answered last: it holds the prefix and its KV cache is warm.
        self._warm_server: int | None = None
        #: Of the event in hand.
        self._judged = _NOTHING_JUDGED
        #: Wrong guesses since the last position where a draft or an alternative was right.
        self._wrong_in_a_row = 0

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
            self._drafting.coming and self._idle_server() is not None
        )

    def acceptance_of(self, drafter: int) -> tuple[int, int]:
        """Of the first choices of a drafter that is there, those that were compared with the target's own tokens, and those that
        were equal."""
        return self._drafting.acceptance(drafter)

    def handle(self, event: Event) -> list[Action]:
        """Take in what happened; return what to do now, in this order."""
        match event:
            case VerificationFinished(attempt, server, start, tokens, more):
                self._on_verification_finished(attempt, server, start, tokens, more)
            case DraftsArrived(attempt, start, tokens, parents, drafter):
                if self._is_live(drafter, attempt):
                    self._on_drafts_arrived(drafter, attempt, start, tokens, parents)
            case DraftEnded(attempt, complete, held, drafter):
                if self._is_live(drafter, attempt):
                    self._drafting.ended(drafter, attempt, complete=complete, held=held)
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
            case DrafterJoined(drafter, rank, rows):
                self._drafting.joined(drafter, rank, rows)
                self._drafts_late = False
            case DrafterLost(drafter):
                self._drafting.lost(drafter)
            case PolicyChanged(policy):
                assert policy.sp >= self.policy.sp, "what runs must stay allowed"
                self.policy = policy
                if not policy.max_ahead:
                    self._drafting.cancel_all()  # nobody waits for them any more
            case CancelRequested():
                if not self.finished:
                    self._finish("cancelled")
                    self._actions.append(Finish("cancelled"))
        if not self.finished:
            self._drafting.plan(self.policy, self.end)
            self._plan_verifications()
        self._cancel_going_on()
        if self._judged is not _NOTHING_JUDGED:
            self._actions.append(self._judged)
            self._judged = _NOTHING_JUDGED
        actions, self._actions = self._actions, []
        if len(actions) > 1:
            actions.sort(key=_urgency)
        return actions

    # What happened to a verification

    def _on_verification_finished(
        self, attempt: int, server: int, start: int, tokens: tuple[int, ...], more: bool
    ) -> None:
        if more and attempt in self._verifications and start < self._verifications[attempt].start:
            self.counters.stale_events += 1  # it came again
            return
        verification = self._end_verification(attempt, server, more=more)
        state = self._servers.get(server)
        if more and state is not None and state.attempt == attempt:
            state.held = min(state.held, self.committed, start + len(tokens))
        if verification is None:
            return
        if verification.ahead and start > verification.start:
            self.counters.gaps += 1
            if state is not None:
                state.lost_one = True
                state.held = min(state.held, self.committed)
            return
        overlap = self.committed - verification.start
        if (
            start != verification.start
            or not overlap < len(tokens) <= verification.deepest - verification.start + 1
            or list(tokens[:overlap]) != self.tokens[start : self.committed]
        ):
            self.counters.disagreements += 1
            if state is not None:
                state.held = 0  # prefer another one, and tell this one everything again
            return
        self._warm_server = server
        self.counters.useful_verifications += 1
        self._judged = Judged(attempt)
        self._commit(tokens[overlap:], verification.nodes)
        if state is not None:
            state.lost_one = False
            if more and state.attempt == attempt and self.committed == start + len(tokens):
                state.held = state.goes_on_at = self.committed

    def _on_verification_abandoned(self, attempt: int, server: int, held: int | None) -> None:
        self._end_verification(attempt, server)
        if held is not None and server in self._servers:
            self._servers[server].held = min(self._servers[server].held, held)

    def _end_verification(self, attempt: int, server: int, *, more: bool = False) -> _Verification | None:
        """The server is idle again, or with `more` goes on. Returns the verification if its attempt was still live."""
        verification = self._verifications.pop(attempt, None)
        if verification is None:
            self.counters.stale_events += 1
        state = self._servers.get(server)
        if state is not None and state.attempt == attempt:
            if not more:
                state.attempt = None
            elif verification is not None:  # else it was cancelled, and will say so
                state.goes_on_at = 0
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
            self._drafting.judge(token)
            step = self._tree.advance(token)
            accepted.append(step in (Step.ACCEPTED, Step.ALTERNATIVE))
            if step is Step.ALTERNATIVE:
                alternatives.append(self.committed)
            if step is not Step.UNDRAFTED:
                self._judge(step, offered=offered)
            if step is not Step.ACCEPTED:
                self._replace_main_path(self.committed)
                self.counters.rejections += step is Step.CORRECTED
            self._drafting.root_moved()
            if step is Step.CORRECTED:
                self._drafting.cancel_all()
            self.committed += 1
            if token in self.stop_tokens:
                reason = "stop"
            elif self.committed == self.end:
                reason = "length"
            if reason or self._tree.root not in verified:
                break
        if reason is None:
            self._cancel_outrun_verifications()
            self._drafting.committed()
        else:
            self._finish(reason)
        committed = tuple(self.tokens[start : self.committed])
        self._actions.append(EmitTokens(start, committed, tuple(accepted), tuple(alternatives)))
        if reason is not None:
            self._actions.append(Finish(reason))

    def _replace_main_path(self, position: int) -> None:
        """The main path is another one from this position on."""
        del self.tokens[position:]
        for server in self._servers.values():
            server.held = min(server.held, position)
        self.tokens += (
            node.token for node in (self._tree.root, *self._tree.main)[position - self._tree.root.position :]
        )

    def _cancel_outrun_verifications(self) -> None:
        """Those that can yield nothing beyond the committed tokens, or no more than earlier ones: neither on the main path nor on
        that of another drafter."""
        root, outrun = self._tree.root, []
        paths = [self._tree.main, *(self._tree.path_to(view.end) for view in self._drafting.beside)]
        fronts = [-1] * len(paths)
        for attempt, verification in self._verifications.items():
            if root in verification.nodes:
                reached = [self._tree.reach(verification.nodes, path) for path in paths]
                verification.end = reached[0]
                if any(map(int.__gt__, reached, fronts)):
                    fronts = list(map(max, reached, fronts))
                    continue
            outrun.append(attempt)
        self._cancel_verifications(outrun)

    def _judge(self, step: Step, *, offered: bool) -> None:
        """The main path's draft was compared with the target's own token. `offered`: there was an alternative, too."""
        now, counters = self._judged, self.counters
        accepted, wrong, hit = step is Step.ACCEPTED, step is not Step.ACCEPTED and offered, step is Step.ALTERNATIVE
        self._judged = Judged(
            now.attempt, now.judged + 1, now.accepted + accepted, now.offered + wrong, now.alternatives + hit
        )
        self._wrong_in_a_row = self._wrong_in_a_row + 1 if step is Step.CORRECTED else 0
        counters.judged += 1
        counters.accepted += accepted
        counters.offered += wrong
        counters.alternatives += hit

    def _judge_late(self, right: bool) -> None:
        self._judge(Step.ACCEPTED if right else Step.CORRECTED, offered=False)

    # What the drafters said

    def _is_live(self, drafter: int, attempt: int) -> bool:
        live = self._drafting.is_live(drafter, attempt)
        self.counters.stale_events += not live
        return live

    def _on_drafts_arrived(
        self, drafter: int, attempt: int, start: int, tokens: Sequence[int], parents: Sequence[int]
    ) -> None:
        placed = self._drafting.arrived(drafter, attempt, start, tokens, parents)
        self._follow_main_path()
        if placed:
            self.counters.drafted += len(tokens)
            if self._drafting.leads(drafter):
                self._drafts_late = False

    def _follow_main_path(self) -> None:
        """Drafts came. The main path is longer, or the leader drafted another one than the drafter that led until now."""
        tree = self._tree
        if tree.replaced_from is not None and tree.replaced_from < len(self.tokens):
            self._replace_main_path(tree.replaced_from)
            for verification in self._verifications.values():
                verification.end = tree.reach(verification.nodes, tree.main)
        else:
            self.tokens += (node.token for node in tree.main[len(self.tokens) - self.committed :])
        tree.replaced_from = None

    # What to do next

    def _plan_verifications(self) -> None:
        while len(self._verifications) < self.policy.sp and self._worth_verifying():
            server = self._idle_server()
            if server is None or not self._start_verification(server, self._servers[server]):
                return

    def _start_verification(self, server: int, state: _Server) -> bool:
        """False if there is nothing to verify that is not verified: a branch may be too much for the server, or the policy."""
        start = self.committed
        base, end = state.held, min(len(self.tokens), self._verified_front() + self.policy.span)
        nodes = set(self._tree.main[: end - start])
        nodes.add(self._tree.root)
        # A branch may leave the main path before what the server holds: all from the root on is told again, then. A server that
        # has a long text to read gets no branches with it.
        room = min(self.policy.branches, state.rows - (end - min(base, start)))
        branches = self._tree.branches(end, self._deepest(end), room) if room > 0 else ()
        if self._verifications and end <= self._verified_front() and all(map(self._is_verified, branches)):
            return False
        if branches:
            base = min(base, start)
            nodes.update(branches)
            tokens = (*self.tokens[base:end], *(node.token for node in branches))
            parents = self._parents_of(base, end, branches)
        elif end == start == state.goes_on_at:
            self._let_go_on(server, state)
            return True
        else:
            base = min(base, end)
            tokens, parents = tuple(self.tokens[base:end]), ()
        deepest = max([end, *(node.position + 1 for node in branches)])
        attempt, ahead = self._take_attempt(), 0 if state.lost_one else self._ahead(start, deepest)
        self._verifications[attempt] = _Verification(server, start, end, nodes, deepest, ahead > 0)
        state.attempt, state.held, state.goes_on_at = attempt, end, None
        self.counters.verifications += 1
        self._actions.append(StartVerify(attempt, server, base, tokens, start, parents, ahead))
        return True

    def _ahead(self, start: int, deepest: int) -> int:
        """How many further answers a server may give by itself behind a verification of [start, deepest): those that the policy
        would ask it for, without drafts. None lies past the last position of the text."""
        policy, drafting = self.policy, self._drafting
        plain = not (policy.max_ahead and policy.span)
        # At first a drafter may yet come.
        if not plain and (drafting.views or start == self.prompt_length):
            if self._waits_for_first:
                return 0
            if self._wrong_in_a_row < WRONG_IN_A_ROW:
                if deepest > start:
                    return 1  # behind a correction
                if not drafting.had_nothing:
                    return 0  # drafts come while it computes
        return min(MOST_ANSWERS_AHEAD, self.end - 1 - deepest)

    def _let_go_on(self, server: int, state: _Server) -> None:
        """What the server has begun by itself is what it would be asked next."""
        assert state.attempt is not None
        start, state.goes_on_at = self.committed, None
        self._verifications[state.attempt] = _Verification(server, start, start, {self._tree.root}, start, True)
        self.counters.verifications += 1
        self._actions.append(VerifyGoesOn(state.attempt, server, start))

    def _cancel_going_on(self) -> None:
        """Of servers that go on for nobody."""
        for number, server in self._servers.items():
            if server.goes_on_at is not None:
                assert server.attempt is not None
                server.goes_on_at = None
                self._actions.append(CancelVerify(server.attempt, number))

    def _is_verified(self, node: Node) -> bool:
        """Whether a live verification checks it."""
        return any(node in verification.nodes for verification in self._verifications.values())

    def _deepest(self, end: int) -> int:
        """Where a verification that reads the main path up to `end` ends on branches. Not before the drafters' own paths do, or
        what lies between would wait for the main path to be as long."""
        nodes = [view.end for view in self._drafting.beside]
        return max([end, *(node.position + 1 - max(0, self._unverified(node) - self.policy.span) for node in nodes)])

    def _unverified(self, node: Node) -> int:
        """Of the drafts on the path to a live node, how many at its end no live verification checks."""
        found = 0
        while node is not self._tree.root and not self._is_verified(node):
            assert node.parent is not None
            found, node = found + 1, node.parent
        return found

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
        policy, drafting, running = self.policy, self._drafting, bool(self._verifications)
        if not running and (self._drafts_late or self._has_much_to_read() or not self._waits_for_first):
            return True
        covered = self._verified_front() - self.committed
        # The first drafter with something to verify, or with drafts to come, decides. A leader that is late is left out.
        for view in drafting.views[1:] if self._drafts_late else drafting.views:
            coming, drafted = drafting.has_more_to_come(view), drafting.front(view) - self.committed
            if not (coming or drafted):
                continue
            left = self._unverified(view.end) if drafting.is_beside(view) else drafted - covered
            if worth_verifying(policy, left if running else drafted, 0, running=running, drafts_coming=coming):
                return True
            if coming:
                return False
        drafted = len(self.tokens) - self.committed
        return worth_verifying(policy, drafted, covered, running=running, drafts_coming=drafting.coming)

    @property
    def _waits_for_first(self) -> bool:
        """Whether a verification behind the committed tokens waits for drafts. Not for those of a drafter that had none when the
        last token was committed, as prompt lookup where nothing repeats: they come while the server computes."""
        return self.policy.first_wait > 0 and not (self.policy.algorithm == "dsi" and self._drafting.had_nothing)

    def _has_much_to_read(self) -> bool:
        """Whether the server would read more before the drafts than there may be drafts. Then they come while it reads: DSI
        begins at once, and so does its first token."""
        server = self._idle_server()
        if server is None or server == self._warm_server or self.policy.algorithm != "dsi":
            return False
        return self.committed - self._servers[server].held > self.policy.max_ahead

    def _verified_front(self) -> int:
        """One past the last token of the main path that is being verified."""
        return max((verification.end for verification in self._verifications.values()), default=self.committed)

    def _idle_server(self) -> int | None:
        """The idle server with the least to read: the one that answered last, else the one that holds most."""
        servers = self._servers.items()
        idle = [number for number, server in servers if server.attempt is None or server.goes_on_at is not None]
        if self._warm_server in idle:
            return self._warm_server
        return max(idle, key=lambda number: self._servers[number].held, default=None)

    # Ending work

    def _cancel_verifications(self, attempts: Collection[int]) -> None:
        for attempt in list(attempts):
            self._actions.append(CancelVerify(attempt, self._verifications.pop(attempt).server))

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._tree.clear()
        del self.tokens[self.committed :]
        for server in self._servers.values():
            server.held = min(server.held, self.committed)
        self._cancel_verifications(self._verifications)
        self._drafting.root_moved()
        self._drafting.cancel_all()

    def _act(self, action: Action) -> None:
        self._actions.append(action)

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
        earlier: set[Node] = set()
        for attempt, verification in self._verifications.items():
            assert self._servers[verification.server].attempt == attempt, "a live verification has its server"
            assert verification.start <= self.committed <= verification.end <= len(self.tokens)
            assert verification.end == tree.reach(verification.nodes, tree.main)
            assert tree.root in verification.nodes, "its tree holds the root"
            assert any(node.live for node in verification.nodes - earlier), "a later verification covers more"
            earlier |= verification.nodes
        for server in self._servers.values():
            assert 0 <= server.held <= len(self.tokens)
            assert server.goes_on_at is None, "no server goes on for nobody"
        self._drafting.check(self.end)
        if self.finished:
            assert not self._verifications, "a finished generation holds nothing"
            assert self._drafting.idle, "a finished generation holds nothing"
            assert len(self.tokens) == self.committed

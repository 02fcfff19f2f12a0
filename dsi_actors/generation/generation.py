"""One generation: a `GenerationCore`, the workers lent to it, and the stream of its tokens to whoever asked.

The core decides; this actor does what it says. A StartVerify becomes a verification task on a target server, whose answer
comes back as one event; a cancel is told to the worker, one way. A rule about tokens in this file is in the wrong file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from dsi_actors.actor import Actor
from dsi_actors.config import Sampling
from dsi_actors.core import GenerationCore, Policy
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
    CancelRequested,
    DrafterJoined,
    DrafterLost,
    DraftsArrived,
    DraftsLate,
    Event,
    PolicyChanged,
    ServerJoined,
    ServerLost,
    VerificationFinished,
)
from dsi_actors.errors import NoTargetError
from dsi_actors.generation.account import Account
from dsi_actors.generation.answers import Answered, Answers, Misbehaved, Withdrawn
from dsi_actors.generation.draft_timeout import DraftTimeout
from dsi_actors.generation.knowledge import Knowledge, can_overlap, rows_of, rows_of_trees
from dsi_actors.generation.lent_drafters import LentDrafter, LentDrafters
from dsi_actors.generation.messages import GenerationMessage, Granted, Reclaimed, Settled, WaitedForTarget
from dsi_actors.generation.prefix_checksums import PrefixChecksums
from dsi_actors.logs import get_logger
from dsi_actors.planning.arms import TOGETHER, arms_of
from dsi_actors.planning.controller import Controller
from dsi_actors.planning.search import Steps
from dsi_actors.results import CommittedTokens, GenerationReport
from dsi_actors.workforce.scheduler import Exchanged, GivenBack, Released, Requested, Scheduler
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import MAX_TOKENS_PER_MESSAGE, Draft, Drafted, Reply, Verified, Verify

log = get_logger("generation")

#: How long the end of a generation waits for the replies that workers still owe, for an exact account.
_SETTLE_S = 1.0
#: The search for a better policy gives way to messages after so long.
_RETUNE_S = 0.0001
#: Of a tree, in one frame: as many parents come with its tokens.
MOST_ROWS = MAX_TOKENS_PER_MESSAGE // 2


class Generation(Actor[GenerationMessage]):
    """Runs one core to its end. `on_tokens` and `on_end` are called as it goes; both must return at once."""

    def __init__(
        self,
        number: int,
        core: GenerationCore,
        scheduler: Scheduler,
        controller: Controller,
        knowledge: Knowledge,
        *,
        vocabulary_size: int,
        sampling: Sampling,
        correlation: str,
        first_target_wait_s: float,
        target_wait_s: float,
        on_tokens: Callable[[CommittedTokens], None],
        on_end: Callable[[Exception | None], None],
        observe: Callable[[int, Event | Action], None] | None = None,
    ) -> None:
        super().__init__(f"generation {number}")
        self.number = number
        self.report: GenerationReport | None = None
        self._core = core
        self._scheduler = scheduler
        self._controller = controller
        self._knowledge = knowledge
        self._sampling = sampling
        self._correlation = correlation
        #: The last answer, with its log probabilities.
        self._answer: Answered | None = None
        self._on_tokens = on_tokens
        self._on_end = on_end
        self._observe = observe
        self._servers: dict[int, WorkerHandle] = {}
        self._most_servers = 0
        self._drafters = LentDrafters()
        self._workers_used: dict[int, WorkerHandle] = {}
        self._sent_away: set[int] = set()
        self._checksums = PrefixChecksums(core)
        self._error: Exception | None = None
        self._last_failure = ""
        self._pending = 0  # requests without a terminal reply
        self._account = Account()
        self._answers = Answers(self._account, controller.tuner, vocabulary_size=vocabulary_size, sampling=sampling)
        self._settling = False
        #: A search for a better policy that is not at its end.
        self._retuning: Steps[Policy | None] | None = None
        self._draft_timeout = DraftTimeout(self._on_late_drafts)
        self._target_wait_s = target_wait_s
        self._first_target_wait_s = first_target_wait_s
        self._waits = 0
        self._log = log.bind(correlation=correlation)

    def on_start(self) -> None:
        """Ask for workers."""
        if self._core.finished:  # it was resumed at its end
            self._end_stream()
            self._conclude()
            return
        policy = self._core.policy
        self._account.begin()
        drafts = policy.algorithm != "ar"
        self._scheduler.tell(Requested(self, policy.sp, drafts, self._kinds_of(self._controller.drafter)))
        self._wait_for_target(self._first_target_wait_s)

    def cancel(self) -> None:
        """The reader wants no more: all work of this generation ends. Returns at once."""
        self.tell(CancelRequested(), control=True)

    # As a client of the scheduler

    def grant(self, worker: WorkerHandle) -> None:
        self.tell(Granted(worker), control=True)

    def withdraw(self, worker: WorkerHandle) -> None:
        self.tell(Withdrawn(worker), control=True)

    def reclaim(self, worker: WorkerHandle) -> None:
        self.tell(Reclaimed(worker), control=True)

    # Messages

    def receive(self, message: GenerationMessage) -> None:
        match message:
            case Granted(worker):
                self._use(worker)
            case Withdrawn(worker):
                self._lose(worker)
            case Reclaimed(worker):
                worker.close(self.number)
                self._let_go(worker)
                if worker.number in self._drafters:
                    self._drop_drafter(worker)
            case Misbehaved(worker, reason, fault):
                self._send_away(worker, reason, fault=fault)
            case WaitedForTarget(waits):
                if waits == self._waits and not self._servers and not self._core.finished:
                    self._on_waited_for_target()
            case Settled():
                self._conclude()
            case Answered(event):
                self._answer = message
                self._feed(event)
            case _:
                self._feed(message)
        if self._core.finished and not self._pending:
            self._conclude()

    def _feed(self, event: Event) -> None:
        if self._observe is not None:
            self._observe(self.number, event)
        useful = False
        for action in self._core.handle(event):
            if self._observe is not None:
                self._observe(self.number, action)
            self._do(action)
            useful = useful or (isinstance(action, Judged) and action.attempt is not None)
        if isinstance(event, VerificationFinished):
            self._account.settle(event.attempt, useful=useful)
        if self._retuning is None and not self.has_control:  # workers are lent one by one: plan after the last of them
            self._retuning = self._controller.retuning()
            self._retune()
        self._draft_timeout.update(
            waits=self._core.waits_for_drafts,
            arrived=isinstance(event, DraftsArrived),
            expected_ms=self._controller.estimates.drafter_ms * max(1, self._core.policy.first_wait),
        )

    def _retune(self) -> None:
        """Search for a better policy for about `_RETUNE_S`. The rest follows after the messages that have arrived."""
        if self._retuning is None or self._core.finished:
            return
        until_s = time.perf_counter() + _RETUNE_S
        try:
            next(self._retuning)
            while time.perf_counter() < until_s:
                next(self._retuning)
        except StopIteration as end:
            self._retuning = None
            policy: Policy | None = end.value
            if policy is not None:
                self._log.info("policy", wait=policy.first_wait, lookahead=policy.lookahead)
                self.deliver(PolicyChanged(policy))
        except Exception as error:
            self.fail(error)
        else:
            asyncio.get_running_loop().call_soon(self._retune)

    def _on_late_drafts(self) -> None:
        self._log.info("drafts are late: going on without")
        self.deliver(DraftsLate())

    def _do(self, action: Action) -> None:
        match action:
            case StartVerify(attempt, server, base, tokens, start, parents, ahead):
                checksum = self._checksums.of_first(base)
                verify = Verify(self.number, attempt, base, checksum, tokens, start, parents, ahead)
                self._verify(verify, self._servers[server])
            case StartDraft(attempt, base, tokens, start, count, block, rows, committed, number):
                self._drafters[number].asked(action)
                checksum = self._checksums.of_first(base)
                draft = Draft(self.number, attempt, base, checksum, tokens, start, count, block, rows, committed)
                self._draft(draft, self._drafters[number])
            case CancelVerify(attempt, server):
                self._servers[server].cancel(self.number, attempt)
            case CancelDrafts(attempt, number):
                self._drafters[number].cancelled_to = attempt
                self._drafters[number].worker.cancel(self.number, attempt)
            case EmitTokens(start, tokens, accepted, alternatives):
                self._learn_pace(len(tokens))
                assert self._answer is not None
                first = start - self._answer.event.start
                logprobs = self._answer.logprobs[first : first + len(tokens)]
                top_logprobs = self._answer.top_logprobs[first : first + len(tokens)]
                by_alternative = tuple(position in alternatives for position in range(start, start + len(tokens)))
                self._on_tokens(CommittedTokens(tokens, accepted, logprobs, by_alternative, top_logprobs))
            case VerifyGoesOn():
                pass
            case Judged():
                self._account.judged(action.accepted, action.judged)
                self._controller.judged(action, self._core.committed)
            case Finish(reason):
                self._log.info("finished", reason=reason, tokens=len(self._core.output))
                self._end_stream()

    def _learn_pace(self, tokens: int) -> None:
        kinds = self._scheduler.drafter_kinds(self)
        trees = self._controller.tuner.may_branch and rows_of(self._servers.values()) > 1
        another = self._controller.committed(
            tokens, self._account.commit(tokens), self._core.committed,
            drafts=len(self._drafters) > 0, reads=self._drafters.read(self._core.committed),
            drafters=arms_of(kinds, trees=trees),
        )  # fmt: skip
        if another is not None:
            self._log.info("another drafter", kinds=self._kinds_of(another))
            self._scheduler.tell(Exchanged(self, self._kinds_of(another)))

    def _kinds_of(self, arm: str) -> tuple[str, ...]:
        return tuple(self._scheduler.drafter_kinds(self)) if arm == TOGETHER else (arm,)

    # Workers

    def _use(self, worker: WorkerHandle) -> None:
        if self._core.finished or worker.number in self._sent_away:
            return  # lent when that was not known; what is lent is given back at the end, what was sent away was already
        worker.open(self.number, self._core.prompt_length, self._correlation, self._sampling)
        self._workers_used[worker.number] = worker
        if worker.role == "target":
            self._servers[worker.number] = worker
            self._most_servers = max(self._most_servers, len(self._servers))
            self._count_servers()
            self._feed(ServerJoined(worker.number, min(rows_of([worker]), MOST_ROWS)))
        else:
            lent = self._drafters.add(worker, self._knowledge.rank(worker.kind), self._core.committed)
            self._plan_with_drafters()
            self._feed(DrafterJoined(worker.number, lent.rank, rows_of([worker])))

    def _drop_drafter(self, worker: WorkerHandle) -> None:
        """What it still does for us is cancelled: it was closed, or is gone. The others go on."""
        self._learn()
        if len(self._drafters) > 1:
            judged, accepted = self._core.acceptance_of(worker.number)
            self._log.info("a drafter leaves the others", worker=str(worker), judged=judged, accepted=accepted)
        self._drafters.remove(worker.number)
        self._plan_with_drafters()
        self._feed(DrafterLost(worker.number))

    def _plan_with_drafters(self) -> None:
        """Others are there than before. Those that are there are the arm in use."""
        leader = self._drafters.leader
        if leader is None:
            return
        kinds, ready = self._drafters.kinds, leader.worker.ready
        guesser = self._knowledge.guesser(
            kinds, self._core.committed, ready.latency_us / 1e3 if ready is not None else 0.0
        )
        self._controller.drafter_joined(TOGETHER if len(kinds) > 1 else kinds[0], guesser, len(self._core.tokens))
        self._count_servers()

    def _lose(self, worker: WorkerHandle) -> None:
        """The worker is gone, or not to be used here again. Hearing of it twice changes nothing."""
        if worker.number in self._servers:
            self._log.warning("target server lost", worker=str(worker))
            self._let_go(worker)
            if not self._servers:
                self._wait_for_target(self._target_wait_s)
        elif worker.number in self._drafters:
            self._log.warning("drafter lost: decoding goes on without", worker=str(worker))
            self._drop_drafter(worker)

    def _let_go(self, worker: WorkerHandle) -> None:
        if self._servers.pop(worker.number, None) is not None:
            self._count_servers()
            self._feed(ServerLost(worker.number))

    def _count_servers(self) -> None:
        servers, drafters = self._servers.values(), self._drafters.workers
        self._controller.set_servers(
            len(servers),
            overlaps=can_overlap(servers, drafters[:1]) if servers and drafters else None,
            rows=rows_of_trees(servers, drafters),
        )

    def _wait_for_target(self, patience_s: float) -> None:
        self._waits += 1
        self.spawn(_later(patience_s, WaitedForTarget(self._waits)))

    def _on_waited_for_target(self) -> None:
        patience_s = self._target_wait_s if self._most_servers else self._first_target_wait_s
        if self._scheduler.has_target_for(self):
            self._wait_for_target(patience_s)  # others use it now: we are in line
            return
        tokens = tuple(self._core.output)
        self._error = NoTargetError(
            f"no target server for {patience_s:g} s, {len(tokens)} tokens committed: "
            + (self._last_failure or "start another worker with this orchestrator's address"),
            tokens,
        )
        self._feed(CancelRequested())

    def _send_away(self, worker: WorkerHandle, reason: str, *, fault: bool) -> None:
        self._last_failure = f"{worker} failed ({reason[:300]})"
        self._log.error("a worker failed this generation", worker=str(worker), reason=reason[:500])
        worker.close(self.number)
        self._sent_away.add(worker.number)
        if fault:
            worker.fault(reason)
        self._scheduler.tell(GivenBack(self, worker))
        self._lose(worker)

    # Requests: each answer becomes one message

    def _verify(self, request: Verify, worker: WorkerHandle) -> None:
        asked_s = time.perf_counter()

        def on_reply(reply: Reply | None) -> None:
            nonlocal asked_s
            waited_ms = (time.perf_counter() - asked_s) * 1e3
            asked_s += waited_ms / 1e3
            ends = not (isinstance(reply, Verified) and reply.more)
            self._pending -= ends
            if ends:
                self._account.verification_ended()
            self.deliver(self._answers.to_verify(request, worker, reply, waited_ms))

        self._pending += 1
        self._account.verification_began()
        worker.verify(request, on_reply)

    def _draft(self, request: Draft, lent: LentDrafter) -> None:
        worker = lent.worker
        asked_s, asked_verified_ms = time.perf_counter(), self._account.verified_ms

        def on_drafted(block: Drafted) -> None:
            now_s, now_verified_ms = time.perf_counter(), self._account.verified_ms
            waited_ms = (now_s - max(asked_s, lent.heard_s)) * 1e3
            verified_ms = now_verified_ms - max(asked_verified_ms, lent.heard_verified_ms)
            lent.heard_s, lent.heard_verified_ms, lent.has_read = now_s, now_verified_ms, True
            in_use = lent is self._drafters.leader
            self.deliver(
                self._answers.drafted(request, worker, block, waited_ms, in_use=in_use, verified_ms=verified_ms)
            )

        def on_reply(reply: Reply | None) -> None:
            self._pending -= 1
            cancelled = request.attempt <= lent.cancelled_to or self._core.finished
            lent.has_read = lent.has_read or not cancelled
            self.deliver(self._answers.to_draft(request, worker, reply, cancelled=cancelled))

        self._pending += 1
        worker.draft(request, on_reply, on_drafted)

    # The end

    def _end_stream(self) -> None:
        """The reader hears at once; the workers' last replies are awaited for the account."""
        self._account.end()
        self._on_end(self._error)
        if not self._settling:
            self._settling = True
            self.spawn(_later(_SETTLE_S, Settled()))

    def _conclude(self) -> None:
        if self.report is None:
            self.report = self._account.report(self._core, self._most_servers, self._drafters.name)
            self.stop()

    def on_stop(self) -> None:
        self._draft_timeout.end()
        for worker in self._workers_used.values():
            worker.close(self.number)
        self._scheduler.tell(Released(self))
        if not self._core.finished:
            self._core.handle(CancelRequested())
        if self.report is None:
            self.report = self._account.report(self._core, self._most_servers, self._drafters.name)
        self._controller.ended()
        if self._core.counters.judged or self._controller.estimates.sharers > 1:
            self._learn()

    def _learn(self) -> None:
        """What this generation measured is what later ones begin with."""
        estimates, core = self._controller.tuner.carry_over(), self._core
        self._knowledge.learn(estimates, self._controller.drafter, core.committed, core.committed - core.prompt_length)


async def _later(delay_s: float, message: GenerationMessage) -> GenerationMessage:
    await asyncio.sleep(delay_s)
    return message

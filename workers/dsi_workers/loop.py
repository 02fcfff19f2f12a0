"""The worker's main loop: handle all messages, choose requests, do one step of work, send the replies.

A step is one forward pass of the engine: a drafted token (or several), a verification, or a chunk of a prompt. Requests of
several generations share a step. During a step, the engine calls `check` between layers, which handles new messages. So a
cancel takes effect within a forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog

from dsi_protocol import (
    MAX_TOLD,
    Cancel,
    Cancelled,
    CloseGeneration,
    Draft,
    Drafted,
    Failed,
    Goodbye,
    Heartbeat,
    Message,
    NeedPrefix,
    OpenGeneration,
    Ready,
    Reply,
    Request,
    Score,
    Scored,
    Verified,
    Verify,
    Welcome,
)
from dsi_workers.connection import WorkSocket
from dsi_workers.engine import Answer, Engine, Interrupted, RequestError
from dsi_workers.refusal import refusal
from dsi_workers.session import Session
from dsi_workers.sessions import Sessions
from dsi_workers.tree import read_tree
from dsi_workers.work import Work, WorkQueue

log = structlog.get_logger("dsi.worker")

MAX_QUEUED_REQUESTS = 4096
#: While idle, the loop checks at this interval whether the worker is still needed.
IDLE_S = 0.1
#: The last part of a timed wait is a busy loop: waking up takes about this long, and the processor stays awake for the reply.
_SPIN_S = 0.00015
#: After a batched step, the loop waits briefly for the next requests of the same generations. Otherwise the earliest would start
#: alone, the others would queue behind it, and the batch would never re-form. The wait takes at most this share of the step's
#: time.
_GATHER_SHARE = 0.25
#: The wait ends early when no message has come for this share of the step's time, or for this many seconds, whichever is less.
_GATHER_GAP_SHARE, _GATHER_GAP_S = 0.1, 0.002


class WorkerLoop:
    """Serves one engine over one socket, until it is drained or dismissed, or `still_needed` returns False."""

    def __init__(
        self,
        socket: WorkSocket,
        engine: Engine,
        still_needed: Callable[[], bool],
        ready: Ready | None = None,
        *,
        role: str,
    ) -> None:
        """`role` is `target` or `drafter`: a target answers Verify only, a drafter Draft only."""
        self._socket = socket
        self._engine = engine
        self._role = role
        self._still_needed = still_needed
        #: The worker's Ready, to repeat it if the orchestrator sends Welcome again.
        self._ready = ready
        self._sessions = Sessions()
        self._queue = WorkQueue()
        #: The requests of the current step; empty between steps. During a step, no method of the engine may be called.
        self._current: Sequence[Work] = ()
        #: An error that was raised within a step by handling a message, so not by the engine.
        self._message_error: Exception | None = None
        self._draining = False
        #: The Goodbye that the orchestrator sent, if any.
        self.farewell: Goodbye | None = None

    def run(self) -> None:
        """Serve until the worker is drained, dismissed, or no longer needed."""
        while self.farewell is None and self._still_needed():
            self._drain(0.0 if self._queue or self._draining else IDLE_S)
            batch = self._pick()
            if batch:
                begun_s = time.perf_counter()
                self._step(batch)
                self._await_batch(batch, time.perf_counter() - begun_s)
            elif self._draining:
                return

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Refuse new requests, and end `run` once all present ones are answered. Safe to call from a signal handler."""
        self._draining = True

    def forget_all(self) -> None:
        """Close every generation, so that the engine can serve another orchestrator. Call after `run`, even if `run` failed."""
        self._current = ()
        self._sessions.close_all()
        self._forget_closed()

    # The protocol Interrupt, called by the engine during a step

    def check(self) -> None:
        self._drain(0.0)
        wanted = any(work.wanted() or self._queue.reads_on(work.session) for work in self._current)
        if not wanted or self.farewell is not None or not self._still_needed():
            raise Interrupted

    def wait_until(self, deadline_s: float) -> None:
        self.check()
        while (left_s := deadline_s - time.perf_counter()) > 0:
            if left_s < _SPIN_S:
                continue
            if self._drain(min(left_s - _SPIN_S, IDLE_S)) or left_s > IDLE_S:
                self.check()

    # Messages

    def _drain(self, wait_s: float) -> bool:
        """Handle all messages that have arrived; wait up to `wait_s` for the first. Returns whether there was a message."""
        try:
            message = self._socket.receive(wait_s)
            came = message is not None
            while message is not None:
                self._on_message(message)
                message = self._socket.receive()
        except Exception as error:
            self._message_error = error
            raise
        return came

    def _on_message(self, message: Message) -> None:
        match message:
            case Verify() | Draft() | Score():
                self._on_request(message)
            case Cancel(generation, attempt):
                session = self._sessions.get(generation)
                if session is not None:
                    session.cancelled_to = max(session.cancelled_to, attempt)
            case OpenGeneration():
                self._sessions.open(message, {work.request.generation for work in self._queue})
                self._forget_closed()
            case CloseGeneration(generation):
                self._sessions.close(generation)
                self._forget_closed()
            case Goodbye(reason):
                log.info("dismissed", reason=reason)
                self.farewell = message
            case Welcome():  # the orchestrator has not received our Ready, or answers an earlier Hello
                if self._ready is not None:
                    self._socket.send(self._ready)
            case Heartbeat():
                pass
            case _:
                log.warning("message ignored: workers do not receive this type", message=type(message).__name__)

    def _forget_closed(self) -> None:
        """Have the engine forget generations that were closed; during a step this must wait."""
        if not self._current:
            for session in self._sessions.take_closed():
                self._engine.forget(session)

    def _on_request(self, request: Request) -> None:
        session = self._sessions.use(request.generation)
        if session is None:
            self._fail(request, "unknown_generation", "the generation is not open on this worker")
            return
        if not session.is_new(request.attempt):
            self._repeat_reply(request, session)
        elif (refusal := self._refusal(request, session)) is not None:
            self._fail(request, *refusal)
        else:
            if isinstance(request, Draft):
                self._apply_commits(request, session)
            else:  # the server goes on by itself until it is asked again
                for work in self._queue:
                    work.useless = work.useless or (work.session is session and work.goes_on)
            self._queue.add(Work(request, session))

    def _apply_commits(self, request: Draft, session: Session) -> None:
        """Drop branches that the committed tokens rule out. End earlier Drafts if this one brings a prefix of its own."""
        if request.start > request.base + len(request.tokens):
            session.drafts.drop_dead_branches(request.committed)
        elif request.rows > 1:
            drafted = session.has_drafted(request)  # then the current step drafts what follows these tokens
            for work in self._queue:
                if (
                    work.session is session
                    and isinstance(work.request, Draft)
                    and work.request.attempt < request.attempt
                ):
                    work.superseded = True
                    work.useless = work.useless or not drafted

    def _repeat_reply(self, request: Request, session: Session) -> None:
        """Send the terminal reply again, for a request that arrived before. Of an unfinished one: its last Verified, if any."""
        answered = session.reply_to(request.attempt)
        if answered is not None:
            self._socket.send(answered)
        elif request.attempt <= session.cancelled_to and all(
            work.request.attempt != request.attempt or work.session is not session for work in self._queue
        ):  # it was answered long ago: its reply is no longer remembered
            self._socket.send(Cancelled(request.generation, request.attempt, 0, 0))

    def _refusal(self, request: Request, session: Session) -> tuple[str, str] | None:
        """The code and message of the Failed that answers `request`; None if this worker can serve it."""
        if self._draining:
            return "draining", "this worker takes no more work"
        if len(self._queue) >= MAX_QUEUED_REQUESTS:
            return "limit", f"over {MAX_QUEUED_REQUESTS} requests are queued"
        return refusal(request, session, self._role, self._engine.info)

    # Work

    def _pick(self) -> list[Work]:
        """Choose the requests for the next step. Requests that need no step, such as cancelled ones, are answered here."""
        oldest: dict[Session, Work] = {}
        for work in self._queue:
            if work.session in oldest:
                continue
            if work.task is None and not self._prepare(work):
                self._queue.remove(work)
            elif not work.wanted() or work.superseded:
                self._queue.remove(work)
                request = work.request
                self._send(Cancelled(request.generation, request.attempt, work.forwards, work.take_busy_us()))
            else:
                oldest[work.session] = work
        return self._queue.choose(list(oldest.values()), self._engine) if oldest else []

    def _await_batch(self, batch: Sequence[Work], took_s: float) -> None:
        """Wait briefly for the next requests of the generations that were just answered, so that they share a step.

        Returns at once if there is nothing to share: the step had one request, and no other one is queued.
        """
        missing = {work.session for work in batch if isinstance(work.request, Verify)}
        missing -= {work.session for work in self._queue}
        if not missing or (len(batch) == 1 and not self._queue):
            return
        deadline_s = time.perf_counter() + _GATHER_SHARE * took_s
        gap_s = min(_GATHER_GAP_S, _GATHER_GAP_SHARE * took_s)
        while missing and time.perf_counter() < deadline_s:
            message = self._socket.receive(gap_s)
            if message is None:
                return
            self._on_message(message)
            missing = {session for session in missing if self._sessions.get(session.generation) is session}
            missing -= {work.session for work in self._queue}

    def _prepare(self, work: Work) -> bool:
        """Make the session's tokens match the request. Also for a cancelled request: the next one may build on its tokens.

        Returns False if the request was answered instead: its prefix is missing here, its text is empty, or it leaves
        nothing to do.
        """
        request, session = work.request, work.session
        if not session.holds(request.base, request.base_crc):
            held = len(session.tokens) if request.base > len(session.tokens) else 0
            self._send(NeedPrefix(request.generation, request.attempt, held))
            return False
        if isinstance(request, Draft):
            self._prepare_draft(request, session)
        else:
            parents = request.parents if isinstance(request, Verify) else ()
            tokens, work.branches = read_tree(request.base, request.tokens, parents)
            session.write(request.base, tokens)
            session.truncate(request.base + len(tokens))
        if not session.tokens:
            self._fail(request, "limit", "there is nothing to continue: a generation begins with at least one token")
            return False
        if isinstance(request, Draft) and len(session.tokens) >= request.start + request.count:
            self._send_drafts(work, done=True)  # a branch had it all already
            return False
        work.begin_task()
        return True

    def _prepare_draft(self, request: Draft, session: Session) -> None:
        """Make the session's tokens match a Draft, and keep drafts that still fit."""
        start = request.base + len(request.tokens)
        if start < request.start:  # the request continues earlier drafts
            session.write(request.base, request.tokens)
            session.truncate(request.start)
            session.drafts.drop_branches_beyond(len(session.tokens))
            if request.rows == 1 or len(session.tokens) < request.start:
                session.drafts.restart(session.tokens, len(session.tokens))
            return
        if request.rows == 1:
            session.write(request.base, request.tokens)
            session.truncate(start)
        elif session.tokens[request.base : start] != list(request.tokens):
            branch = session.drafts.leading_to(request.base, request.tokens, session.tokens)
            if branch is not None:
                self._engine.promote(session, branch)
            else:
                session.write(request.base, request.tokens)
                session.truncate(start)
        session.truncate(request.start + request.count)
        session.drafts.restart(session.tokens, start)

    def _step(self, batch: Sequence[Work]) -> None:
        """Do one step of the engine for these requests, and send the replies that it completes."""
        tasks = [work.task for work in batch if work.task is not None]
        self._current = batch
        begun_s, forwards = time.perf_counter(), self._engine.forwards
        failure: Exception | None = None
        try:
            self._engine.step(tasks, self)
        except Interrupted:
            pass  # the next _pick answers Cancelled
        except RequestError as error:
            log.warning("a request cannot be served", reason=str(error))
            failure = error
        except Exception as error:
            if error is self._message_error:
                raise
            log.exception("the engine failed", correlation=[work.session.correlation for work in batch])
            failure = error
        self._current = ()
        self._forget_closed()
        for work in batch:
            work.busy_s += (time.perf_counter() - begun_s) / len(batch)
            work.forwards += self._engine.forwards - forwards
        if failure is None:
            for work in batch:
                if work.task is not None and work.task.done:
                    self._report(work, work.task.answer)
        elif len(batch) == 1:
            self._queue.remove(batch[0])
            if isinstance(failure, RequestError):
                self._fail(batch[0].request, "request", str(failure)[:1000])
            else:
                self._fail(batch[0].request, "engine", f"{type(failure).__name__}: {failure}"[:1000])
        else:  # repeat the step for each request alone, to find the one that fails
            for work in batch:
                if work.wanted():
                    work.begin_task()
                    self._step([work])

    def _report(self, work: Work, answer: Answer) -> None:
        """Send what a step found out for this request. A Draft gets a reply for each block of drafts."""
        if not work.wanted():
            return  # the next _pick answers Cancelled
        if isinstance(work.request, Verify):
            self._report_verified(work, answer)
            return
        if isinstance(work.request, Score):
            self._report_scored(work, answer)
            return
        request, session, tokens = work.request, work.session, answer.tokens
        branches = work.task.branches if work.task is not None else ()
        session.drafts.add(len(session.tokens), tokens, answer.alternatives, branches, answer.continued)
        session.write(len(session.tokens), tokens)
        if work.superseded:
            return  # the next _pick answers Cancelled
        done = not tokens or len(session.tokens) >= request.start + request.count
        if done:
            self._queue.remove(work)
        else:
            work.begin_task()
        if done or session.drafts.unsent >= request.block:
            self._send_drafts(work, done=done)

    def _report_verified(self, work: Work, answer: Answer) -> None:
        request, session = work.request, work.session
        too_long = bool(session.sampling.top_logprobs) and len(answer.tokens) > MAX_TOLD
        if too_long:
            answer = answer.first(MAX_TOLD)
        more = not too_long and self._may_go_on(work, answer.tokens)
        self._send(
            Verified(
                request.generation, request.attempt, work.start, tuple(answer.tokens), tuple(answer.logprobs),
                work.take_forwards(), work.take_busy_us(), more, tuple(answer.top_tokens), tuple(answer.top_logprobs),
                session.reused,
            )
        )  # fmt: skip
        session.reused = 0  # it is told once
        if more:
            work.go_on(answer.tokens)
        else:
            self._queue.remove(work)

    def _report_scored(self, work: Work, answer: Answer) -> None:
        request, start = work.request, work.start
        work.start += len(answer.logprobs)
        done = work.start == len(work.session.tokens)
        self._send(
            Scored(
                request.generation, request.attempt, start, tuple(answer.logprobs), done, work.take_forwards(),
                work.take_busy_us(), tuple(answer.top_tokens), tuple(answer.top_logprobs),
            )
        )  # fmt: skip
        if done:
            self._queue.remove(work)
        else:
            work.begin_task()

    def _may_go_on(self, work: Work, answer: Sequence[int]) -> bool:
        """Whether the server may start the forward behind this answer before it is asked."""
        fits = work.start + len(answer) <= self._engine.info.max_length
        if (
            self._draining
            or not fits
            or any(other.session is work.session for other in self._queue if other is not work)
        ):
            return False
        return work.may_go_on(answer)

    def _send_drafts(self, work: Work, *, done: bool) -> None:
        start, tokens, parents = work.session.drafts.take()
        request = work.request
        self._send(Drafted(request.generation, request.attempt, start, tokens, done, work.take_busy_us(), parents))

    def _fail(self, request: Request, code: str, message: str) -> None:
        self._send(Failed(request.generation, request.attempt, code, message))

    def _send(self, reply: Reply) -> None:
        """Send a reply. Terminal replies are remembered, in case the request comes again, and so is the last Verified."""
        session = self._sessions.get(reply.generation)
        if session is not None and not (isinstance(reply, Drafted | Scored) and not reply.done):
            session.remember(reply.attempt, reply)
        self._socket.send(reply)

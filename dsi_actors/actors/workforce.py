"""Which workers there are: greets them, tells them what to be, hears their hearts, and says when they come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from dsi_actors.actors.actor import Actor
from dsi_actors.actors.gateway import Gateway, PeerGone
from dsi_actors.actors.worker_handle import WorkerHandle
from dsi_actors.config import NGRAM, RANDOM, SELF_INT8, Config
from dsi_actors.logs import get_logger
from dsi_protocol import (
    PROTOCOL_VERSION,
    Cancelled,
    Drafted,
    Failed,
    FromOrchestrator,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    NeedPrefix,
    OptionValue,
    Ready,
    Verified,
    Welcome,
)

log = get_logger("workforce")

MAX_WORKERS = 256
_MAX_REMEMBERED_FAILURES = 256
_LOADING_PATIENCE_S = 30.0
_MAX_REASON_CHARS = 500


@dataclass(frozen=True, slots=True)
class FrameArrived:
    identity: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class LookForSilence:
    """Told by our own clock, every heartbeat interval."""


WorkforceMessage: TypeAlias = FrameArrived | LookForSilence


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told to be."""

    role: str
    engine: str
    model: str
    options: Mapping[str, OptionValue]


class Workforce(Actor[WorkforceMessage]):
    """`on_ready` and `on_lost` are told of workers that may be used and of those that may not any more."""

    def __init__(
        self,
        config: Config,
        on_ready: Callable[[WorkerHandle], None],
        on_lost: Callable[[WorkerHandle], None],
    ) -> None:
        super().__init__("workforce", mailbox_size=1 << 16)
        self._config = config
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._gateway: Gateway | None = None
        self._by_identity: dict[bytes, WorkerHandle] = {}
        self._by_incarnation: dict[int, WorkerHandle] = {}
        self._heard_s: dict[int, float] = {}  # worker number -> when we last heard of it
        self._assignments: dict[int, Assignment] = {}
        self._next_number = 1
        #: vocabulary of the target, known from the first target server on.
        self.vocabulary: Ready | None = None
        #: Why the process with this id (of this host or another) could not serve, in its own words.
        self.failures: dict[int, str] = {}

    @property
    def workers(self) -> list[WorkerHandle]:
        return list(self._by_identity.values())

    def listen(self, endpoint: str) -> str:
        """Open the socket; returns the endpoint with its port. Raises ConfigError."""
        self._gateway = Gateway(endpoint, lambda identity, message: self.deliver(FrameArrived(identity, message)))
        return self._gateway.endpoint

    def look_for_silence(self) -> None:
        """Start the clock by which silent workers are found. Call once, when running."""
        self.spawn(self._tick())

    async def _tick(self) -> WorkforceMessage:
        await asyncio.sleep(self._config.heartbeat_ms / 1e3)
        return LookForSilence()

    def receive(self, message: WorkforceMessage) -> None:
        match message:
            case FrameArrived(identity, inner):
                self._on_frame(identity, inner)
            case LookForSilence():
                self._drop_silent_workers()
                self._drop_workers_that_do_not_answer()
                self.spawn(self._tick())

    def on_stop(self) -> None:
        for worker in self.workers:
            self._send(worker.identity, Goodbye("the orchestrator ends"))
            worker.on_lost()
        self.close_gateway()

    def close_gateway(self) -> None:
        """Idempotent. Needed by itself only if the actor never ran."""
        if self._gateway is not None:
            self._gateway.close()

    # From workers

    def _on_frame(self, identity: bytes, message: Message) -> None:
        if isinstance(message, Heartbeat):
            known = self._by_incarnation.get(message.incarnation)
            if known is not None:
                self._heard_s[known.number] = time.monotonic()
                self._send(identity, message)
            return
        if isinstance(message, Hello):
            self._on_hello(identity, message)
            return
        worker = self._by_identity.get(identity)
        if worker is None:
            return  # it was dropped, or never said Hello
        match message:
            case Verified() | Drafted() | Cancelled() | NeedPrefix():
                worker.on_reply(message)
            case Failed(0, _, _, reason):
                self._remember_failure(worker.hello, reason)
                log.error("a worker cannot serve", worker=str(worker), reason=reason)
                self._drop(worker, farewell=None)
            case Failed():
                worker.on_reply(message)
            case Ready():
                self._on_ready_message(worker, message)
            case Goodbye(reason):
                log.info("worker leaves", worker=str(worker), reason=reason)
                self._drop(worker, farewell=None)
            case _:
                log.warning("ignored: not for an orchestrator", worker=str(worker), message=type(message).__name__)

    def _on_hello(self, identity: bytes, hello: Hello) -> None:
        known = self._by_identity.get(identity) or self._by_incarnation.get(hello.incarnation)
        if known is not None:
            if known.identity == identity and known.hello.incarnation == hello.incarnation and known.ready is None:
                self._heard_s[known.number] = time.monotonic()
                self._greet(known)  # our first answer may have been lost with its connection
            return
        assignment = self._assign(hello)
        if isinstance(assignment, str):
            assignment = assignment[:_MAX_REASON_CHARS]  # it may quote what the peer said
            log.warning("worker refused", device=hello.device, pid=hello.process, reason=assignment)
            self._remember_failure(hello, assignment)
            self._send(identity, Goodbye(assignment))
            return
        worker = WorkerHandle(
            self._next_number, identity, hello, assignment.role, lambda message: self._send_or_drop(worker, message)
        )
        self._next_number += 1
        self._by_identity[identity] = worker
        self._by_incarnation[hello.incarnation] = worker
        self._heard_s[worker.number] = time.monotonic()
        self._assignments[worker.number] = assignment
        log.info("worker arrives", worker=str(worker), engine=assignment.engine, model=assignment.model)
        self._greet(worker)

    def _greet(self, worker: WorkerHandle) -> None:
        assignment = self._assignments[worker.number]
        options = {**assignment.options, "calibrate": self._config.calibrate}
        self._send_or_drop(
            worker,
            Welcome(
                PROTOCOL_VERSION, assignment.role, assignment.engine, assignment.model, options,
                self._config.heartbeat_ms, self._config.silence_ms,
            ),
        )  # fmt: skip

    def _assign(self, hello: Hello) -> Assignment | str:
        """What this worker shall be, or why it is refused."""
        config = self._config
        if hello.version != PROTOCOL_VERSION:
            return f"it speaks protocol version {hello.version}, this orchestrator {PROTOCOL_VERSION}"
        if len(self._by_identity) >= MAX_WORKERS:
            return f"there are {MAX_WORKERS} workers already"
        role = hello.role
        if role == "auto":
            roles = [worker.role for worker in self.workers]
            lacks_drafter = config.drafter is not None and "drafter" not in roles and "target" in roles
            role = "drafter" if lacks_drafter or hello.engine == NGRAM else "target"
        if role == "target":
            if hello.model not in ("", config.target):
                return f"it has the model {hello.model!r}, but the target is {config.target!r}"
            if hello.engine not in ("auto", config.engine):
                return f"it has the engine {hello.engine!r}, but target servers here run {config.engine!r}"
            return Assignment(role, config.engine, config.target, config.target_options)
        if role == "drafter":
            return self._assign_drafter(hello)
        return f"it wants the role {hello.role!r}: a worker is a target or a drafter"

    def _assign_drafter(self, hello: Hello) -> Assignment | str:
        config = self._config
        reference = hello.model or config.drafter
        if hello.engine == NGRAM or (reference == NGRAM and hello.engine == "auto"):
            return Assignment("drafter", NGRAM, "", config.drafter_options)
        if reference == RANDOM:
            return Assignment(
                "drafter", "timed", "", {"vocabulary_size": 256, "any_vocabulary": True, "acceptance": 0.0}
            )
        if config.engine == "timed":
            return Assignment("drafter", "timed", "", config.drafter_options)
        if reference is None:
            return "no drafter is wanted here"
        options = dict(config.drafter_options)
        if reference == SELF_INT8:
            reference = config.target
            options["quantization"] = "int8"
        return Assignment("drafter", config.engine, reference, options)

    def _on_ready_message(self, worker: WorkerHandle, ready: Ready) -> None:
        if worker.ready is not None:
            return
        worker.ready = ready
        if worker.role == "target" and self.vocabulary is None:
            self.vocabulary = ready
            for other in self.workers:
                if other.ready is not None:
                    self._admit(other)
        elif self.vocabulary is not None:
            self._admit(worker)

    def _admit(self, worker: WorkerHandle) -> None:
        """Use a ready worker, if it speaks in the target's tokens."""
        assert self.vocabulary is not None
        assert worker.ready is not None
        if worker.ready.vocabulary in (self.vocabulary.vocabulary, ""):
            log.info("worker ready", worker=str(worker), load_ms=worker.ready.load_ms)
            self._on_ready(worker)
            return
        reason = (
            f"the {worker.role}'s vocabulary ({worker.ready.vocabulary_size} tokens) is not the target's "
            f"({self.vocabulary.vocabulary_size} tokens): choose a model of the same family"
        )
        self._remember_failure(worker.hello, reason)
        log.error("worker refused", worker=str(worker), reason=reason)
        self._drop(worker, farewell=reason)

    def _remember_failure(self, hello: Hello, reason: str) -> None:
        self.failures[hello.process] = reason
        if len(self.failures) > _MAX_REMEMBERED_FAILURES:
            del self.failures[next(iter(self.failures))]

    # Comings and goings

    def _drop_silent_workers(self) -> None:
        now_s = time.monotonic()
        for worker in self.workers:
            silent_s = now_s - self._heard_s[worker.number]
            patience_s = self._config.silence_ms / 1e3
            if worker.ready is None:  # a library that loads can keep every thread of its process waiting
                patience_s = max(patience_s, _LOADING_PATIENCE_S)
            if silent_s > patience_s:
                log.warning("worker silent: taken for dead", worker=str(worker), silent_ms=round(silent_s * 1e3))
                self._drop(worker, farewell="it was silent for too long")

    def _drop_workers_that_do_not_answer(self) -> None:
        """A heart may beat where messages were lost, or where the loop hangs. A request that takes too long is
        cancelled, and a worker that does not even answer that is taken for dead."""
        now_s = time.monotonic()
        for worker in self.workers:
            worker.cancel_overdue(now_s - self._config.request_timeout_s)
            if worker.owes_since(now_s - self._config.silence_ms / 1e3):
                log.warning("worker does not answer: taken for dead", worker=str(worker))
                self._drop(worker, farewell="it did not answer")

    def drop_process(self, process: int) -> None:
        """The local process with this id has ended: whatever worker it was is gone."""
        for worker in self.workers:
            if worker.hello.process == process:
                self._drop(worker, farewell=None)

    def _drop(self, worker: WorkerHandle, farewell: str | None) -> None:
        if worker.lost:
            return
        if farewell is not None:
            self._send(worker.identity, Goodbye(farewell))
        self._by_identity.pop(worker.identity, None)
        self._by_incarnation.pop(worker.hello.incarnation, None)
        self._heard_s.pop(worker.number, None)
        self._assignments.pop(worker.number, None)
        worker.on_lost()
        self._on_lost(worker)

    def _send(self, identity: bytes, message: FromOrchestrator) -> bool:
        assert self._gateway is not None
        try:
            self._gateway.send(identity, message)
        except PeerGone:
            return False
        return True

    def _send_or_drop(self, worker: WorkerHandle, message: FromOrchestrator) -> None:
        if not self._send(worker.identity, message):
            log.warning("worker takes no messages: taken for dead", worker=str(worker))
            self._drop(worker, farewell=None)

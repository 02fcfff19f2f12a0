"""Which workers there are: greets them, tells them what to be, hears their hearts, and says when they come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

from dsi_actors.actor import Actor
from dsi_actors.config import Config
from dsi_actors.keys import AllowedKeys, Keyring
from dsi_actors.logs import get_logger
from dsi_actors.transport.doorkeeper import Doorkeeper
from dsi_actors.transport.gateway import Gateway, PeerGone
from dsi_actors.workforce.assignment import assign
from dsi_actors.workforce.compatibility import Compatibility
from dsi_actors.workforce.members import Member, Members
from dsi_actors.workforce.worker_handle import WorkerHandle
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
    Preparing,
    Ready,
    Reply,
    Scored,
    Verified,
    Welcome,
)

log = get_logger("workforce")

MAX_WORKERS = 256
#: Workers that are not ready yet. More would keep real ones out for as long as strangers say Hello.
MAX_LOADING = 64
#: Workers take an orchestrator that they cannot reach for gone after so many times our own patience: a worker that was
#: started with --once has to load its model again.
_WORKERS_PATIENCE = 5
_MAX_REASON_CHARS = 500


@dataclass(frozen=True, slots=True)
class FrameArrived:
    identity: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class LookForSilence:
    """Told by our own clock, every heartbeat interval; it was meant for `due_s`."""

    due_s: float


@dataclass(frozen=True, slots=True)
class FoundUseless:
    """This worker was faulty too often."""

    worker: WorkerHandle
    reason: str


WorkforceMessage: TypeAlias = FrameArrived | LookForSilence | FoundUseless


class Workforce(Actor[WorkforceMessage]):
    """`on_ready` and `on_lost` are told of workers that may be used and of those that may not any more; `on_preparing` of those
    that fetch or convert their model, and how much of that is done."""

    def __init__(
        self,
        config: Config,
        on_ready: Callable[[WorkerHandle], None],
        on_lost: Callable[[WorkerHandle], None],
        on_preparing: Callable[[WorkerHandle, float], None],
    ) -> None:
        super().__init__("workforce", mailbox_size=1 << 16)
        self._config = config
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._on_preparing = on_preparing
        self._gateway: Gateway | None = None
        self._keyring: AllowedKeys | None = Keyring(config.keys) if config.keys is not None else None
        self._members = Members()
        self._doorkeeper = Doorkeeper(time.monotonic, self._on_flood)
        self._next_number = 1
        self._goodbye_said = False
        self._compatibility = Compatibility(memory_s=max(config.target_wait_s, config.ready_timeout_s))
        self.refused = 0

    @property
    def workers(self) -> list[WorkerHandle]:
        return [member.worker for member in self._members]

    @property
    def failures(self) -> Mapping[int, str]:
        """Why this incarnation could not serve, in its own words."""
        return self._members.failures

    def listen(self, endpoint: str, keyring: AllowedKeys | None = None) -> str:
        """Open the socket; returns the endpoint with its port. `keyring`: who may connect, if the configuration does not say.
        Raises ConfigError."""
        self._gateway = Gateway(
            endpoint,
            self._on_frame,
            self._doorkeeper.lets_in,
            self._on_malformed,
            self._keyring or keyring,
        )
        return self._gateway.endpoint

    def on_start(self) -> None:
        self.spawn(self._tick())  # the clock by which silent workers are found

    def _on_flood(self, identity: bytes) -> None:
        member = self._members.at(identity)
        if member is not None:
            self.tell(FoundUseless(member.worker, "it floods us"), control=True)

    def _on_malformed(self, identity: bytes, reason: str) -> None:
        member = self._members.at(identity)
        if member is not None:
            member.worker.fault(f"malformed frame: {reason}")

    async def _tick(self) -> WorkforceMessage:
        due_s = time.monotonic() + self._config.heartbeat_ms / 1e3
        await asyncio.sleep(self._config.heartbeat_ms / 1e3)
        return LookForSilence(due_s)

    def receive(self, message: WorkforceMessage) -> None:
        match message:
            case FrameArrived(identity, inner):
                self._on_message(identity, inner)
            case LookForSilence(due_s):
                now_s = time.monotonic()  # not when the clock rang: a service may block its event loop in between
                if now_s - due_s > self._config.heartbeat_ms / 1e3:
                    self._forgive(now_s - due_s, now_s)  # and frames wait to be read
                else:
                    self._look_after_workers(now_s)
                self.spawn(self._tick())
            case FoundUseless(worker, reason):
                log.error("worker quarantined", worker=str(worker), reason=reason)
                self._drop(worker, Goodbye(reason))

    def say_goodbye(self) -> bool:
        """Dismiss all workers. Returns whether a worker that reads its messages was still connected: one that is ready, or that
        fetches its model. One that loads reads nothing meanwhile.

        Dismiss such a worker again after a pause: when the socket closes, messages that the worker has not read may be lost.
        """
        self._goodbye_said = True
        farewell = Goodbye("the orchestrator ends", again=True)
        there = [worker for worker in self.workers if self._send(worker.identity, farewell)]
        return any(worker.ready is not None or worker.preparing for worker in there)

    def on_stop(self) -> None:
        self.say_goodbye()
        for worker in self.workers:
            worker.on_lost()
        self.close_gateway()

    @property
    def messages(self) -> tuple[int, int]:
        """Received from workers, and sent to them, so far."""
        return (self._gateway.received, self._gateway.sent) if self._gateway is not None else (0, 0)

    def close_gateway(self) -> None:
        """Idempotent. Needed by itself only if the actor never ran."""
        if self._gateway is not None:
            self._gateway.close()

    # From workers

    def _on_frame(self, identity: bytes, message: Message) -> None:
        """A reply goes straight to the handle of the worker that gave it, everything else through the mailbox."""
        if self.ended:
            return
        member = self._members.at(identity)
        if member is None or not _is_reply(message):
            self.deliver(FrameArrived(identity, message))
            return
        try:
            member.worker.on_reply(message)
        except BaseException as error:
            self.fail(error)

    def _on_message(self, identity: bytes, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self._on_heartbeat(identity, message)
            return
        if isinstance(message, Hello):
            self._on_hello(identity, message)
            return
        member = self._members.at(identity)
        if member is None:
            return  # it was dropped, or never said Hello
        worker = member.worker
        match message:
            case Failed(0, _, _, reason):
                reason = reason[:_MAX_REASON_CHARS]
                self._members.failed(worker.hello, reason)
                log.error("a worker cannot serve", worker=str(worker), reason=reason)
                self._drop(worker)
            case Failed(_, _, "draining", _) | Goodbye():
                log.info("worker leaves", worker=str(worker))
                worker.leaving = True
                self._drop(worker)
            case Ready():
                self._on_ready_message(worker, message)
            case Preparing(what, done_permille):
                self._on_preparing_message(member, what, done_permille)
            case _:
                worker.fault(f"{type(message).__name__} is not for an orchestrator")

    def _on_heartbeat(self, identity: bytes, beat: Heartbeat) -> None:
        known = self._members.of(beat.incarnation)
        if known is not None:
            known.heard_s = time.monotonic()
            self._send(identity, beat)
        else:
            unknown = Goodbye("it is not known here", again=True)
            self._send(identity, self._members.farewell_to(beat.incarnation) or unknown)

    def _on_hello(self, identity: bytes, hello: Hello) -> None:
        known = self._members.at(identity) or self._members.of(hello.incarnation)
        if known is not None:
            same = known.worker.identity == identity and known.worker.hello.incarnation == hello.incarnation
            if same and known.worker.ready is None:
                known.heard_s = time.monotonic()
                self._greet(known)  # our first answer may have been lost with its connection
            return
        if (farewell := self._members.farewell_to(hello.incarnation)) is not None:
            self._send(identity, farewell)
            return
        if self._goodbye_said:
            return  # it is for the next orchestrator
        if self._members.loading >= MAX_LOADING:
            return  # it says Hello again
        if len(self._members) >= MAX_WORKERS:
            self._refuse(identity, hello, f"there are {MAX_WORKERS} workers already")
            return
        workers = self.workers
        kinds = [worker.kind for worker in workers if worker.role == "drafter"]
        assignment = assign(self._config, hello, targets=len(workers) - len(kinds), kinds=kinds)
        if isinstance(assignment, str):
            self._refuse(identity, hello, assignment)
            return
        config = self._config
        worker = WorkerHandle(
            self._next_number, identity, hello, assignment.role,
            lambda message: self._send_to(member, message),
            patience_s=config.silence_ms / 2e3,
            on_useless=lambda reason: self.tell(FoundUseless(worker, reason), control=True),
            kind=assignment.kind,
            occupies_device=assignment.occupies_device,
        )  # fmt: skip
        welcome = Welcome(
            PROTOCOL_VERSION, assignment.role, assignment.engine, assignment.model,
            {**assignment.options, "calibrate": config.calibrate}, config.heartbeat_ms,
            config.silence_ms * _WORKERS_PATIENCE,
        )  # fmt: skip
        now_s = time.monotonic()
        member = Member(worker, welcome, now_s, now_s, now_s)
        self._next_number += 1
        self._members.add(member)
        log.info("worker arrives", worker=str(worker), engine=assignment.engine, model=assignment.model)
        self._greet(member)

    def _greet(self, member: Member) -> None:
        now_s = time.monotonic()
        member.greet_again_s = now_s + max(self._config.silence_ms / 1e3, now_s - member.since_s)
        self._send_to(member, member.welcome)

    def _refuse(self, identity: bytes, hello: Hello, reason: str) -> None:
        reason = reason[:_MAX_REASON_CHARS]  # it may quote what the peer said
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:  # the 1st, 2nd, 4th, 8th: a flood stays readable
            log.warning("worker refused", device=hello.device, pid=hello.process, reason=reason, so_far=self.refused)
        self._members.failed(hello, reason)
        self._send(identity, Goodbye(reason))

    def _on_preparing_message(self, member: Member, what: str, done_permille: int) -> None:
        """It fetches what it will load. However long that takes, only what comes then is loading."""
        worker = member.worker
        if worker.ready is None:
            member.heard_s = member.since_s = time.monotonic()
            worker.preparing = what[:_MAX_REASON_CHARS]
            self._on_preparing(worker, min(done_permille, 1000) / 1000)

    def _on_ready_message(self, worker: WorkerHandle, ready: Ready) -> None:
        if worker.ready is not None:
            return
        worker.ready = ready
        worker.preparing = ""
        self._doorkeeper.trust(worker.identity)
        if worker.role == "target" and not self._compatibility.known:
            self._compatibility.target_is(ready)
            for other in self.workers:
                if other.ready is not None:
                    self._admit(other, other.ready)
        elif self._compatibility.known:
            self._admit(worker, ready)

    def _admit(self, worker: WorkerHandle, ready: Ready) -> None:
        """Use a ready worker, if it is like those that are used."""
        if (reason := self._compatibility.why_not(worker, ready, time.monotonic())) is None:
            log.info("worker ready", worker=str(worker), load_ms=ready.load_ms)
            self._on_ready(worker)
            return
        worker.incompatible = True
        self._members.failed(worker.hello, reason)
        log.error("worker refused", worker=str(worker), reason=reason)
        self._drop(worker, Goodbye(reason))

    # Comings and goings

    def _look_after_workers(self, now_s: float) -> None:
        for member in self._members:
            worker = member.worker
            # A heart may beat where messages were lost, or where the loop hangs. A request that takes too long is
            # cancelled, and a worker that does not even answer that is taken for dead.
            if member.unreachable_s is not None:  # an idle one is told nothing by which we would learn that it is back
                self._send_to(member, Heartbeat(worker.hello.incarnation, 0))
            worker.cancel_overdue(now_s - self._config.request_timeout_s)
            worker.ask_again(now_s)
            if (reason := member.why_dead(now_s, self._config)) is not None:
                log.warning("worker taken for dead", worker=str(worker), reason=reason)
                self._drop(worker, Goodbye(reason, again=True))
            elif worker.ready is None and now_s > member.greet_again_s:
                self._greet(member)

    def _forgive(self, late_s: float, now_s: float) -> None:
        log.warning("this process stood still", late_ms=round(late_s * 1e3))
        for member in self._members:
            member.heard_s = min(now_s, member.heard_s + late_s)
            member.since_s = min(now_s, member.since_s + late_s)
            if member.unreachable_s is not None:  # the connection could not come back meanwhile
                member.unreachable_s = min(now_s, member.unreachable_s + late_s)
            member.worker.forgive(late_s, now_s)

    def drop_incarnation(self, incarnation: int) -> None:
        """The local process of this incarnation has ended."""
        member = self._members.of(incarnation)
        if member is not None:
            self._drop(member.worker)

    def _drop(self, worker: WorkerHandle, farewell: Goodbye | None = None) -> None:
        """Use the worker no more, and tell it so unless it left by itself."""
        if worker.lost:
            return
        self._members.dismiss(worker, farewell or Goodbye("it left"))
        self._compatibility.left(worker, time.monotonic())
        self._doorkeeper.forget(worker.identity)
        self._on_lost(worker)  # and so fenced, before it hears of it
        if farewell is not None:
            self._send(worker.identity, farewell)
        worker.on_lost()

    def _send(self, identity: bytes, message: FromOrchestrator) -> bool:
        assert self._gateway is not None
        try:
            self._gateway.send(identity, message)
        except PeerGone:
            return False
        return True

    def _send_to(self, member: Member, message: FromOrchestrator) -> None:
        """What cannot be sent is lost, as messages may be: the worker is asked again if its connection comes back."""
        if self._send(member.worker.identity, message):
            member.unreachable_s = None
        elif member.unreachable_s is None:
            member.unreachable_s = time.monotonic()
            log.info("worker unreachable", worker=str(member.worker))


def _is_reply(message: Message) -> TypeGuard[Reply]:
    """Whether it answers a request. Failed may speak of the worker itself."""
    if isinstance(message, Failed):
        return message.generation > 0 and message.code != "draining"
    return isinstance(message, Verified | Drafted | Scored | Cancelled | NeedPrefix)

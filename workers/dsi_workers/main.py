"""A worker process from start to end: say Hello, be told what to be, load it, serve, say Goodbye.

When its orchestrator goes away, a worker keeps its model and joins again as soon as an orchestrator listens at the same
address, unless it was started with `once` or by a supervisor.
"""

from __future__ import annotations

import gc
import math
import os
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import structlog
import zmq

from dsi_protocol import PROTOCOL_VERSION, Endpoint, EndpointError, Failed, Goodbye, Hello, Ready, Welcome
from dsi_workers.connection import Address, CurveKeys, Heart, Unreachable, WorkSocket, host_name, watch_parent
from dsi_workers.engines import Engine, EngineError, load_engine
from dsi_workers.loop import WorkerLoop
from dsi_workers.models.files import ModelError, Report, unreported
from dsi_workers.prepare_models import NotNeeded, with_own_models

log = structlog.get_logger("dsi.worker")

#: Between two Hellos; and between two looks whether the connection is there, which takes a moment: at first, and later.
_HELLO_INTERVAL_S, _FIRST_LOOK_S = 0.5, 0.005
#: How often a worker that waits for its orchestrator says so.
_PATIENCE_S = 5.0


class WorkerError(Exception):
    """The worker cannot serve: one sentence for whoever started it."""


class OtherEngineWanted(Exception):
    """The orchestrator wants another engine or model than the one that is loaded: a new process must load it, since memory
    is freed for certain only with a process."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What the command line of `python -m dsi_actors.worker` says."""

    endpoint: str
    device: str  # cpu:0, cuda:1, ...
    role: str = "auto"
    engine: str = "auto"
    model: str = ""
    #: A supervisor holds our standard input: exit when it closes.
    supervised: bool = False
    #: End with the orchestrator, instead of waiting for the next one.
    once: bool = False
    #: The number of this start of the process, if somebody chose one that knows us by it.
    incarnation: int | None = None
    keys: CurveKeys | None = None
    #: Shows what is fetched and converted before anything is loaded.
    progress: Callable[[], AbstractContextManager[Report]] = lambda: nullcontext(unreported)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An engine, and the Welcome that asked for it."""

    welcome: Welcome
    engine: Engine
    load_ms: int

    def is_as_wanted(self, welcome: Welcome) -> bool:
        had = self.welcome
        return (had.role, had.engine, had.model, had.options) == (
            welcome.role, welcome.engine, welcome.model, welcome.options,
        )  # fmt: skip


_StillNeeded: TypeAlias = Callable[[], bool]


def run_worker(config: WorkerConfig) -> None:
    """Serve until drained, refused, or no longer needed. Raises WorkerError and OtherEngineWanted."""
    parent_gone = watch_parent() if config.supervised else None

    def still_needed() -> bool:
        return parent_gone is None or not parent_gone.is_set()

    incarnation = secrets.randbits(64) if config.incarnation is None else config.incarnation
    loaded: _Loaded | None = None
    again = True
    while again and still_needed():
        loaded, again = _serve_one_orchestrator(config, incarnation, loaded, still_needed)
        incarnation = secrets.randbits(64)


def _serve_one_orchestrator(
    config: WorkerConfig, incarnation: int, loaded: _Loaded | None, still_needed: _StillNeeded
) -> tuple[_Loaded | None, bool]:
    """Returns what is loaded, and whether to wait for the next orchestrator."""
    _wait_for_address(config.endpoint, still_needed)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = Address(config.endpoint, config.keys)
    try:
        socket = WorkSocket(context, address, incarnation, still_needed)
    except zmq.ZMQError as error:
        raise WorkerError(f"cannot connect to {config.endpoint}: {error.strerror}") from None
    try:
        welcome = _introduce(socket, config, incarnation, loaded, still_needed)
        if welcome is None:
            return loaded, False
        heart = Heart(
            context,
            address,
            incarnation=incarnation,
            interval_s=welcome.heartbeat_ms / 1e3,
            silence_s=math.inf if config.supervised else welcome.silence_ms / 1e3,  # the pipe tells of its end
        )
        heart.start()
        if loaded is None:
            loaded = _load(socket, heart, config, welcome, still_needed)
        elif not loaded.is_as_wanted(welcome):
            raise OtherEngineWanted
        return loaded, _serve(socket, heart, config, loaded, still_needed)
    except NotNeeded as told:
        socket.offer(Goodbye("not needed any more"))
        farewell = told.farewell or heart.farewell
        if farewell is None and not heart.gone:  # it was asked to end, or its parent is gone
            return loaded, False
        return loaded, _waits_for_the_next(config, farewell, orderly=told.farewell is not None)
    except Unreachable:
        return loaded, _is_left(config, "takes no messages any more")
    finally:
        socket.close()
        context.term()  # ends the heart, waits until the last message has left or lingered enough


def _is_left(config: WorkerConfig, how: str) -> bool:
    """The orchestrator went away. True: wait for the next one. Raises WorkerError if this worker is not to wait."""
    if config.once or config.supervised:
        raise WorkerError(f"the orchestrator at {config.endpoint} {how}: this worker ends")
    log.warning("waiting for the orchestrator to come back, with the model loaded", orchestrator=how)
    return True


def _waits_for_the_next(config: WorkerConfig, farewell: Goodbye | None, *, orderly: bool) -> bool:
    """Whether to wait for the next orchestrator after this one's last word, if it said one. `orderly`: it said so by itself.
    Raises WorkerError."""
    if farewell is None:
        return _is_left(config, "is gone")
    if not farewell.again:
        raise WorkerError(f"the orchestrator at {config.endpoint} dismissed this worker: {farewell.reason}")
    if orderly and (config.once or config.supervised):
        log.info("done", reason=farewell.reason)
        return False
    return _is_left(config, f"dismissed this worker ({farewell.reason})")


def _wait_for_address(text: str, still_needed: Callable[[], bool]) -> None:
    """Wait until the orchestrator's host has an address, or its socket a directory. Raises WorkerError if neither can ever be."""
    try:
        endpoint = Endpoint.parse(text)
    except EndpointError as error:
        raise WorkerError(f"cannot connect to {error}") from None
    if not endpoint.path and (endpoint.port == 0 or endpoint.host == "*"):
        raise WorkerError(f"cannot connect to {text}: name the host and the port where the orchestrator listens")
    complain_at = time.monotonic()
    while still_needed() and (problem := _not_there(endpoint)):
        if time.monotonic() >= complain_at:
            complain_at = time.monotonic() + _PATIENCE_S
            log.warning("no orchestrator yet, still trying", endpoint=text, reason=problem)
        time.sleep(_HELLO_INTERVAL_S)


def _not_there(endpoint: Endpoint) -> str:
    if endpoint.path:
        directory = Path(endpoint.path).parent
        return "" if endpoint.path.startswith("@") or directory.is_dir() else f"there is no directory {directory}"
    return "" if endpoint.ip_version() else f"no address is known for the name {endpoint.host}"


def _introduce(
    socket: WorkSocket, config: WorkerConfig, incarnation: int, loaded: _Loaded | None, still_needed: _StillNeeded
) -> Welcome | None:
    """Say Hello until somebody answers. The orchestrator may not have started yet. None: not needed any more."""
    hello = Hello(
        PROTOCOL_VERSION, incarnation, config.role, config.engine, config.model, config.device, host_name(), os.getpid()
    )
    if loaded is not None and config.role == "auto":
        hello = replace(hello, role=loaded.welcome.role)  # what is loaded can serve at once
    complain_at = time.monotonic() + _PATIENCE_S
    look_s = _FIRST_LOOK_S
    while still_needed():
        sent = socket.offer(hello)
        look_s = _HELLO_INTERVAL_S if sent else min(2 * look_s, _HELLO_INTERVAL_S)
        match socket.receive(look_s):
            case Welcome() as welcome:
                if welcome.version != PROTOCOL_VERSION:
                    reason = (
                        f"the orchestrator speaks protocol version {welcome.version}, this worker {PROTOCOL_VERSION}: "
                        "install the same release on both"
                    )
                    socket.send(Failed(0, 0, "load", reason))
                    raise WorkerError(reason)
                return welcome
            case Goodbye(_, again=True):
                pass  # it ends just now
            case Goodbye(reason) if hello.role != config.role:
                log.info("not wanted in the same role", reason=reason)
                hello = replace(hello, role=config.role)
            case Goodbye(reason):
                raise WorkerError(f"the orchestrator at {config.endpoint} refused this worker: {reason}")
        # One that was let in before is not turned away by a proxy that has nobody behind it for a while.
        if socket.refused(hang_ups_count=loaded is None):
            raise WorkerError(
                f"{config.endpoint} turned this worker away: "
                + ("its key is not allowed there" if config.keys else "it may want a key")
                + " (dsi-actors keys new DIRECTORY NAME makes one, --key FILE takes it)"
            )
        if time.monotonic() > complain_at:
            complain_at = time.monotonic() + _PATIENCE_S
            log.warning("no orchestrator yet, still trying", endpoint=config.endpoint)
    return None


def _load(
    socket: WorkSocket, heart: Heart, config: WorkerConfig, asked: Welcome, still_needed: _StillNeeded
) -> _Loaded:
    """What Welcome asks for. Raises WorkerError and NotNeeded."""
    welcome = asked
    structlog.contextvars.bind_contextvars(role=welcome.role)
    try:
        if not config.supervised:  # whoever supervises us has fetched what we need
            with config.progress() as report:
                welcome = with_own_models(
                    welcome, config.device, socket, lambda: still_needed() and not heart.gone, report
                )
        begun = time.monotonic()
        log.info("loading", engine=welcome.engine, model=welcome.model, device=config.device)
        engine = load_engine(
            welcome.engine,
            role=welcome.role,
            model=welcome.model,
            device=config.device,
            options=welcome.options,
        )
    except NotNeeded:
        raise
    except Exception as error:
        told = isinstance(error, EngineError | ModelError)
        reason = str(error) if told else f"{type(error).__name__}: {error}"
        socket.send(Failed(0, 0, "load", reason[:1000]))
        if told:
            raise WorkerError(reason) from None
        raise
    # What is loaded stays: never looked at again by the garbage collector, neither in the loop nor at exit (0.5 s).
    gc.collect()
    gc.freeze()
    return _Loaded(asked, engine, round((time.monotonic() - begun) * 1e3))


def _serve(socket: WorkSocket, heart: Heart, config: WorkerConfig, loaded: _Loaded, still_needed: _StillNeeded) -> bool:
    """Serve with what is loaded. Returns whether to wait for the next orchestrator. Raises WorkerError."""
    info = loaded.engine.info
    ready = Ready(
        info.vocabulary, info.vocabulary_size, info.max_length, info.window, info.latency_us, info.window_latency_us,
        info.slots, info.batch_latency_us, loaded.load_ms, info.fingerprint,
    )  # fmt: skip
    loop = WorkerLoop(socket, loaded.engine, lambda: still_needed() and not heart.gone, ready)
    before = signal.signal(signal.SIGTERM, lambda *_: loop.drain())
    try:
        socket.send(ready)
        log.info("ready", load_ms=loaded.load_ms, latency_ms=info.latency_us / 1e3)
        loop.run()
    finally:
        signal.signal(signal.SIGTERM, before)
        loop.forget_all()
    if loop.draining or not still_needed():
        socket.offer(Goodbye("done"))
        log.info("done")
        return False
    return _waits_for_the_next(config, loop.farewell or heart.farewell, orderly=loop.farewell is not None)

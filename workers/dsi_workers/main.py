"""The life of a worker process: send Hello, receive role and model in Welcome, load the model, serve, send Goodbye.

When its orchestrator ends, a worker keeps its model loaded and connects to the next orchestrator at the same address. A worker
that was started with `once` or by a supervisor ends instead.
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
from dsi_workers.connection import Address, CurveKeys, HeartbeatThread, Unreachable, WorkSocket, host_name, watch_parent
from dsi_workers.engines import Engine, EngineError, load_engine
from dsi_workers.loop import WorkerLoop
from dsi_workers.models.files import ModelError, Report, unreported
from dsi_workers.prepare_models import NotNeeded, with_local_models

log = structlog.get_logger("dsi.worker")

#: The interval between two Hellos. Until the connection is made, Hello is tried after shorter waits, of which this is the first.
_HELLO_INTERVAL_S, _FIRST_WAIT_S = 0.5, 0.005
#: The interval of warnings while the worker waits for its orchestrator.
_WARN_INTERVAL_S = 5.0


class WorkerError(Exception):
    """The worker cannot serve. The message is one sentence for the user who started it."""


class OtherEngineWanted(Exception):
    """The orchestrator wants a different engine or model than the loaded one.

    A new process must load it: only the end of a process is certain to free all memory.
    """


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The options of `python -m dsi_actors.worker`."""

    endpoint: str
    device: str  # cpu:0, cuda:1, ...
    role: str = "auto"
    engine: str = "auto"
    model: str = ""
    #: The directory of a LoRA adapter for this worker's model; "": the one that the orchestrator names, if it names one.
    adapter: str = ""
    #: A supervisor started this process and holds its standard input: exit when that is closed.
    supervised: bool = False
    #: Fetch and convert models that are not on this machine. False: whoever started this worker has done that.
    fetches_models: bool = True
    #: End with the orchestrator, instead of waiting for the next one.
    once: bool = False
    #: The incarnation number, if a supervisor chose one to recognize this process. None: a random number.
    incarnation: int | None = None
    keys: CurveKeys | None = None
    #: Shows the progress of fetching and converting models.
    progress: Callable[[], AbstractContextManager[Report]] = lambda: nullcontext(unreported)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A loaded engine, and the Welcome that asked for it."""

    welcome: Welcome
    engine: Engine
    load_ms: int

    def matches(self, welcome: Welcome) -> bool:
        """True if `welcome` asks for the engine that is loaded."""
        had = self.welcome
        return (had.role, had.engine, had.model, had.options) == (
            welcome.role, welcome.engine, welcome.model, welcome.options,
        )  # fmt: skip


_StillNeeded: TypeAlias = Callable[[], bool]


def run_worker(config: WorkerConfig) -> None:
    """Serve one orchestrator after another, until drained or no longer needed. Raises WorkerError and OtherEngineWanted."""
    parent_gone = watch_parent() if config.supervised else None

    def still_needed() -> bool:
        return parent_gone is None or not parent_gone.is_set()

    incarnation = secrets.randbits(64) if config.incarnation is None else config.incarnation
    loaded: _Loaded | None = None
    again = True
    try:
        while again and still_needed():
            loaded, again = _serve_one_orchestrator(config, incarnation, loaded, still_needed)
            incarnation = secrets.randbits(64)
    finally:
        if loaded is not None:
            loaded.engine.close()


def _serve_one_orchestrator(
    config: WorkerConfig, incarnation: int, loaded: _Loaded | None, still_needed: _StillNeeded
) -> tuple[_Loaded | None, bool]:
    """Serve one orchestrator. Returns the loaded engine, and whether to wait for the next orchestrator."""
    _wait_for_address(config.endpoint, still_needed)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = Address(config.endpoint, config.keys)
    try:
        socket = WorkSocket(context, address, incarnation, still_needed)
    except zmq.ZMQError as error:
        raise WorkerError(f"cannot connect to {config.endpoint}: {error.strerror}") from None
    try:
        welcome = _say_hello(socket, config, incarnation, loaded, still_needed)
        if welcome is None:
            return loaded, False
        heartbeats = HeartbeatThread(
            context,
            address,
            incarnation=incarnation,
            interval_s=welcome.heartbeat_ms / 1e3,
            silence_s=math.inf if config.supervised else welcome.silence_ms / 1e3,  # a supervisor's end closes the pipe
        )
        heartbeats.start()
        if loaded is None:
            loaded = _load(socket, heartbeats, config, welcome, still_needed)
        elif not loaded.matches(welcome):
            raise OtherEngineWanted
        return loaded, _serve(socket, heartbeats, config, loaded, still_needed)
    except NotNeeded as told:
        socket.try_send(Goodbye("no longer needed"))
        if told.farewell is None and not heartbeats.gone:  # this worker was drained, or its supervisor is gone
            return loaded, False
        return loaded, _should_wait(config, socket, told.farewell, heartbeats)
    except Unreachable:
        return loaded, _orchestrator_gone(config, "does not receive messages any more")
    finally:
        socket.close()
        context.term()  # ends the heartbeat thread, and waits up to _LINGER_MS for the last message


def _orchestrator_gone(config: WorkerConfig, how: str) -> bool:
    """Return True (wait for the next orchestrator), or raise WorkerError if this worker must end with its orchestrator.

    `how`: what happened to the orchestrator, as the end of a sentence.
    """
    if config.once or config.supervised:
        raise WorkerError(f"the orchestrator at {config.endpoint} {how}: this worker ends")
    log.warning("waiting for the orchestrator to come back, with the model loaded", orchestrator=how)
    return True


def _should_wait(config: WorkerConfig, socket: WorkSocket, told: Goodbye | None, heartbeats: HeartbeatThread) -> bool:
    """Return whether to wait for the next orchestrator, after this one has ended. Raises WorkerError.

    `told`: its Goodbye, if one was read. An end is orderly if the orchestrator sent Goodbye unasked, not as the answer to a
    heartbeat.
    """
    if told is None and heartbeats.farewell is not None:  # else the orchestrator is silent, and tells nothing any more
        told = socket.last_goodbye()
    orderly, farewell = told is not None, told or heartbeats.farewell
    if farewell is None:
        return _orchestrator_gone(config, "is gone")
    if not farewell.again:
        raise WorkerError(f"the orchestrator at {config.endpoint} dismissed this worker: {farewell.reason}")
    if orderly and (config.once or config.supervised):
        log.info("done", reason=farewell.reason)
        return False
    return _orchestrator_gone(config, f"dismissed this worker ({farewell.reason})")


def _wait_for_address(text: str, still_needed: Callable[[], bool]) -> None:
    """Wait until the orchestrator's host name can be resolved, or the directory of its socket exists.

    Raises WorkerError if the endpoint is invalid.
    """
    try:
        endpoint = Endpoint.parse(text)
    except EndpointError as error:
        raise WorkerError(f"cannot connect to {error}") from None
    if not endpoint.path and (endpoint.port == 0 or endpoint.host == "*"):
        raise WorkerError(f"cannot connect to {text}: name the host and the port where the orchestrator listens")
    warn_at_s = time.monotonic()
    while still_needed() and (problem := _unreachable_reason(endpoint)):
        if time.monotonic() >= warn_at_s:
            warn_at_s = time.monotonic() + _WARN_INTERVAL_S
            log.warning("no orchestrator yet, still trying", endpoint=text, reason=problem)
        time.sleep(_HELLO_INTERVAL_S)


def _unreachable_reason(endpoint: Endpoint) -> str:
    """Why no connection to the endpoint is possible yet; "" if it may be possible."""
    if endpoint.path:
        directory = Path(endpoint.path).parent
        return "" if endpoint.path.startswith("@") or directory.is_dir() else f"there is no directory {directory}"
    return "" if endpoint.ip_version() else f"no address is known for the name {endpoint.host}"


def _say_hello(
    socket: WorkSocket, config: WorkerConfig, incarnation: int, loaded: _Loaded | None, still_needed: _StillNeeded
) -> Welcome | None:
    """Send Hello until the orchestrator answers, which may not have started yet. Returns None if no longer needed.

    Raises WorkerError if the orchestrator refuses this worker.
    """
    hello = Hello(
        PROTOCOL_VERSION, incarnation, config.role, config.engine, config.model, config.device, host_name(), os.getpid()
    )
    if loaded is not None and config.role == "auto":
        hello = replace(hello, role=loaded.welcome.role)  # the loaded engine can serve at once
    warn_at_s = time.monotonic() + _WARN_INTERVAL_S
    wait_s = _FIRST_WAIT_S
    while still_needed():
        sent = socket.try_send(hello)
        wait_s = _HELLO_INTERVAL_S if sent else min(2 * wait_s, _HELLO_INTERVAL_S)
        match socket.receive(wait_s):
            case Welcome() as welcome:
                if welcome.version != PROTOCOL_VERSION:
                    reason = (
                        f"the orchestrator uses protocol version {welcome.version}, this worker {PROTOCOL_VERSION}: "
                        "install the same release on both"
                    )
                    socket.send(Failed(0, 0, "load", reason))
                    raise WorkerError(reason)
                return welcome
            case Goodbye(_, again=True):
                pass  # this orchestrator is ending: the next one may answer
            case Goodbye(reason) if hello.role != config.role:
                log.info("refused in the role of the loaded model: offering any role", reason=reason)
                hello = replace(hello, role=config.role)
            case Goodbye(reason):
                raise WorkerError(f"the orchestrator at {config.endpoint} refused this worker: {reason}")
        # A worker that was accepted before may meet a proxy without a server for a while. That is not a refusal.
        if socket.is_refused(hang_ups_count=loaded is None):
            raise WorkerError(
                f"{config.endpoint} refused the connection: "
                + ("this worker's key is not allowed there" if config.keys else "the orchestrator may require a key")
                + " (make a key with dsi-actors keys new DIRECTORY NAME, and give it with --key FILE)"
            )
        if time.monotonic() > warn_at_s:
            warn_at_s = time.monotonic() + _WARN_INTERVAL_S
            log.warning("no orchestrator yet, still trying", endpoint=config.endpoint)
    return None


def _load(
    socket: WorkSocket, heartbeats: HeartbeatThread, config: WorkerConfig, asked: Welcome, still_needed: _StillNeeded
) -> _Loaded:
    """Load the engine that Welcome asks for. Raises WorkerError and NotNeeded."""
    welcome = asked
    if config.adapter:
        welcome = replace(welcome, options={**welcome.options, "adapter": config.adapter})
    structlog.contextvars.bind_contextvars(role=welcome.role)
    try:
        if config.fetches_models:
            with config.progress() as report:
                welcome = with_local_models(
                    welcome, config.device, socket, lambda: still_needed() and not heartbeats.gone, report
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
        expected = isinstance(error, EngineError | ModelError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        socket.send(Failed(0, 0, "load", reason[:1000]))
        if expected:
            raise WorkerError(reason) from None
        raise
    # Exclude all loaded objects from garbage collection, in the loop and at exit (where it would take 0.5 s).
    gc.collect()
    gc.freeze()
    return _Loaded(asked, engine, round((time.monotonic() - begun) * 1e3))


def _serve(
    socket: WorkSocket, heartbeats: HeartbeatThread, config: WorkerConfig, loaded: _Loaded, still_needed: _StillNeeded
) -> bool:
    """Serve with the loaded engine. Returns whether to wait for the next orchestrator. Raises WorkerError."""
    info = loaded.engine.info
    ready = Ready(
        info.vocabulary, info.vocabulary_size, info.max_length, info.window, info.latency_us, info.window_latency_us,
        info.slots, info.batch_latency_us, loaded.load_ms, info.fingerprint,
        info.rows, info.devices,
    )  # fmt: skip
    role = loaded.welcome.role
    loop = WorkerLoop(socket, loaded.engine, lambda: still_needed() and not heartbeats.gone, ready, role=role)
    before = signal.signal(signal.SIGTERM, lambda *_: loop.drain())
    try:
        socket.send(ready)
        log.info("ready", load_ms=loaded.load_ms, latency_ms=info.latency_us / 1e3)
        loop.run()
    finally:
        signal.signal(signal.SIGTERM, before)
        loop.forget_all()
    if loop.draining or not still_needed():
        socket.try_send(Goodbye("done"))
        log.info("done")
        return False
    return _should_wait(config, socket, loop.farewell, heartbeats)

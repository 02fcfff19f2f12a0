"""A worker process from start to end: say Hello, be told what to be, load it, serve, say Goodbye."""

from __future__ import annotations

import gc
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import structlog
import zmq

from dsi_protocol import PROTOCOL_VERSION, Failed, Goodbye, Hello, Ready, Welcome
from dsi_workers.connection import Address, CurveKeys, Heart, Unreachable, WorkSocket, host_name, watch_parent
from dsi_workers.engines import EngineError, load_engine
from dsi_workers.loop import WorkerLoop
from dsi_workers.model_files import ModelError, Report, unreported
from dsi_workers.own_models import NotNeeded, with_own_models

log = structlog.get_logger("dsi.worker")

#: Between two Hellos; and between two looks whether the connection is there, which takes a moment: at first, and later.
_HELLO_INTERVAL_S, _FIRST_LOOK_S = 0.5, 0.005
_PATIENCE_S = 5.0  # how often a worker that waits for its orchestrator says so


class WorkerError(Exception):
    """The worker cannot serve: one sentence for whoever started it."""


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
    #: The number of this start of the process, if somebody chose one that knows us by it.
    incarnation: int | None = None
    keys: CurveKeys | None = None
    #: Shows what is fetched and converted before anything is loaded.
    progress: Callable[[], AbstractContextManager[Report]] = lambda: nullcontext(unreported)


def run_worker(config: WorkerConfig) -> None:
    """Serve until drained, dismissed, or left alone. Raises WorkerError."""
    parent_gone = watch_parent() if config.supervised else None

    def still_needed() -> bool:
        return parent_gone is None or not parent_gone.is_set()

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    incarnation = secrets.randbits(64) if config.incarnation is None else config.incarnation
    address = Address(config.endpoint, config.keys)
    try:
        socket = WorkSocket(context, address, incarnation, still_needed)
    except zmq.ZMQError as error:
        raise WorkerError(f"cannot connect to {config.endpoint}: {error.strerror}") from None
    try:
        welcome = _introduce(socket, config, incarnation, still_needed)
        if welcome is not None:
            heart = Heart(
                context,
                address,
                incarnation=incarnation,
                interval_s=welcome.heartbeat_ms / 1e3,
                silence_s=welcome.silence_ms / 1e3,
            )
            heart.start()
            _serve(socket, heart, config, welcome, still_needed)
    except Unreachable:
        raise WorkerError(
            f"the orchestrator at {config.endpoint} takes no messages any more: this worker ends"
        ) from None
    finally:
        socket.close()
        context.term()  # ends the heart, waits until the last message has left or lingered enough


def _introduce(
    socket: WorkSocket, config: WorkerConfig, incarnation: int, still_needed: Callable[[], bool]
) -> Welcome | None:
    """Say Hello until somebody answers. The orchestrator may not have started yet."""
    hello = Hello(
        PROTOCOL_VERSION, incarnation, config.role, config.engine, config.model, config.device, host_name(), os.getpid()
    )
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
            case Goodbye(reason):
                raise WorkerError(f"the orchestrator at {config.endpoint} refused this worker: {reason}")
        if socket.refused():
            raise WorkerError(
                f"{config.endpoint} turned this worker away: "
                + ("its key is not allowed there" if config.keys else "it may want a key")
                + " (dsi-actors keys new DIRECTORY NAME makes one, --key FILE takes it)"
            )
        if time.monotonic() > complain_at:
            complain_at = time.monotonic() + _PATIENCE_S
            log.warning("no orchestrator yet, still trying", endpoint=config.endpoint)
    return None


def _serve(
    socket: WorkSocket, heart: Heart, config: WorkerConfig, welcome: Welcome, still_needed: Callable[[], bool]
) -> None:
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
    except NotNeeded as error:
        socket.offer(Goodbye("not needed any more"))
        if why := str(error) or heart.gone:
            raise WorkerError(f"the orchestrator at {config.endpoint} {why}: this worker ends") from None
        return
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
    info = engine.info
    load_ms = round((time.monotonic() - begun) * 1e3)
    ready = Ready(
        info.vocabulary, info.vocabulary_size, info.max_length, info.window, info.latency_us, info.window_latency_us,
        info.slots, info.batch_latency_us, load_ms, info.fingerprint,
    )  # fmt: skip
    loop = WorkerLoop(socket, engine, lambda: still_needed() and not heart.gone, ready)
    signal.signal(signal.SIGTERM, lambda *_: loop.drain())
    socket.send(ready)
    log.info("ready", load_ms=load_ms, latency_ms=info.latency_us / 1e3)
    loop.run()
    if heart.gone and not loop.draining:
        raise WorkerError(f"the orchestrator at {config.endpoint} {heart.gone}: this worker ends")
    socket.offer(Goodbye("done"))
    log.info("done")


def configure_logging(level: str, form: str = "text") -> None:
    """Logs go to standard error, one line each: text for people, or a JSON object."""
    ending: list[structlog.typing.Processor]
    if form == "json":
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")
        ending = [stamp, structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    else:
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S.%f")
        ending = [stamp, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            *ending,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # A line in one piece: several processes write to the same standard error.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )

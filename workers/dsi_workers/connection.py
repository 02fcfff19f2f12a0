"""The worker's two sockets: one for work, owned by the main thread, one for heartbeats, owned by a thread of its own.

A heartbeat names the worker's incarnation and so may come over any connection. A separate socket keeps it going while
the main thread computes, without any lock: a ZMQ socket belongs to one thread.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import zmq
from zmq.utils.monitor import recv_monitor_message

from dsi_protocol import (
    MAX_FRAME_BYTES,
    Endpoint,
    FromWorker,
    Goodbye,
    Heartbeat,
    Message,
    ProtocolError,
    UnknownMessage,
    decode,
    encode,
)

log = structlog.get_logger("dsi.worker")

_SEND_TIMEOUT_MS = 100
_RECONNECT_PATIENCE_S = 5.0
_LINGER_MS = 200  # how long a last message may take to leave at the end
#: ZeroMQ asks the other process for a sign of life so often, and takes the connection for broken after so long without one.
_PING_MS, _PING_TIMEOUT_MS = 1_000, 10_000
#: An orchestrator that is connected may leave heartbeats unanswered for so many times as long as one that is not.
_BUSY_FACTOR = 12


_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
#: Whoever is there hung up: one that wants a key does so, and a proxy in front of nobody, too.
_HUNG_UP = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
#: Within seconds, since a connection is tried again after 0.1 to 1 s.
_MOST_HANG_UPS = 10


class Unreachable(Exception):
    """The orchestrator takes no messages."""


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """What proves to the orchestrator who we are, and to us who it is. Each is 40 characters of Z85."""

    orchestrator: str
    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Address:
    """Where the orchestrator listens, and the keys if it wants some."""

    endpoint: str
    keys: CurveKeys | None = None


class WorkSocket:
    """The DEALER that speaks the protocol. Frames that cannot be decoded are logged and dropped."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: Address,
        incarnation: int,
        still_needed: Callable[[], bool],
    ) -> None:
        self._still_needed = still_needed
        # The routing id outlives a broken connection: after reconnecting this is still the same worker.
        self._socket = _dealer(context, address, b"w" + incarnation.to_bytes(8, "little"))
        self._monitor = self._socket.get_monitor_socket(_REFUSED | _HUNG_UP)
        self._hang_ups = 0
        #: Signals that something may have come since recv() last said that nothing is there.
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._refused = 0

    def send(self, message: FromWorker) -> None:
        """Waits for a broken connection to come back; raises Unreachable if it does not, or nobody needs us any more."""
        deadline_s = time.monotonic() + _RECONNECT_PATIENCE_S
        frame = encode(message)
        while True:
            try:
                return self._socket.send(frame)
            except zmq.Again:
                if time.monotonic() > deadline_s or not self._still_needed():
                    raise Unreachable from None

    def offer(self, message: FromWorker) -> bool:
        """Send if somebody is connected, else do nothing; whether it was sent."""
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        """The next message, or None if none comes within `timeout_s`."""
        deadline_s = time.perf_counter() + timeout_s
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                left_s = deadline_s - time.perf_counter() if timeout_s else 0.0
                if left_s <= 0:
                    return None
                select.select([self._descriptor], [], [], left_s)  # poll() would count whole milliseconds
                continue
            try:
                return decode(frame)
            except UnknownMessage as error:
                log.warning("ignored", reason=str(error))
            except ProtocolError as error:
                self._refused += 1
                log.warning("malformed frame dropped", reason=str(error), so_far=self._refused)

    def refused(self, *, hang_ups_count: bool = True) -> bool:
        """Whether the other end turns us away, before any message: the keys do not fit. `hang_ups_count`: so it is, too, where
        it hangs up again and again without a reason."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self._hang_ups += _MOST_HANG_UPS if event & _REFUSED else hang_ups_count
        return self._hang_ups >= _MOST_HANG_UPS

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=_LINGER_MS)


class Heart(threading.Thread):
    """Beats, and sets `gone` when there was no connection for `silence_s`, or when the orchestrator does not know this
    incarnation (any more): then `farewell` is its answer. Ends with the ZMQ context.

    An orchestrator that is connected but does not answer is busy: a program that embeds it may block its event loop for
    long. ZeroMQ's own heartbeats, which a thread of the library answers, end the connection when its process stops. One that
    is busy for very long is taken for gone, too: it may not listen to us any more.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: Address,
        *,
        incarnation: int,
        interval_s: float,
        silence_s: float,
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._context = context
        self._address = address
        self._incarnation = incarnation
        self._interval_s = interval_s
        self._silence_s = silence_s
        self.gone = False
        self.farewell: Goodbye | None = None

    def run(self) -> None:
        dealer = _dealer(self._context, self._address)
        try:
            self._beat(dealer)
        except zmq.ContextTerminated:
            pass  # the main thread is done
        finally:
            dealer.close(linger=0)

    def _beat(self, dealer: zmq.Socket[bytes]) -> None:
        sequence = unsent = unanswered = 0
        next_beat_s = time.monotonic()
        # Counted in beats, not in seconds: while a library loads, this thread may not run for seconds.
        most = self._silence_s / self._interval_s
        while unsent <= most and unanswered <= _BUSY_FACTOR * most:
            now_s = time.monotonic()
            if now_s >= next_beat_s:
                sequence += 1
                next_beat_s = now_s + self._interval_s
                try:
                    dealer.send(encode(Heartbeat(self._incarnation, sequence)), zmq.NOBLOCK)
                    unsent = 0
                    unanswered += 1
                except zmq.Again:
                    unsent += 1
            if dealer.poll(max(1, round((next_beat_s - now_s) * 1e3))):
                answer = _understood(dealer.recv())
                if isinstance(answer, Goodbye):
                    self.farewell = answer
                    break
                unanswered = 0
        self.gone = True


def watch_parent() -> threading.Event:
    """Set once standard input is closed. A supervisor holds the other end of that pipe, and so it ends with it."""
    gone = threading.Event()

    def wait_for_end() -> None:
        while os.read(0, 1024):
            pass
        gone.set()

    threading.Thread(target=wait_for_end, name="parent", daemon=True).start()
    return gone


def host_name() -> str:
    return socket.gethostname()[:255]


def _understood(frame: bytes) -> Message | None:
    try:
        return decode(frame)
    except ProtocolError:
        return None


def _dealer(
    context: zmq.Context[zmq.Socket[bytes]], address: Address, routing_id: bytes | None = None
) -> zmq.Socket[bytes]:
    dealer = context.socket(zmq.DEALER)
    if address.keys is not None:
        dealer.curve_serverkey = address.keys.orchestrator.encode()
        dealer.curve_publickey = address.keys.public.encode()
        dealer.curve_secretkey = address.keys.secret.encode()
    if routing_id is not None:
        dealer.setsockopt(zmq.ROUTING_ID, routing_id)
    dealer.setsockopt(zmq.IPV6, Endpoint.parse(address.endpoint).ip_version() == 6)
    dealer.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    dealer.setsockopt(zmq.LINGER, _LINGER_MS)
    dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for an orchestrator that is not there
    dealer.setsockopt(zmq.SNDTIMEO, _SEND_TIMEOUT_MS)
    dealer.setsockopt(zmq.RECONNECT_IVL, 100)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    dealer.setsockopt(zmq.HEARTBEAT_IVL, _PING_MS)
    dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, _PING_TIMEOUT_MS)
    dealer.connect(address.endpoint)
    return dealer

"""The worker's two sockets: one for requests, used by the main thread, and one for heartbeats, used by a separate thread.

With a thread of its own, heartbeats continue while the main thread computes. A ZMQ socket may be used by one thread only, so
that thread has its own socket. A heartbeat names the worker's incarnation, so it may come over any connection.
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
#: How much later than its answer to a heartbeat an orchestrator's Goodbye may be received. They come over two connections.
_LAST_WORD_S = 1.0
#: How long closing a socket may take to send its last message.
_LINGER_MS = 200
#: ZeroMQ pings the other process at this interval, and closes the connection after this time without an answer.
_PING_MS, _PING_TIMEOUT_MS = 1_000, 10_000
#: A connected orchestrator that does not answer heartbeats is considered gone after `_BUSY_FACTOR` times the silence that is
#: allowed without a connection.
_BUSY_FACTOR = 12


#: Socket events: the orchestrator rejected our keys, or our protocol.
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
#: Socket event: the connection was closed during the handshake. An orchestrator that requires a key does this. A proxy without a
#: server behind it does so, too.
_HUNG_UP = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
#: After this many closed handshakes, the orchestrator is taken to refuse this worker. That is after seconds: ZeroMQ reconnects
#: after 0.1 to 1 s.
_MOST_HANG_UPS = 10


class Unreachable(Exception):
    """A message could not be sent: the connection to the orchestrator is broken, or its queue stays full."""


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The CURVE keys of this worker, and the orchestrator's public key. Each is 40 characters of Z85."""

    orchestrator: str
    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Address:
    """The orchestrator's endpoint, and the keys if it requires them."""

    endpoint: str
    keys: CurveKeys | None = None


class WorkSocket:
    """The DEALER socket for protocol messages. Frames that cannot be decoded are logged and dropped."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: Address,
        incarnation: int,
        still_needed: Callable[[], bool],
    ) -> None:
        self._still_needed = still_needed
        # The routing id stays the same when the connection is replaced, so the orchestrator recognizes this worker.
        self._socket = _dealer(context, address, b"w" + incarnation.to_bytes(8, "little"))
        # Before the connection: ZeroMQ tells of a refusal once, and may not try again.
        self._monitor = self._socket.get_monitor_socket(_REFUSED | _HUNG_UP)
        self._socket.connect(address.endpoint)
        self._hang_up_points = 0
        #: Becomes readable when a message may have arrived since recv() last raised Again.
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._malformed_frames = 0

    def send(self, message: FromWorker) -> None:
        """Send a message. If the connection is broken, wait for a new one.

        Raises Unreachable after `_RECONNECT_PATIENCE_S`, or as soon as this worker is no longer needed.
        """
        deadline_s = time.monotonic() + _RECONNECT_PATIENCE_S
        frame = encode(message)
        while True:
            try:
                return self._socket.send(frame)
            except zmq.Again:
                if time.monotonic() > deadline_s or not self._still_needed():
                    raise Unreachable from None

    def try_send(self, message: FromWorker) -> bool:
        """Send a message if there is a connection. Returns whether the message was sent."""
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        """Return the next message, or None if none arrives within `timeout_s`."""
        deadline_s = time.perf_counter() + timeout_s
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                left_s = deadline_s - time.perf_counter() if timeout_s else 0.0
                if left_s <= 0:
                    return None
                select.select([self._descriptor], [], [], left_s)  # zmq's poll() has a resolution of 1 ms
                continue
            try:
                return decode(frame)
            except UnknownMessage as error:
                log.warning("unknown message ignored", reason=str(error))
            except ProtocolError as error:
                self._malformed_frames += 1
                log.warning("malformed frame dropped", reason=str(error), so_far=self._malformed_frames)

    def last_goodbye(self) -> Goodbye | None:
        """Return a Goodbye that is here, or arrives within `_LAST_WORD_S`. All other messages are dropped.

        For the end of an orchestrator. The heartbeat thread may hear of the end before this socket is read.
        """
        deadline_s = time.monotonic() + _LAST_WORD_S
        while (left_s := deadline_s - time.monotonic()) > 0 and (message := self.receive(left_s)) is not None:
            if isinstance(message, Goodbye):
                return message
        return None

    def is_refused(self, *, hang_ups_count: bool = True) -> bool:
        """Return whether the orchestrator refuses the connection, because of the keys.

        With `hang_ups_count`, closing the handshake again and again without a reason counts as a refusal, too.
        """
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self._hang_up_points += _MOST_HANG_UPS if event & _REFUSED else hang_ups_count
        return self._hang_up_points >= _MOST_HANG_UPS

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=_LINGER_MS)


class HeartbeatThread(threading.Thread):
    """A thread that sends heartbeats, and sets `gone` when the orchestrator is gone. It ends with the ZMQ context.

    The orchestrator is gone if there was no connection for `silence_s`, or if it answers with Goodbye, because it does not know
    this incarnation. Then `farewell` is that Goodbye.

    A connected orchestrator that does not answer is busy: the program that embeds it may block its event loop for a long time.
    (If its process stops, ZeroMQ's own pings close the connection; a thread of ZeroMQ answers them.) After `_BUSY_FACTOR` times
    `silence_s` without an answer, it counts as gone as well.
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
        dealer.connect(self._address.endpoint)
        try:
            self._beat(dealer)
        except zmq.ContextTerminated:
            pass  # the main thread has closed the context
        finally:
            dealer.close(linger=0)

    def _beat(self, dealer: zmq.Socket[bytes]) -> None:
        sequence = unsent = unanswered = 0
        next_beat_s = time.monotonic()
        # Silence is counted in heartbeats, not in seconds: while a library is imported, this thread may stop for seconds.
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
                answer = _decode_or_none(dealer.recv())
                if isinstance(answer, Goodbye):
                    self.farewell = answer
                    break
                unanswered = 0
        self.gone = True


def watch_parent() -> threading.Event:
    """Return an event that is set once standard input is closed.

    A supervisor holds the other end of that pipe, so the pipe closes when the supervisor's process ends.
    """
    gone = threading.Event()

    def wait_for_end() -> None:
        while os.read(0, 1024):
            pass
        gone.set()

    threading.Thread(target=wait_for_end, name="parent", daemon=True).start()
    return gone


def host_name() -> str:
    return socket.gethostname()[:255]


def _decode_or_none(frame: bytes) -> Message | None:
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
    dealer.setsockopt(zmq.IMMEDIATE, 1)  # without a connection, messages are not queued
    dealer.setsockopt(zmq.SNDTIMEO, _SEND_TIMEOUT_MS)
    dealer.setsockopt(zmq.RECONNECT_IVL, 100)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    dealer.setsockopt(zmq.HEARTBEAT_IVL, _PING_MS)
    dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, _PING_TIMEOUT_MS)
    return dealer

"""The one place that knows ZMQ: a ROUTER socket, decoded messages in, encoded messages out.

The socket is read by a callback on its file descriptor, not through zmq.asyncio: no task and no future per frame. The
descriptor is edge-triggered, so after every read and every send the socket is asked whether more is there.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import zmq
from zmq.auth.asyncio import AsyncioAuthenticator

from dsi_actors.errors import ConfigError
from dsi_actors.keys import AllowedKeys
from dsi_actors.logs import get_logger
from dsi_actors.transport.contexts import end_context
from dsi_protocol import (
    MAX_REPLY_FRAME_BYTES,
    Endpoint,
    EndpointError,
    FromOrchestrator,
    Message,
    ProtocolError,
    decode,
    encode,
)

log = get_logger("gateway")

#: Frames taken in one go before the event loop gets its turn.
_FRAMES_PER_TURN = 256
#: Under a flood of frames from strangers: so many in one go, and then a pause. ZeroMQ takes them from its peers in turn, so
#: that workers are heard all the same.
_FRAMES_PER_TURN_IN_A_FLOOD = 32
_FLOOD_PAUSE_S = 0.001
_MAX_IDENTITY_BYTES = 255
#: Messages that may wait for us from each peer, and for each peer from us. The first bounds what a peer can make us hold:
#: what is over it stays with the peer.
_RECEIVE_HIGH_WATER_MARK = 128
_SEND_HIGH_WATER_MARK = 1000
_STRANGER_HANDSHAKE_MS = 5000
#: As plain integers: combining zmq's enumerations for each frame takes microseconds.
_NOBLOCK, _NOBLOCK_MORE, _POLLIN = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)


class PeerGone(Exception):
    """The peer is not connected, or takes no more frames."""


class Gateway:
    """`on_message(identity, message)` is called for every good frame. Bad frames are counted, logged and dropped.

    `lets_in(identity, size_bytes)` is asked before a frame is decoded. With a keyring only peers with an allowed key can
    connect, and are heard only as long as it is allowed.
    """

    def __init__(
        self,
        endpoint: str,
        on_message: Callable[[bytes, Message], None],
        lets_in: Callable[[bytes, int], bool] = lambda identity, size_bytes: True,
        on_malformed: Callable[[bytes, str], None] = lambda identity, reason: None,
        keyring: AllowedKeys | None = None,
    ) -> None:
        self._on_message = on_message
        self._lets_in = lets_in
        self._on_malformed = on_malformed
        self._keyring = keyring
        self._authenticator: AsyncioAuthenticator | None = None
        where = _free(endpoint)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unreachable peer is an error, not silence
        self._socket.setsockopt(zmq.IPV6, where.ip_version() == 6)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a worker that reconnects keeps its identity
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY_FRAME_BYTES)
        self._socket.setsockopt(zmq.LINGER, 100)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _STRANGER_HANDSHAKE_MS)
        self._socket.setsockopt(zmq.RCVHWM, _RECEIVE_HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.SNDHWM, _SEND_HIGH_WATER_MARK)
        if keyring is not None:
            self._authenticator = AsyncioAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback("*", keyring)
            self._socket.curve_server = True
            self._socket.curve_publickey = keyring.public.encode()
            self._socket.curve_secretkey = keyring.secret.encode()
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._stop_authenticator()
            end_context(self._context, linger_ms=0)
            raise ConfigError(f"cannot listen on {endpoint}: {_problem(where, error)}") from None
        #: The endpoint with the port that was chosen, if the configuration left that open.
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.malformed_frames = 0
        #: Messages that were handed on, and that were sent, so far.
        self.received = self.sent = 0
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._on_readable)
        #: Whether a look at the socket is due in the loop.
        self._look_again = False
        #: Whether frames are being read.
        self._reading = False
        self._paused = False
        self._closed = False

    def send(self, identity: bytes, message: FromOrchestrator) -> None:
        """Hand the message to ZMQ. Never waits. Raises PeerGone."""
        self.send_frame(identity, encode(message))

    def send_frame(self, identity: bytes, frame: bytes) -> None:
        """The same for what is encoded already, or is no message at all."""
        if self._closed:
            raise PeerGone
        try:
            self._socket.send(identity, _NOBLOCK_MORE)
            self._socket.send(frame, _NOBLOCK)
            self.sent += 1
        except zmq.ZMQError as error:  # EHOSTUNREACH: not connected; EAGAIN: its queue of a thousand frames is full
            raise PeerGone(error.strerror) from None
        finally:
            self._look_soon()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._descriptor)
            self._stop_authenticator()
            end_context(self._context, linger_ms=100)

    def _stop_authenticator(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None

    def _look_soon(self) -> None:
        """The descriptor tells of news once only, and sending takes note of them, too. While `_read` runs it sees them itself."""
        if not (self._closed or self._reading or self._look_again or self._paused) and self._readable():
            self._look_again = True
            self._loop.call_soon(self._on_readable)

    def _on_readable(self) -> None:
        if self._paused:
            return
        self._look_again, self._reading = False, True
        all_read = False
        try:
            all_read = self._read()
        finally:
            self._reading = False
            if not all_read:
                self._look_soon()

    def _read(self) -> bool:
        """Hand on the frames that are there, as many as one turn may have. False: there may be more."""
        turned_away = 0
        for _ in range(_FRAMES_PER_TURN):
            if self._closed or not self._readable():
                return True
            turned_away += not self._take()
            if turned_away >= _FRAMES_PER_TURN_IN_A_FLOOD:
                self._paused = True
                self._loop.call_later(_FLOOD_PAUSE_S, self._after_pause)
                return True  # it is looked at again after the pause
        return False

    def _after_pause(self) -> None:
        self._paused = False
        if not self._closed:
            self._on_readable()

    def _readable(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & _POLLIN)

    def _take(self) -> bool:
        """Read one message and hand it on. False if it came from a peer that has no say, and was not looked at."""
        if self._keyring is None:
            frames = self._socket.recv_multipart(_NOBLOCK)
        else:
            parts = self._socket.recv_multipart(_NOBLOCK, copy=False)
            if str(parts[-1].get("User-Id")) not in self._keyring.allowed:
                return False
            frames = [part.bytes for part in parts]
        identity = frames[0]
        if not self._lets_in(identity, sum(map(len, frames))):
            return False
        if len(frames) != 2 or len(identity) > _MAX_IDENTITY_BYTES:
            self._refuse(identity, f"{len(frames)} frames where identity and message are expected")
            return True
        try:
            message = decode(frames[1])
        except ProtocolError as error:
            self._refuse(identity, str(error))
            return True
        self.received += 1
        self._on_message(identity, message)
        return True

    def _refuse(self, identity: bytes, reason: str) -> None:
        self.malformed_frames += 1
        self._on_malformed(identity, reason)
        if self.malformed_frames & (self.malformed_frames - 1) == 0:  # the 1st, 2nd, 4th, 8th: a flood stays readable
            log.warning("malformed frame dropped", peer=identity.hex(), reason=reason, so_far=self.malformed_frames)


def _free(endpoint: str) -> Endpoint:
    """The endpoint, if no other process listens there on a path: ZeroMQ takes a path from whoever has it, also from a file.

    Raises ConfigError."""
    try:
        where = Endpoint.parse(endpoint)
    except EndpointError as error:
        raise ConfigError(f"cannot listen on {error}") from None
    path = Path(where.path)
    if where.path in ("", "*") or where.path.startswith("@") or not os.path.lexists(path):
        return where
    if not path.is_socket():
        raise ConfigError(f"cannot listen on {endpoint}: {path} is no socket: choose a path where nothing is")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        if probe.connect_ex(where.path) in (0, errno.EAGAIN):
            raise ConfigError(f"cannot listen on {endpoint}: another process listens there: choose another path")
    return where  # what a process that ended has left


def _problem(where: Endpoint, error: zmq.ZMQError) -> str:
    match error.errno:
        case errno.EADDRINUSE if where.host:
            return "another process listens there: choose another port"
        case errno.EADDRINUSE:
            return "another process listens there: choose another path"
        case errno.ENODEV:
            return f"this machine has no address, name or network interface {where.host}"
        case errno.EADDRNOTAVAIL:
            return f"{where.host} is no address of this machine (0.0.0.0 stands for all of them, [::] for those of IPv6, too)"
        case errno.ENOENT | errno.ENOTDIR if not Path(where.path).parent.is_dir():
            return f"there is no directory {Path(where.path).parent}: make it first"
        case errno.EACCES if where.host:
            return "this user may not take that port: choose one from 1024 on"
        case errno.EACCES:
            return f"this user may not write in {Path(where.path).parent}: choose another directory"
    return error.strerror

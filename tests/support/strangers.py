"""Peers that are no workers, and what they do to a socket. (Those that flood it: dsi_actors/chaos/strangers.py.)"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import msgpack
import zmq

from dsi_protocol import Heartbeat, encode
from support.patience import limit_s


def giant_frame(endpoint: str) -> None:
    """A greeting as ZMTP wants it, and then a frame that says it has a gigabyte, and some of it."""
    with _raw(endpoint) as peer:
        peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32))
        peer.recv(64)
        ready = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
        peer.sendall(b"\x04" + bytes([len(ready)]) + ready)
        peer.recv(256)
        peer.sendall(b"\x02" + struct.pack(">Q", 1 << 30) + bytes(1 << 16))
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(1 << 16) == b"", "it is disconnected"


@contextmanager
def _raw(endpoint: str) -> Iterator[socket.socket]:
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=limit_s()) as peer:
        yield peer


def half_a_handshake(endpoint: str) -> None:
    for words in (b"\xff", b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE", b"GET / HTTP/1.1\r\n\r\n", bytes(64)):
        with _raw(endpoint) as peer:
            peer.sendall(words)


def strange_frames(endpoint: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.connect(endpoint)
    peer.send(msgpack.packb({"type": 1, "more": [0] * 1_000_000}))
    peer.send(b"\x81\xa4type" + b"\x91" * 30_000)
    peer.send(b"\xdd\xff\xff\xff\xff")
    peer.send_multipart([b"many", b"frames"] * 50)
    peer.send(encode(Heartbeat(1, 1)))
    peer.close(linger=1000)
    context.term()

"""Peers that are no workers, sending as much as one process can: `python -m dsi_actors.chaos.strangers WHAT ENDPOINT SECONDS`."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable

import zmq

from dsi_actors.transport.contexts import end_context
from dsi_protocol import MAX_REPLY_FRAME_BYTES, Hello, encode

_CONNECTIONS = 8
_PAUSE_S = 0.001


def hellos(number: int) -> bytes:
    """Each from another worker that does not exist."""
    return encode(Hello(1, number, "target", "auto", "", "cpu:0", "flood", 1))


def noise(number: int) -> bytes:
    return random.Random(number).randbytes(100)


def large_frames(number: int) -> bytes:
    """As large as they may be."""
    return bytes(MAX_REPLY_FRAME_BYTES)


FRAMES: dict[str, Callable[[int], bytes]] = {"hellos": hellos, "noise": noise, "large frames": large_frames}


def flood(endpoint: str, frame_of: Callable[[int], bytes], seconds: float) -> int:
    """How many frames were sent in that time."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peers = [context.socket(zmq.DEALER) for _ in range(_CONNECTIONS)]
    for peer in peers:
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.SNDHWM, 100)
        peer.connect(endpoint)
    deadline_s, sent = time.monotonic() + seconds, 0
    while time.monotonic() < deadline_s:
        before = sent
        for peer in peers:
            with contextlib.suppress(zmq.Again):
                peer.send(frame_of(sent), zmq.NOBLOCK)
                sent += 1
        if sent == before:
            time.sleep(_PAUSE_S)
    end_context(context, linger_ms=0)
    return sent


def half_handshakes(endpoint: str, seconds: float) -> int:
    """Connections that begin as ZeroMQ's do, and stay there: at most 200 at a time."""
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    deadline_s, made = time.monotonic() + seconds, 0
    open_now: list[socket.socket] = []
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError):
            peer = socket.create_connection((host, int(port)), timeout=1)
            peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01NULL")
            open_now.append(peer)
            made += 1
        if len(open_now) >= 200:
            open_now.pop(0).close()
    for peer in open_now:
        peer.close()
    return made


def _end_with_whoever_started_this() -> None:
    """They hold the other end of standard input."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os._exit(0)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main() -> int:
    _end_with_whoever_started_this()
    what, endpoint, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    sent = flood(endpoint, FRAMES[what], seconds) if what in FRAMES else half_handshakes(endpoint, seconds)
    sys.stdout.write(f"{sent}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A bad network: stands between workers and orchestrator and drops, delays, doubles and reorders whole messages.

Workers connect to its ROUTER; for each peer it connects to the orchestrator with a DEALER of the same routing id. So both
ends see the peers that they would see without it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import zmq

from dsi_actors.transport.contexts import end_context

Disturbance = Literal["drop", "delay", "duplicate", "reorder"]
DISTURBANCES: tuple[Disturbance, ...] = ("drop", "delay", "duplicate", "reorder")

#: While a disturbance lasts, so many of the frames meet it.
_SHARE = 0.3
_DELAY_S = (0.05, 0.6)
_REORDER_S = (0.0, 0.03)
#: A peer that was silent for so long is gone.
_FORGET_S = 300.0
_LOOK_S = 1.0


@dataclass(slots=True)
class _Peer:
    socket: zmq.Socket[bytes]
    descriptor: int
    heard_s: float = field(default_factory=time.monotonic)


class Proxy:
    """`disturb` makes the network bad for a while. Use as an async context manager."""

    def __init__(self, listen: str, orchestrator: str, seed: int) -> None:
        self.endpoint = listen
        #: Frames that met each disturbance.
        self.disturbed: Counter[Disturbance] = Counter()
        self._orchestrator = orchestrator
        self._random = random.Random(seed)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.setsockopt(zmq.LINGER, 0)
        self._front.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._descriptor = int(self._front.getsockopt(zmq.FD))
        self._peers: dict[bytes, _Peer] = {}
        self._disturbance: Disturbance | None = None
        self._until_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._looking: asyncio.TimerHandle | None = None
        self._closed = False

    async def __aenter__(self) -> Proxy:
        self._front.bind(self.endpoint)
        self._loop.add_reader(self._descriptor, self._from_workers)
        self._look()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
        self._loop.remove_reader(self._descriptor)
        for identity in list(self._peers):
            self._forget(identity)
        end_context(self._context, linger_ms=0)

    def disturb(self, disturbance: Disturbance, for_s: float) -> None:
        self._disturbance, self._until_s = disturbance, time.monotonic() + for_s

    def _from_workers(self) -> None:
        while not self._closed and _readable(self._front):
            identity, *frames = self._front.recv_multipart(zmq.NOBLOCK)
            peer = self._peers.get(identity) or self._meet(identity)
            peer.heard_s = time.monotonic()
            self._carry(peer.socket, frames)

    def _to_workers(self, identity: bytes) -> None:
        peer = self._peers.get(identity)
        while peer is not None and _readable(peer.socket):
            self._carry(self._front, [identity, *peer.socket.recv_multipart(zmq.NOBLOCK)])

    def _carry(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        disturbance = self._disturbance if time.monotonic() < self._until_s else None
        if disturbance is None or self._random.random() > _SHARE:
            self._send(socket, frames)
            return
        self.disturbed[disturbance] += 1
        match disturbance:
            case "drop":
                pass
            case "duplicate":
                self._send(socket, frames)
                self._loop.call_later(self._random.uniform(*_REORDER_S), self._send, socket, frames)
            case "delay":
                self._loop.call_later(self._random.uniform(*_DELAY_S), self._send, socket, frames)
            case "reorder":
                self._loop.call_later(self._random.uniform(*_REORDER_S), self._send, socket, frames)

    def _send(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        if not socket.closed:
            try:
                socket.send_multipart(frames, zmq.NOBLOCK)
            except zmq.Again:
                self.disturbed["drop"] += 1
        self._look_again()

    def _look_again(self) -> None:
        """The descriptors tell of news once only, and sending takes note of them, too."""
        if not self._closed:
            self._loop.call_soon(self._read_all)

    def _read_all(self) -> None:
        if not self._closed:
            self._from_workers()
            for identity in list(self._peers):
                self._to_workers(identity)

    def _meet(self, identity: bytes) -> _Peer:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        # A routing id that ZeroMQ itself gave begins with a zero byte, and nobody else may give such a one.
        socket.setsockopt(zmq.ROUTING_ID, identity if identity[:1] != b"\0" else b"p" + identity)
        socket.connect(self._orchestrator)
        peer = _Peer(socket, int(socket.getsockopt(zmq.FD)))
        self._peers[identity] = peer
        self._loop.add_reader(peer.descriptor, self._to_workers, identity)
        return peer

    def _forget(self, identity: bytes) -> None:
        peer = self._peers.pop(identity)
        self._loop.remove_reader(peer.descriptor)
        peer.socket.close(linger=0)

    def _look(self) -> None:
        before_s = time.monotonic() - _FORGET_S
        for identity in [identity for identity, peer in self._peers.items() if peer.heard_s < before_s]:
            self._forget(identity)
        self._look_again()
        self._looking = self._loop.call_later(_LOOK_S, self._look)


def _readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

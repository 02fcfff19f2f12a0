"""The gateway over real sockets: good frames arrive, bad ones are counted and harm nobody."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq

from dsi_actors.errors import ConfigError
from dsi_actors.transport.gateway import Gateway, PeerGone
from dsi_protocol import MAX_REPLY_FRAME_BYTES, Cancel, Goodbye, Heartbeat, Message, encode
from support.patience import until

BEAT = Heartbeat(1, 1)


@dataclass
class Setup:
    gateway: Gateway
    heard: list[tuple[bytes, Message]]
    context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context)
    peers: list[zmq.Socket[bytes]] = field(default_factory=list)

    def peer(self, identity: bytes) -> zmq.Socket[bytes]:
        dealer = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, identity)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(self.gateway.endpoint)
        self.peers.append(dealer)
        return dealer


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    heard: list[tuple[bytes, Message]] = []
    gateway = Gateway("tcp://127.0.0.1:*", lambda identity, message: heard.append((identity, message)))
    made = Setup(gateway, heard)
    yield made
    gateway.close()
    made.context.destroy(linger=0)


async def test_messages_come_and_go(setup: Setup) -> None:
    peer = setup.peer(b"one")
    for attempt in range(600):  # more than one turn takes
        peer.send(encode(Cancel(1, attempt)))
    await until(lambda: len(setup.heard) == 600)
    assert setup.heard == [(b"one", Cancel(1, attempt)) for attempt in range(600)]
    setup.gateway.send(b"one", BEAT)
    setup.gateway.send(b"one", Goodbye("enough"))
    await until(lambda: bool(peer.poll(0)))
    assert [peer.recv(), peer.recv()] == [encode(BEAT), encode(Goodbye("enough"))]


async def test_unknown_peers_are_told_apart(setup: Setup) -> None:
    with pytest.raises(PeerGone):
        setup.gateway.send(b"nobody", BEAT)


async def test_bad_frames_are_dropped_and_the_peer_stays(setup: Setup) -> None:
    peer = setup.peer(b"one")
    for frame in (b"", b"\xc1", b"\xff" * 1000, b"\x81\xa4type\xcc\xc8"):
        peer.send(frame)
    peer.send_multipart([encode(BEAT), encode(BEAT)])
    peer.send(encode(BEAT))
    await until(lambda: bool(setup.heard))
    assert setup.heard == [(b"one", BEAT)]
    assert setup.gateway.malformed_frames == 5


async def test_an_oversized_frame_costs_its_sender_the_connection_only(setup: Setup) -> None:
    good, bad = setup.peer(b"good"), setup.peer(b"bad")
    bad.send(bytes(MAX_REPLY_FRAME_BYTES + 1))
    good.send(encode(BEAT))
    await until(lambda: bool(setup.heard))
    assert setup.heard == [(b"good", BEAT)]
    assert setup.gateway.malformed_frames == 0


async def test_a_port_in_use_is_named(setup: Setup) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on tcp://.*: another process listens there"):
        Gateway(setup.gateway.endpoint, lambda identity, message: None)


@pytest.mark.parametrize(
    ("endpoint", "problem"),
    [
        ("tcp://127.0.0.1:70000", "has the port 70000"),
        ("tcp://192.0.2.1:*", "192.0.2.1 is no address of this machine"),
        ("tcp://no-such-interface:*", "no address, name or network interface no-such-interface"),
        ("ipc:///no/such/place", "there is no directory /no/such: make it first"),
    ],
)
async def test_an_address_that_is_not_ours(endpoint: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Gateway(endpoint, lambda identity, message: None)


async def test_a_path_is_taken_from_nobody(tmp_path: Path) -> None:
    """ZeroMQ itself removes what is there, be it a file or the socket of one that listens."""
    file, path = tmp_path / "notes.txt", tmp_path / "dsi.sock"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"notes.txt is no socket: choose a path where nothing is"):
        Gateway(f"ipc://{file}", lambda identity, message: None)
    assert file.read_text() == "mine"
    first = Gateway(f"ipc://{path}", lambda identity, message: None)
    with pytest.raises(ConfigError, match="another process listens there: choose another path"):
        Gateway(f"ipc://{path}", lambda identity, message: None)
    first.close()
    assert path.is_socket()
    Gateway(f"ipc://{path}", lambda identity, message: None).close()  # what one that has ended left is no hindrance

"""The servers that tests make: a connection that stays open until it is collected fails some later test."""

from __future__ import annotations

import asyncio
import socket
import struct

from support.connections import Relay, listening
from support.patience import until


async def test_a_relay_leaves_no_connection_open_when_one_end_is_reset() -> None:
    ends: list[asyncio.StreamWriter] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(writer)
        while await reader.read(100):
            pass

    async with listening(listen) as there:
        relay = Relay(there)
        async with listening(relay.answer) as address:
            host, port = address.split(":")
            with socket.create_connection((host, int(port))) as peer:
                peer.send(b"x")
                await until(lambda: bool(relay.heard) and relay.heard[0] == b"x")
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it resets it
            await until(lambda: all(writer.is_closing() for writer in relay.writers))
    assert len(ends + relay.writers) == 3
    assert all(writer.get_extra_info("socket").fileno() == -1 for writer in ends + relay.writers)

"""The socket of a worker over a real connection."""

from __future__ import annotations

import pytest
import zmq

from dsi_workers.connection import Address, WorkSocket
from support.patience import wait_until


def test_a_refusal_is_noticed_however_early_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, the connection could be refused before anybody listened to what becomes of it. ZeroMQ does not connect
    again then, and the worker waited for ever."""
    public, secret = zmq.curve_keypair()
    monitor = zmq.Socket.get_monitor_socket

    def before_the_connection(self: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
        assert not self.getsockopt(zmq.LAST_ENDPOINT)
        return monitor(self, events)

    monkeypatch.setattr(zmq.Socket, "get_monitor_socket", before_the_connection)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.curve_server, router.curve_publickey, router.curve_secretkey = True, public, secret
        port = router.bind_to_random_port("tcp://127.0.0.1")
        socket = WorkSocket(context, Address(f"tcp://127.0.0.1:{port}"), 1, lambda: True)
        try:
            wait_until(socket.is_refused)
        finally:
            socket.close()

"""The socket of a worker over a real connection."""

from __future__ import annotations

from typing import cast

import pytest
import zmq

from dsi_protocol import Goodbye, Heartbeat, encode
from dsi_workers import connection
from dsi_workers.connection import Address, HeartbeatThread, WorkSocket
from dsi_workers.main import WorkerConfig, WorkerError, _should_wait
from support.patience import limit_s, wait_until


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


class Gone:
    """A heartbeat thread that has heard of the end."""

    gone, farewell = True, Goodbye("it is not known here", again=True)


@pytest.mark.parametrize("told", [True, False])
def test_an_end_that_the_heartbeat_thread_heard_of_first_is_orderly_all_the_same(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The orchestrator tells both at once. A worker that read its own Goodbye later said that the orchestrator was gone."""
    monkeypatch.setattr(connection, "_LAST_WORD_S", limit_s() if told else 0.01)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        config = WorkerConfig(f"tcp://127.0.0.1:{port}", "cpu:0", once=True)
        socket = WorkSocket(context, Address(config.endpoint), 1, lambda: True)
        try:
            socket.send(Heartbeat(1, 1))
            peer, _ = router.recv_multipart()
            router.send_multipart([peer, encode(Heartbeat(1, 1))])
            if told:
                router.send_multipart([peer, encode(Goodbye("the orchestrator ends", again=True))])
                assert not _should_wait(config, socket, None, cast(HeartbeatThread, Gone()))
            else:
                with pytest.raises(WorkerError, match="it is not known here"):
                    _should_wait(config, socket, None, cast(HeartbeatThread, Gone()))
        finally:
            socket.close()

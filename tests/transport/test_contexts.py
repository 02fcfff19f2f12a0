"""A ZeroMQ context ends although a signal comes meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import zmq

from dsi_actors.transport.contexts import end_context


@pytest.fixture
def alarms() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_no_descriptor_is_left_where_signals_come_meanwhile(alarms: None) -> None:
    """An orchestrator closes while its workers end, each of which sends it a SIGCHLD."""
    before = len(os.listdir("/proc/self/fd"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.connect("ipc:///nowhere/at/all")
    peer.send(b"there is nobody to take it, so that the end takes as long as it may")
    end_context(context, linger_ms=100)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert signal.SIGALRM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "signals come again"

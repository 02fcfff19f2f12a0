"""The end of a ZeroMQ context, its threads and its descriptors."""

from __future__ import annotations

import signal

import zmq


def end_context(context: zmq.Context[zmq.Socket[bytes]], *, linger_ms: int) -> None:
    """Close the sockets of a context and end it; what is still to be sent has so long.

    A signal that comes meanwhile (SIGCHLD, when workers end) has to wait: zmq_ctx_term returns early then, and pyzmq takes the
    context for ended all the same, so that its threads and descriptors would stay.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        context.destroy(linger=linger_ms)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

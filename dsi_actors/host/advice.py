"""Commands that messages tell the reader to type. Each works as it stands, but for the words in capitals."""

from __future__ import annotations

import socket

from dsi_protocol import Endpoint


def worker_command(endpoint: str, *, keys: str | None) -> str:
    """Starts a worker for the orchestrator that listens on `endpoint`."""
    where = Endpoint.parse(endpoint)
    # Nobody connects to "all addresses": this machine's name stands for them.
    reached = f"tcp://{socket.gethostname()}:{where.port}" if where.everywhere else endpoint
    key = "" if keys is None else " --key FILE"
    return f"python -m dsi_actors.worker --gpu N --connect {reached}{key}"

"""Reads requests from standard input, one JSON object per line, for processes that a benchmark starts."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any


def read_requests() -> Iterator[dict[str, Any]]:
    """Start a thread that reads requests, and return an iterator over them.

    When standard input is closed, the process exits at once, even during a computation: the benchmark, which would read the
    answer, has ended.
    """
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, name="requests", daemon=True).start()
    return iter(requests.get, None)

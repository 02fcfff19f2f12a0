"""Requests on standard input, one JSON object in each line, for processes that a benchmark measures or measures against."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any


def read_requests() -> Iterator[dict[str, Any]]:
    """Reads from now on, in a thread. When the input ends, so does this process, in the middle of whatever it computes: whoever
    would have read the answer has ended."""
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, name="requests", daemon=True).start()
    return iter(requests.get, None)

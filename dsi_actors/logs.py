"""Structured logs that end in the standard library's logging, so that an embedding application decides what is shown.

Unconfigured, only warnings and errors appear, on standard error. `show_logs` is for our own command line.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

import structlog


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger named dsi.<name>: `log.info("what happened", key=value)`."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(f"dsi.{name}"),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            _render,
        ],
    )
    return logger


_text = structlog.processors.LogfmtRenderer(key_order=["event"], bool_as_flag=False)


class _Line(str):
    """The line as text, and what it was made of."""

    fields: MutableMapping[str, Any]


def _render(logger: Any, method: str, fields: MutableMapping[str, Any]) -> str:
    line = _Line(_text(logger, method, dict(fields)))
    line.fields = fields
    return line


class _JsonFormatter(logging.Formatter):
    """One JSON object in each line: time, level, logger, event, and whatever the event has, such as the request's id."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record.msg, "fields", None) or {"event": record.getMessage()}
        time = datetime.fromtimestamp(record.created, UTC).isoformat()
        head = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        if record.exc_info:
            head["exception"] = self.formatException(record.exc_info)
        return json.dumps({**head, **fields}, default=str)


def show_logs(level: str, form: str = "text") -> None:
    """Print this package's logs of `level` and above to standard error, one line each: text for people, or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s")
    handler.setFormatter(_JsonFormatter() if form == "json" else text)
    for name in ("dsi", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False

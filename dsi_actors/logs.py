"""Structured logs that end in the standard library's logging, so that an embedding application decides what is shown.

Unconfigured, only warnings and errors appear, on standard error. `show_logs` is for our own command line.
"""

from __future__ import annotations

import logging
import sys

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
            structlog.processors.LogfmtRenderer(key_order=["event"], bool_as_flag=False),
        ],
    )
    return logger


def show_logs(level: str) -> None:
    """Print this package's logs of `level` and above to standard error, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s"))
    logger = logging.getLogger("dsi")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False

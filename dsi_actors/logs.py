"""Structured logs that end in the standard library's logging, so that an embedding application decides what is shown.

Unconfigured, only warnings and errors appear, on standard error. `show_logs` is for our own processes, orchestrators and
workers: their lines have the same format and the same keys.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog
from structlog.stdlib import ProcessorFormatter

#: In each line, since lines of several machines are often read together.
_HOST = socket.gethostname()
_as_text = structlog.processors.LogfmtRenderer(key_order=["event"], bool_as_flag=False)


class _Fields(dict[str, Any]):
    """What a line says. structlog's formatter takes the fields apart, any other formatter gets them as text."""

    def __str__(self) -> str:
        return _as_text(None, "", dict(self))


def _fields(logger: Any, method: str, fields: MutableMapping[str, Any]) -> _Fields:
    return _Fields(fields)


_PROCESSORS: tuple[structlog.typing.Processor, ...] = (
    structlog.stdlib.filter_by_level,
    structlog.contextvars.merge_contextvars,
    structlog.processors.format_exc_info,
    _fields,
    ProcessorFormatter.wrap_for_formatter,
)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger named dsi.<name>: `log.info("what happened", key=value)`."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(f"dsi.{name}"), wrapper_class=structlog.stdlib.BoundLogger, processors=_PROCESSORS
    )
    return logger


def show_logs(level: str, form: Literal["text", "json"] = "text") -> None:
    """Print this package's logs of `level` and above to standard error: text for people, or one JSON object a line.

    Loggers of `structlog.get_logger`, which workers use, end there, too.
    """
    structlog.configure(
        processors=_PROCESSORS,
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(form))
    for name in ("dsi", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


def _formatter(form: Literal["text", "json"]) -> logging.Formatter:
    renderer: structlog.typing.Processor
    if form == "json":
        time = structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")
        renderer = structlog.processors.JSONRenderer(default=str)
    else:
        time = structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S.%f", utc=False, key="time")
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), timestamp_key="time", sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )  # fmt: skip
    return ProcessorFormatter(
        processors=[
            time,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.format_exc_info,  # of other libraries' loggers
            ProcessorFormatter.remove_processors_meta,
            _head_first,
            renderer,
        ]
    )


def _head_first(logger: Any, method: str, fields: MutableMapping[str, Any]) -> dict[str, Any]:
    """What every line has stands at its beginning."""
    fields["host"] = _HOST
    return {name: fields[name] for name in ("time", "level", "logger", "host", "event")} | dict(fields)

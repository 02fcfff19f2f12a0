"""Directories of this user alone that go with the process that made them; where a socket is in one, its path must be short."""

from __future__ import annotations

import os
import tempfile

from dsi_actors.errors import ConfigError
from dsi_protocol import MAX_PATH_BYTES

_PREFIX = "dsi-"
_RANDOM_LETTERS = 8  # of tempfile's


def temporary_directory() -> tempfile.TemporaryDirectory[str]:
    """Raises ConfigError."""
    return _made_in(_default())


def socket_directory(name: str) -> tempfile.TemporaryDirectory[str]:
    """One for a Unix socket called `name`: where temporary files go, or, if its path would be too long or is no text that ZeroMQ
    takes, the user's directory for what runs, or /tmp. Raises ConfigError."""
    default = _default()
    places = [default, os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp"]
    problem = f"the path of a socket in {default} would be over {MAX_PATH_BYTES} bytes"
    for place in filter(os.path.isabs, places):
        path = os.path.join(place, f"{_PREFIX}{'x' * _RANDOM_LETTERS}", name)
        if not path.isprintable() or len(os.fsencode(path)) > MAX_PATH_BYTES:
            continue
        try:
            return _made_in(place)
        except ConfigError as error:
            problem = str(error)
    raise ConfigError(f"there is no place for a socket: {problem}: set TMPDIR to a directory with a short path")


def _default() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        raise ConfigError(
            "no directory for temporary files can be written: make /tmp writable, or set TMPDIR to one that is"
        ) from None


def _made_in(place: str) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place)
    except OSError as error:
        raise ConfigError(f"cannot make a directory in {place} ({error.strerror})") from None

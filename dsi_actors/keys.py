"""Keys for workers on other machines: CurveZMQ, one key file per worker, revoked by removing its public half.

A directory of keys looks like this; only `workers/NAME.key` leaves the orchestrator's machine::

    orchestrator.key     secret: whoever has it can pretend to be this orchestrator
    allowed/NAME.pub     who may connect
    workers/NAME.key     secret: carry it to that worker's machine, then delete it here
"""

from __future__ import annotations

import os
import re
import shlex
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import zmq

from dsi_actors.errors import ConfigError
from dsi_actors.logs import get_logger

log = get_logger("keys")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_KEY = re.compile(r"[!-~]{40}$")
#: How often the directory is looked at. A key is revoked after so long.
_LOOK_S = 1.0


class AllowedKeys(Protocol):
    """What the gateway needs: the orchestrator's own key pair in Z85, and whose keys are allowed now."""

    public: str
    secret: str

    @property
    def allowed(self) -> Mapping[str, str]:
        """Public key → name of the worker."""

    def callback(self, domain: str, key: bytes) -> bool:
        """What zmq.auth asks when a peer connects."""


class MemoryKeyring:
    """Keys of one run, which are on no disk here: for workers that the orchestrator places on other machines by itself."""

    def __init__(self) -> None:
        self.public, self.secret = make_pair()
        self.allowed: dict[str, str] = {}

    def allow(self, public: str, name: str) -> None:
        self.allowed[public] = name

    def forbid(self, public: str) -> None:
        self.allowed.pop(public, None)

    def callback(self, domain: str, key: bytes) -> bool:
        """What zmq.auth asks when a peer connects."""
        return key.decode() in self.allowed


class Keyring:
    """The orchestrator's side: its own key, and which workers' keys are allowed now. Raises ConfigError."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        path = self._directory / "orchestrator.key"
        if not path.is_file():
            raise ConfigError(
                f"there is no {path}: make keys with dsi-actors keys new {shlex.quote(str(directory))} NAME"
            )
        self.public, self.secret = _read(path, "public", "secret")
        self._looked_s = -_LOOK_S
        self._changed_ns = -1
        self._allowed: dict[str, str] = {}

    @property
    def allowed(self) -> dict[str, str]:
        """Public key → name of the worker."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            directory = self._directory / "allowed"
            try:
                changed_ns = directory.stat().st_mtime_ns
                if changed_ns != self._changed_ns:
                    self._allowed = _public_keys(directory)
                    self._changed_ns = changed_ns
            except OSError as error:
                log.error("keys cannot be read: nobody is let in", reason=str(error))
                self._allowed, self._changed_ns = {}, -1
        return self._allowed

    def callback(self, domain: str, key: bytes) -> bool:
        """What zmq.auth asks when a peer connects."""
        self._looked_s = -_LOOK_S  # a key that was made just now counts
        return key.decode() in self.allowed


def new_keys(directory: Path, names: list[str]) -> list[Path]:
    """Make a key for each of these workers, and the orchestrator's if there is none. The files to carry to the workers."""
    for name in names:
        if not _NAME.match(name):
            raise ConfigError(
                f"{name!r} is no name for a key: use up to 64 letters, digits, dots, dashes and underscores"
            )
        for path in (directory / "allowed" / f"{name}.pub", directory / "workers" / f"{name}.key"):
            if path.exists():
                raise ConfigError(
                    f"{path} exists already: choose another name, or end that worker's key for good with "
                    f"dsi-actors keys revoke {shlex.quote(str(directory))} {name}"
                )
    try:
        for each in (directory, directory / "allowed", directory / "workers"):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = directory / "orchestrator.key"
        if not own.exists():
            public, secret = make_pair()
            _write(own, "Secret: whoever has it can pretend to be this orchestrator.", public=public, secret=secret)
        orchestrator, _ = _read(own, "public", "secret")
        made = []
        for name in names:
            public, secret = make_pair()
            path = directory / "workers" / f"{name}.key"
            comment = f"Secret: the key of worker {name}. Carry it to its machine: --key FILE."
            _write(path, comment, orchestrator=orchestrator, public=public, secret=secret)
            _write(directory / "allowed" / f"{name}.pub", f"Worker {name} may connect.", public=public)
            made.append(path)
    except OSError as error:
        raise ConfigError(f"cannot write keys to {directory}: {error.strerror}") from None
    return made


def revoke(directory: Path, name: str) -> None:
    """From a second later on this worker is not heard any more."""
    files = [directory / "allowed" / f"{name}.pub", directory / "workers" / f"{name}.key"]
    if not _NAME.match(name) or not any(file.is_file() for file in files):
        raise ConfigError(
            f"{directory} has no key of a worker {name!r}: see dsi-actors keys list {shlex.quote(str(directory))}"
        )
    try:
        for file in files:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot remove the key {error.filename}: {error.strerror}") from None


def load_worker_key(path: str | Path) -> tuple[str, str, str]:
    """Read one file of `workers/`: the orchestrator's public key, the worker's public key, its secret key; each is 40
    characters of Z85. Raises ConfigError."""
    orchestrator, public, secret = _read(Path(path), "orchestrator", "public", "secret")
    return orchestrator, public, secret


def _public_keys(directory: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*.pub")):
        try:
            found[_read(path, "public")[0]] = path.stem
        except ConfigError as error:
            log.error("a key is left out", reason=str(error))
    return found


def write_worker_key(path: str | Path, *, orchestrator: str, public: str, secret: str) -> None:
    """Write what `load_worker_key` reads: the keys of a worker on this machine. Only this user can read the file."""
    _write(Path(path), "Secret: the key of a worker.", orchestrator=orchestrator, public=public, secret=secret)


def make_pair() -> tuple[str, str]:
    """A new public key and its secret key, in Z85."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _read(path: Path, *names: str) -> tuple[str, ...]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the key {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        found = {}
    values = tuple(str(found.get(name, "")) for name in names)
    if not all(_KEY.match(value) for value in values):
        raise ConfigError(f"{path} is no key file: it must have {', '.join(names)}, as dsi-actors keys new writes them")
    return values


def _write(path: Path, comment: str, **values: str) -> None:
    """Readable by this user alone, there as a whole or not at all. Z85 has neither quotes nor backslashes."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"# {comment}\n" + "".join(f'{name} = "{value}"\n' for name, value in values.items()))
    unfinished.rename(path)

"""The sockets of the service. They are bound before anything is loaded, and listen when everything is: until then a client is
refused, and nobody else can take the port."""

from __future__ import annotations

import errno
import socket
from typing import Any

from dsi_actors.errors import ConfigError

_EVERYWHERE_OF_IPV6 = "::"


class HttpAddress:
    """`host` may be a name that has several addresses; port 0 takes a free one. Raises ConfigError."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self.port = port
        self.sockets: list[socket.socket] = []
        problem: OSError | None = None
        for family, kind, protocol, _, address in self._addresses():
            try:
                self._bind(socket.socket(family, kind, protocol), address)
            except OSError as error:
                problem = error
                if error.errno == errno.EADDRINUSE:
                    self.close()
                    break
        if problem is not None and not self.sockets:  # one without IPv6, for a name that has such an address, is none
            raise ConfigError(self._sentence(problem))

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    def listen(self) -> None:
        """From here on clients are taken. Raises ConfigError if another process was faster."""
        try:
            for each in self.sockets:
                each.listen()
        except OSError as error:
            raise ConfigError(self._sentence(error)) from None

    def close(self) -> None:
        for each in self.sockets:
            each.close()
        self.sockets.clear()

    def _addresses(self) -> list[tuple[Any, ...]]:
        """As `socket.getaddrinfo` gives them."""
        try:
            return [*socket.getaddrinfo(self._host or "?", self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)]
        except (OSError, UnicodeError):
            raise ConfigError(
                f"--host {self._host!r} is no address, and no name of one: give 127.0.0.1, 0.0.0.0 for all of this machine's, "
                "or one of them"
            ) from None

    def _bind(self, made: socket.socket, address: tuple[Any, ...]) -> None:
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a service that ended may linger
            if made.family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self._host != _EVERYWHERE_OF_IPV6)
            made.bind((address[0], self.port, *address[2:]))
        except OSError:
            made.close()
            raise
        self.port = made.getsockname()[1]
        self.sockets.append(made)

    def _sentence(self, error: OSError) -> str:
        match error.errno:
            case errno.EADDRINUSE:
                return f"port {self.port} of {self._host} is taken by another process: choose another one with --port"
            case errno.EADDRNOTAVAIL:
                return f"--host {self._host} is no address of this machine (0.0.0.0 stands for all of them)"
            case errno.EACCES:
                return f"--port {self.port} is not for this user: choose one from 1024 on"
        return f"cannot listen on {self.url}: {error.strerror}"

"""Reads endpoints: the addresses where an orchestrator listens and workers connect, tcp://HOST:PORT or ipc://PATH.

An endpoint is checked here before ZeroMQ gets it. ZeroMQ itself takes a port modulo 65536, and waits without an error for a
host name that does not exist.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from dataclasses import dataclass

MAX_PORT = 65535
#: The longest path of a Unix socket: sizeof(sockaddr_un.sun_path) without the final zero byte.
MAX_PATH_BYTES = 107 if sys.platform == "linux" else 103

_TCP = re.compile(r"tcp://(\[[^\[\]]*\]|[^:;/\[\]\s]+):(\d{1,9}|\*)")
_BARE_IPV6 = re.compile(r"tcp://([0-9a-fA-F:]*:[0-9a-fA-F:.]*):(\d+|\*)")
_NUMBERS = re.compile(r"[0-9.]+")
_EVERYWHERE = ("*", "0.0.0.0", "::")
_FORM = "write it as tcp://127.0.0.1:5555 or ipc:///path"


class EndpointError(ValueError):
    """The text is not an endpoint. The message begins with the text, and says what is wrong and what to write."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint that was checked. Make one with `Endpoint.parse`."""

    #: The endpoint as ZeroMQ takes it.
    text: str
    #: tcp: an IP address without brackets, a host name, a network interface (to listen), or * for all addresses of this machine.
    host: str = ""
    #: tcp: the port. 0 stands for any free port.
    port: int = 0
    #: ipc: the path of the socket. A path that begins with @ is in Linux's abstract namespace, which has no files.
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Returns the endpoint that `text` names. Raises EndpointError."""
        if not text.isprintable():
            raise EndpointError(f"{text!r} is no endpoint: {_FORM}")
        if path := text.removeprefix("ipc://") if text.startswith("ipc://") else "":
            size_bytes = len(path.encode())
            if size_bytes > MAX_PATH_BYTES:
                raise EndpointError(
                    f"{text!r} has a path of {size_bytes} bytes, and a socket's has at most {MAX_PATH_BYTES}: use a shorter one"
                )
            return cls(text, path=path)
        if bare := _BARE_IPV6.fullmatch(text):
            raise EndpointError(
                f"{text!r} is no endpoint: an IPv6 address stands in brackets, tcp://[{bare[1]}]:{bare[2]}"
            )
        found = _TCP.fullmatch(text)
        if found is None:
            raise EndpointError(f"{text!r} is no endpoint: {_FORM}")
        host, port = found[1], 0 if found[2] == "*" else int(found[2])
        if port > MAX_PORT:
            raise EndpointError(f"{text!r} has the port {port}: a port is a number from 0 to {MAX_PORT}")
        if host.startswith("["):
            host = host[1:-1]
            _check(ipaddress.IPv6Address, host, text)
        elif _NUMBERS.fullmatch(host):
            _check(ipaddress.IPv4Address, host, text)
        return cls(text, host=host, port=port)

    @property
    def everywhere(self) -> bool:
        """Whether the endpoint stands for all addresses of the machine."""
        return self.host in _EVERYWHERE

    @property
    def local(self) -> bool:
        """Whether only processes of this machine can reach the endpoint."""
        if self.path or self.host == "localhost":
            return True
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback

    def ip_version(self) -> int | None:
        """Returns the IP version (4 or 6) over which a tcp endpoint is reached. May wait for a name server.

        A host name with addresses of both versions is reached over IPv4, where most services listen. Returns None for an ipc
        endpoint, and for a host name without an address.
        """
        if self.path:
            return None
        if ":" in self.host:
            return 6
        if self.host == "*":
            return 4
        for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
            try:
                socket.getaddrinfo(self.host, None, family)
            except (OSError, UnicodeError):
                continue
            return version
        return None


def _check(kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address], host: str, text: str) -> None:
    try:
        kind(host)
    except ValueError:
        raise EndpointError(f"{text!r} is no endpoint: {host} is no address") from None

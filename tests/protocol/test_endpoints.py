"""What is an endpoint, and what is told about what is none."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from dsi_protocol import MAX_PATH_BYTES, Endpoint, EndpointError


@pytest.mark.parametrize(
    ("text", "host", "port", "local"),
    [
        ("tcp://127.0.0.1:5555", "127.0.0.1", 5555, True),
        ("tcp://127.1.2.3:*", "127.1.2.3", 0, True),
        ("tcp://localhost:0", "localhost", 0, True),
        ("tcp://[::1]:65535", "::1", 65535, True),
        ("tcp://[::ffff:127.0.0.1]:1", "::ffff:127.0.0.1", 1, True),
        ("tcp://0.0.0.0:1", "0.0.0.0", 1, False),
        ("tcp://[::]:1", "::", 1, False),
        ("tcp://*:1", "*", 1, False),
        ("tcp://eth0:1", "eth0", 1, False),
        ("tcp://gpu-1.example.org:5555", "gpu-1.example.org", 5555, False),
        ("tcp://[fe80::1%eth0]:1", "fe80::1%eth0", 1, False),
    ],
)
def test_tcp(text: str, host: str, port: int, local: bool) -> None:
    endpoint = Endpoint.parse(text)
    assert (endpoint.text, endpoint.host, endpoint.port, endpoint.local) == (text, host, port, local)


def test_ipc() -> None:
    longest = "/" + "x" * (MAX_PATH_BYTES - 1)
    assert Endpoint.parse(f"ipc://{longest}").path == longest
    assert Endpoint.parse("ipc:///a b/é").local
    with pytest.raises(EndpointError, match=rf"has a path of {MAX_PATH_BYTES + 1} bytes, .* at most {MAX_PATH_BYTES}"):
        Endpoint.parse(f"ipc://{longest}x")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tcp://127.0.0.1:65536", "has the port 65536: a port is a number from 0 to 65535"),
        ("tcp://127.0.0.1:70000", "has the port 70000"),
        ("tcp://::1:5555", r"stands in brackets, tcp://\[::1\]:5555"),
        ("tcp://[::1:5555", "is no endpoint"),
        ("tcp://[12345::]:1", "12345:: is no address"),
        ("tcp://127.0.0.999:1", "127.0.0.999 is no address"),
        ("tcp://1.2.3:1", "1.2.3 is no address"),
        ("tcp://127.0.0.1", "write it as tcp://127.0.0.1:5555 or ipc:///path"),
        ("tcp://127.0.0.1:", "is no endpoint"),
        ("tcp://127.0.0.1:-1", "is no endpoint"),
        ("tcp://:5555", "is no endpoint"),
        ("tcp://a b:5555", "is no endpoint"),
        ("tcp://127.0.0.1:1;127.0.0.1:2", "is no endpoint"),
        ("tcp://127.0.0.1:5555\n", "is no endpoint"),
        ("ipc://", "is no endpoint"),
        ("ipc:///\udcff", "is no endpoint"),
        ("inproc://x", "is no endpoint"),
        ("http://127.0.0.1:8000", "is no endpoint"),
        ("5555", "is no endpoint"),
        ("", "is no endpoint"),
    ],
)
def test_what_is_none(text: str, problem: str) -> None:
    with pytest.raises(EndpointError, match=problem):
        Endpoint.parse(text)


def test_a_name_is_reached_over_ipv4_if_it_has_such_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"both": {socket.AF_INET, socket.AF_INET6}, "four": {socket.AF_INET}, "six": {socket.AF_INET6}}

    def look_up(host: str, port: None, family: socket.AddressFamily) -> list[Any]:
        if family not in known.get(host, set()):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    versions = [Endpoint.parse(f"tcp://{host}:1").ip_version() for host in ("both", "four", "six", "neither")]
    assert versions == [4, 4, 6, None]
    assert Endpoint.parse("tcp://[::]:1").ip_version() == 6
    assert Endpoint.parse("ipc:///x").ip_version() is None

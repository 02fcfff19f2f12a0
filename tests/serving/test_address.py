"""Where the service listens: bound before anything is loaded, and told once it is true."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from tokenizers import Tokenizer as WordTokenizer
from tokenizers.models import WordLevel

from dsi_actors.errors import ConfigError
from dsi_actors.serving.address import HttpAddress
from support.command import dsi_actors_command, words
from support.ipv6 import has_ipv6
from support.patience import limit_s


def test_a_taken_port_shows_before_anything_is_loaded() -> None:
    """The model does not exist: whoever would look for it first would say so."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = dsi_actors_command("serve", "--target", "/no/such/model", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr == (
        f"dsi-actors: port {port} of 127.0.0.1 is taken by another process: choose another one with --port\n"
    )


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        ("192.0.2.1", "--host 192.0.2.1 is no address of this machine"),
        ("no-such-host.invalid", "--host 'no-such-host.invalid' is no address, and no name of one"),
        ("", "--host '' is no address"),
        ("127.0.0.1:8000", "--host '127.0.0.1:8000' is no address"),
        ("a" * 100, "is no address, and no name of one"),
    ],
)
def test_a_host_that_is_not_ours(host: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        HttpAddress(host, 0)


def test_clients_are_refused_until_it_listens() -> None:
    address = HttpAddress("127.0.0.1", 0)
    assert address.url == f"http://127.0.0.1:{address.port}"
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address.url, timeout=limit_s(60))
    address.listen()
    with pytest.raises(ConfigError, match=rf"port {address.port} of 127.0.0.1 is taken by another process"):
        HttpAddress("127.0.0.1", address.port)
    socket.create_connection(("127.0.0.1", address.port)).close()
    address.close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_ipv6() -> None:
    address = HttpAddress("::1", 0)
    assert address.url == f"http://[::1]:{address.port}"
    address.listen()
    socket.create_connection(("::1", address.port)).close()
    address.close()
    everywhere = HttpAddress("::", 0)
    everywhere.listen()
    for host in ("::1", "127.0.0.1"):
        socket.create_connection((host, everywhere.port)).close()
    everywhere.close()


def test_a_name_is_every_address_it_has() -> None:
    address = HttpAddress("localhost", 0)
    address.listen()
    for each in socket.getaddrinfo("localhost", address.port, type=socket.SOCK_STREAM):
        socket.create_connection((str(each[4][0]), address.port)).close()
    address.close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_what_is_printed_is_where_it_listens(tmp_path: Path) -> None:
    """A service that waits for workers needs no model, but its words."""
    WordTokenizer(WordLevel({"w0": 0, "w1": 1}, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    where = ["--target", str(tmp_path), "--listen", f"ipc://{tmp_path}/dsi.sock", "--host", "::1", "--port", "0"]
    with subprocess.Popen(words("serve", *where), stderr=subprocess.PIPE, text=True) as service:
        assert service.stderr is not None
        said = [service.stderr.readline() for _ in range(2)]
        found = re.fullmatch(r"serving .* at (http://\[::1\]:\d+)/v1\n", said[-1])
        assert found is not None, said
        with urllib.request.urlopen(f"{found[1]}/health", timeout=limit_s(60)) as answer:
            assert answer.status == 200
        service.terminate()
        service.communicate(timeout=limit_s(60))
    assert service.returncode in (0, 128 + signal.SIGTERM)

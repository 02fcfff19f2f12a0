"""Where processes meet: over IPv6, and what they say about addresses where nobody can."""

from __future__ import annotations

import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import dsi_actors
from dsi_actors.host.advice import worker_command
from support.command import dsi_actors_command, words
from support.ipv6 import has_ipv6
from support.patience import limit_s
from support.timed import PROMPT, plain_decoding, start_worker, text_of, timed_config, workers


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
@pytest.mark.parametrize("listen", ["tcp://[::1]:*", "tcp://[::]:*"])
async def test_workers_come_over_ipv6(listen: str) -> None:
    config = timed_config(listen=listen, insecure=True)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        port = orchestrator.endpoint.rpartition(":")[2]
        # Who listens on [::] listens on every address, those of IPv4, too.
        other = "127.0.0.1" if listen == "tcp://[::]:*" else "[::1]"
        with (
            workers(f"tcp://[::1]:{port}", ["--role", "target"]),
            workers(f"tcp://{other}:{port}", ["--role", "drafter"]),
        ):
            assert await orchestrator.wait_for_workers(targets=1, drafters=1, timeout_s=limit_s())
            text = await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=12)))
    assert text == plain_decoding(PROMPT, 12)


@pytest.mark.parametrize(
    ("endpoint", "problem"),
    [
        ("nonsense", "cannot connect to 'nonsense' is no endpoint: write it as tcp://127.0.0.1:5555 or ipc:///path"),
        ("tcp://127.0.0.1:70000", "has the port 70000: a port is a number from 0 to 65535"),
        ("tcp://127.0.0.1:*", "name the host and the port where the orchestrator listens"),
        ("tcp://127.0.0.1:0", "name the host and the port where the orchestrator listens"),
        ("tcp://*:5555", "name the host and the port where the orchestrator listens"),
    ],
)
def test_a_worker_does_not_wait_for_what_can_never_be(endpoint: str, problem: str) -> None:
    worker = start_worker(endpoint)
    _, said = worker.communicate(timeout=limit_s(60))
    assert worker.returncode == 1
    assert said.count("\n") == 1
    assert problem in said


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("tcp://nobody.invalid:5555", "no address is known for the name nobody.invalid"),
        ("ipc:///no/such/place", "there is no directory /no/such"),
    ],
)
def test_a_worker_says_why_its_orchestrator_cannot_be_there_yet(endpoint: str, reason: str) -> None:
    with start_worker(endpoint) as worker:
        assert worker.stderr is not None
        assert reason in worker.stderr.readline()
        worker.terminate()


def test_nobody_is_told_to_connect_to_all_addresses() -> None:
    here = socket.gethostname()
    assert worker_command("tcp://0.0.0.0:5555", keys="keys").endswith(f"--connect tcp://{here}:5555 --key FILE")
    assert worker_command("tcp://[::]:5555", keys=None).endswith(f"--connect tcp://{here}:5555")
    assert worker_command("ipc:///x", keys=None).endswith("--connect ipc:///x")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:70000", "http://127.0.0.1:http", "http://127.0.0.1:0", "http://", "http://[::1", "http://a b"],
)
def test_status_wants_an_address(url: str) -> None:
    done = dsi_actors_command("status", "--once", "--url", url)
    assert done.returncode == 1
    assert done.stderr == f"dsi-actors: --url {url} is no address: write it as http://127.0.0.1:8000\n"


class _Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<p>Hello")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_status_knows_a_service_of_another_kind() -> None:
    with HTTPServer(("127.0.0.1", 0), _Stranger) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        done = dsi_actors_command("status", "--once", "--url", f"http://127.0.0.1:{server.server_port}")
    assert done.returncode == 1
    assert "is no service of dsi-actors serve: give the address of one with --url" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        command = words("status", "--once", "--url", f"http://127.0.0.1:{port}")
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\r\n")  # as ZeroMQ greets
            _, said = process.communicate(timeout=limit_s(60))
    assert process.returncode == 1
    assert f"no service at http://127.0.0.1:{port}" in said
    assert "Traceback" not in said

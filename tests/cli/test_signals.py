"""A signal ends a command and every process that it started; the exit status names the signal."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from support.command import words
from support.patience import limit_s
from support.timed import wait_for_end

SIMULATE = ["simulate", "--tokens", "1000", "--repeats", "1000000", "--sp", "3"]
SIMULATE_ALONE = ["simulate", "--algorithm", "dsi", "--tokens", "10000000", "--repeats", "1"]
HEATMAP = ["bench", "heatmap", "--tokens", "1000000"]
TIMED = ["bench", "timed", "--sp", "1", "--tokens", "100000"]
CHAOS = ["chaos", "--minutes", "10", "--pause", "60"]  # a process that is stopped would stay so
FLOOD = ["bench", "flood", "--tokens", "20", "--repeats", "1000"]
HTTP = ["bench", "http", "--clients", "1", "--tokens", "10000", "--sp", "1"]


@contextmanager
def started(*arguments: str, processes: int = 0) -> Iterator[tuple[psutil.Popen, list[int]]]:
    """The command once it would notice a signal, and so many processes that it has started."""
    command = psutil.Popen(
        words(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )  # fmt: skip
    children: list[int] = []
    try:
        while command.poll() is None and not (_catches(command.pid, signal.SIGTERM) and len(children) >= processes):
            children = [child.pid for child in command.children(recursive=True)]
            time.sleep(0.05)  # leaves the processor to those that are waited for
        yield command, children
    finally:
        for process in (command.pid, *children):
            if psutil.pid_exists(process):
                psutil.Process(process).kill()
        command.communicate(timeout=limit_s(60))


def _catches(process: int, number: int) -> bool:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False
    [caught] = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")]
    return bool(caught >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("arguments", "processes"),
    [(SIMULATE, 2), (SIMULATE_ALONE, 0), (TIMED, 2)],
    ids=["a pool", "nothing but this process", "workers"],
)
def test_a_signal_ends_everything(arguments: list[str], processes: int, number: signal.Signals) -> None:
    with started(*arguments, processes=processes) as (command, children):
        command.send_signal(number)
        _, said = command.communicate(timeout=limit_s(60))
        assert command.returncode == 128 + number
        wait_for_end(children)
    assert said.strip() == f"dsi-actors: {'interrupted' if number == signal.SIGINT else f'ended by {number.name}'}"


@pytest.mark.parametrize(
    ("arguments", "processes"),
    [(HEATMAP, 1), (CHAOS, 6), (FLOOD, 4), (HTTP, 3)],
    ids=["heatmap", "chaos", "flood", "http"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(arguments: list[str], processes: int, number: signal.Signals) -> None:
    """Whatever is started knows that its command has ended, though nobody could say so."""
    with started(*arguments, processes=processes) as (command, children):
        command.send_signal(number)
        _, said = command.communicate(timeout=limit_s(60))
        assert command.returncode == (-number if number == signal.SIGKILL else 128 + number)
        wait_for_end(children)
    assert "Traceback" not in said


def test_a_killed_simulation_leaves_nothing() -> None:
    with started(*SIMULATE, processes=2) as (command, children):
        command.kill()
        wait_for_end(children)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_waits_for_a_peer_is_interrupted(number: signal.Signals) -> None:
    """status reads a connection, and does nothing else meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with started("status", "--url", f"http://127.0.0.1:{port}") as (command, _):
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                command.send_signal(number)
                command.communicate(timeout=limit_s(60))
            assert command.returncode == 128 + number


def test_what_is_ignored_stays_ignored() -> None:
    """nohup has a command go on when its terminal is closed."""
    command = psutil.Popen(
        words(*SIMULATE_ALONE), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    while not _catches(command.pid, signal.SIGTERM):
        assert command.poll() is None
    assert not _catches(command.pid, signal.SIGHUP)
    command.send_signal(signal.SIGHUP)
    command.send_signal(signal.SIGTERM)
    command.communicate(timeout=limit_s(60))
    assert command.returncode == 128 + signal.SIGTERM

"""An orchestrator on one host and its workers on another one, with keys: two network namespaces that a cable connects."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import dsi_actors
from dsi_actors.keys import new_keys
from support.patience import limit_s
from support.timed import PROMPT, plain_decoding, start_worker, text_of, timed_config, workers

TOKENS = 40


@dataclass(frozen=True)
class OtherHost:
    """`here`: the address at which this host is reached from there. `inside`: the words before a command that runs there."""

    here: str
    inside: tuple[str, ...]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def other_host() -> Iterator[OtherHost]:
    """Where network namespaces are not allowed, another loopback address stands for the other host."""
    number = os.getpid() % 4000
    name, subnet = f"dsi{number}", f"10.213.{number // 16 % 250}"
    here, there = f"{subnet}.{number % 16 * 8 + 1}", f"{subnet}.{number % 16 * 8 + 2}"
    with ExitStack() as made:
        try:
            _ip("netns", "add", name)
            made.callback(subprocess.run, ["ip", "netns", "delete", name], capture_output=True)
            _ip("link", "add", f"{name}h", "type", "veth", "peer", "name", f"{name}t", "netns", name)
            _ip("address", "add", f"{here}/29", "dev", f"{name}h")
            _ip("link", "set", f"{name}h", "up")
            _ip("-n", name, "address", "add", f"{there}/29", "dev", f"{name}t")
            _ip("-n", name, "link", "set", f"{name}t", "up")
        except (OSError, subprocess.CalledProcessError):
            yield OtherHost("127.0.0.2", ())
            return
        yield OtherHost(here, ("ip", "netns", "exec", name))


async def test_workers_on_another_host_serve_those_that_have_keys(other_host: OtherHost, tmp_path: Path) -> None:
    new_keys(tmp_path / "keys", ["target", "drafter"])
    config = timed_config(listen=f"tcp://{other_host.here}:*", keys=str(tmp_path / "keys"))
    invited = [["--role", role, "--key", str(tmp_path / f"keys/workers/{role}.key")] for role in ("target", "drafter")]
    async with dsi_actors.Orchestrator(config) as orchestrator:
        with workers(orchestrator.endpoint, *invited, inside=other_host.inside):
            assert await orchestrator.wait_for_workers(targets=1, drafters=1, timeout_s=limit_s())
            stranger = start_worker(orchestrator.endpoint, "--role", "target", inside=other_host.inside)
            text = await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)))
            _, said = await asyncio.to_thread(stranger.communicate, timeout=limit_s())
            assert text == plain_decoding(PROMPT, TOKENS)
            assert stranger.returncode == 1
            assert "refused the connection: " in said
            assert len(orchestrator.workers) == 2

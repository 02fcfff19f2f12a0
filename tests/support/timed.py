"""Test support: timed orchestrators, their reference text, and processes that must be gone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

import dsi_actors
from dsi_workers.engines import load_engine
from support.engines import NoInterrupt, session_of
from support.forked_process import Process, start
from support.patience import limit_s, wait_until

PROMPT = [11, 22, 33]


def timed_config(
    *, target_ms: float = 4, drafter_ms: float = 1, acceptance: float = 0.7, alternatives: float = 0.0, **settings: Any
) -> dsi_actors.Config:
    """With `alternatives` above 0 the drafter drafts trees.

    No timeout of it passes while a test runs, however busy the machine is. What a test wants to pass it gives.
    """
    settings = {
        "sp": 2,
        "heartbeat_ms": 100,
        "silence_ms": 600_000,
        "request_timeout_s": 600,
        "ready_timeout_s": 600,
        "target_wait_s": 600,
        "devices": ("cpu",),
        **settings,
    }
    return dsi_actors.Config(
        engine="timed",
        target_options={"latency_ms": target_ms, "seed": 9},
        drafter_options={"latency_ms": drafter_ms, "acceptance": acceptance, "alternatives": alternatives, "seed": 9},
        **settings,
    )


def plain_decoding(prompt: Sequence[int], tokens: int) -> list[int]:
    """What the timed target says, one token after another, without any process."""
    engine = load_engine("timed", role="target", model="", device="cpu:0", options={"seed": 9})
    session = session_of(prompt)
    for _ in range(tokens):
        session.write(len(session.tokens), engine.verify(session, len(session.tokens), NoInterrupt()).tokens)
    return session.tokens[len(prompt) :]


async def text_of(stream: dsi_actors.GenerationStream) -> list[int]:
    return [token async for tokens in stream for token in tokens]


def start_worker(
    endpoint: str,
    *arguments: str,
    device: str = "cpu",
    once: bool = True,
    inside: Sequence[str] = (),
    forked: bool = True,
) -> Process:
    """`once`: it ends with its orchestrator. `inside`: the words before its command, which run it elsewhere. `forked`: but
    for its start it is like one that a user started."""
    words = ["--gpu", device, "--connect", endpoint, *arguments, *(["--once"] if once else [])]
    if forked and not inside:
        return start("dsi_actors.worker", *words)
    command = [*inside, sys.executable, "-m", "dsi_actors.worker", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@contextmanager
def workers(endpoint: str, *arguments: Sequence[str], inside: Sequence[str] = ()) -> Iterator[list[Process]]:
    """A worker process for each list of arguments. They are asked to leave at the end."""
    started = [start_worker(endpoint, *words, inside=inside) for words in arguments]
    try:
        yield started
    finally:
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.communicate(timeout=limit_s())


def gone(process_ids: Iterable[int]) -> bool:
    """Whether none of these processes runs any more."""
    return not any(_runs(process) for process in process_ids)


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_end(process_ids: Iterable[int]) -> None:
    """Returns when none of these processes runs any more."""
    wait_until(lambda: gone(process_ids))

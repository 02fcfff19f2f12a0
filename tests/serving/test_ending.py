"""The end of a service: what runs is finished or told, nothing new is taken, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

from serving.test_leaving_clients import HOUR_MS, HeldTokenizer, outcomes
from support.engines import make_tiny_model
from support.patience import limit_s, wait_until
from support.service import completion, post, served, words
from support.timed import wait_for_end

READY = b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n"
VIEW = b"GET /dashboard/events HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_what_runs_is_finished_and_nothing_new_is_taken(tmp_path: Path) -> None:
    tokenizer = HeldTokenizer(words(tmp_path))
    async with served(tmp_path, tokenizer=tokenizer, sp=1, drafter=None, config={"keep_alive_s": 60}) as service:
        running, reading, kept, viewer = [await service.connect() for _ in range(4)]
        await running.send(completion("held", stream=True, max_tokens=20, ignore_eos=True))
        await service.until(lambda: tokenizer.arrived.acquire(blocking=False))
        await reading.send(completion()[:-5])
        await service.until(lambda: len(service.service.requests) == 2)
        await kept.send(READY)
        assert (await kept.reply()).status == 200
        await viewer.send(VIEW)
        await viewer.reply(until=lambda reply: bool(reply.body))
        draining = asyncio.create_task(service.server.drain())
        await viewer.reply_until(b"0\r\n\r\n")  # a dashboard is not waited for
        refused = await reading.reply()
        assert (refused.status, refused.error["code"], refused.headers["connection"]) == (503, "unavailable", "close")
        await kept.send(completion())
        for reply in (await kept.reply(), await service.ask(completion()), await service.ask(VIEW)):
            assert (reply.status, reply.error["code"], reply.headers["connection"]) == (503, "unavailable", "close")
        assert (await service.ask(READY)).status == 503
        assert not draining.done()
        tokenizer.let_go.set()
        answer = await running.reply()
        assert answer.events[-1] == "[DONE]"
        assert answer.events[-2]["choices"][0]["finish_reason"] == "length"
        await draining
        assert service.server.should_exit
        assert outcomes(service, "done") == 1


@pytest.mark.parametrize("hurried", [False, True])
async def test_what_is_cut_off_is_told(tmp_path: Path, hurried: bool) -> None:
    """After --drain-s, or at once after a second signal."""
    async with served(
        tmp_path, sp=1, slots=1, target_ms=50, drafter=None, drain_s=3600 if hurried else 0.25
    ) as service:
        stream, whole, waiting = [await service.connect() for _ in range(3)]
        endless: dict[str, Any] = {"max_tokens": 100_000, "ignore_eos": True}
        await stream.send(completion(stream=True, **endless))
        await stream.reply(until=lambda reply: b"data: " in reply.body)
        await whole.send(completion(**endless))
        await waiting.send(completion(stream=True, **endless))
        await service.until(lambda: service.orchestrator.running == 3)
        draining = asyncio.create_task(service.server.drain())
        await asyncio.sleep(0)
        if hurried:
            service.server.hurry()
        cut = await stream.reply_of_stream()
        assert cut[-1] == "[DONE]"
        assert (cut[-2]["error"]["code"], cut[-2]["error"]["type"]) == ("unavailable", "server_error")
        for client in (whole, waiting):
            reply = await client.reply()
            assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "unavailable", "1")
        await draining
        await service.quiet()


async def test_an_error_in_a_stream_ends_it_in_order(tmp_path: Path) -> None:
    async with served(tmp_path, sp=1, target_ms=20, drafter=None, target_wait_s=0.2, restarts=0) as service:
        client = await service.connect()
        await client.send(completion(stream=True, max_tokens=100_000, ignore_eos=True))
        await client.reply(until=lambda reply: b"data: " in reply.body)
        [worker] = service.orchestrator.process_ids
        psutil.Process(worker).kill()
        events = await client.reply_of_stream()
        assert events[-1] == "[DONE]"
        assert events[-2]["error"]["code"] == "unavailable"
        assert outcomes(service, "error_stream") == 1


async def test_without_a_target_server_a_request_waits_and_is_told(tmp_path: Path) -> None:
    async with served(tmp_path, listen="tcp://127.0.0.1:*", ready_timeout_s=0.1) as service:
        assert (await service.ask(READY)).status == 503
        reply = await service.ask(completion())
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "unavailable", "1")
        assert "no target server came" in reply.error["message"]


async def test_an_error_of_ours_is_told_in_the_same_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(tmp_path, sp=1) as service:

        def fail(*arguments: object, **named: object) -> list[int]:
            raise ZeroDivisionError("secret")

        monkeypatch.setattr(service.tokenizer, "encode", fail)
        reply = await service.ask(completion())
        assert (reply.status, reply.error["code"]) == (500, "internal")
        assert b"secret" not in reply.body
        await service.quiet()


async def test_when_the_orchestrator_has_ended_health_says_so(tmp_path: Path) -> None:
    async with served(tmp_path, sp=1, target_ms=HOUR_MS, drafter=None, calibrate=False) as service:
        health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        assert (await service.ask(health)).status == 200
        running = await service.connect()
        await running.send(completion())
        await service.until(lambda: service.orchestrator.running == 1)
        assert service.orchestrator._root is not None
        service.orchestrator._root.stop()
        assert (await running.reply()).status == 503
        for request in (health, READY, completion(), post("/v1/chat/completions", b"{}")):
            assert (await service.ask(request)).status in (400, 503)
        assert (await service.ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200


@dataclass
class Process:
    process: subprocess.Popen[str]
    url: str

    @property
    def workers(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found


@contextmanager
def process(model: Path, sockets: Path, *arguments: str) -> Iterator[Process]:
    """`dsi-actors serve`, which puts its sockets into `sockets`."""
    command = [sys.executable, "-m", "dsi_actors.cli.main", "serve", "--target", str(model), "--sp", "1", "--port", "0"]
    with subprocess.Popen(
        [*command, "--model-name", "tiny", "--gpu", "cpu", "--log-level", "info", *arguments],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(sockets)},
    ) as started:  # fmt: skip
        try:
            assert started.stderr is not None
            for line in started.stderr:
                if found := re.search(r" at (http://[\d.:]+)/v1", line):
                    break
            else:
                raise AssertionError("the service did not start")
            yield Process(started, found.group(1))
        finally:
            started.kill()
            started.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), positions=20_000)


def ask(url: str, **fields: object) -> Iterator[str]:
    """The events of a long stream."""
    body = {"model": "tiny", "prompt": "w5", "max_tokens": 400, "stream": True, "ignore_eos": True, **fields}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=limit_s(60)) as answer:
        for line in answer:
            if line.startswith(b"data: "):
                yield line.decode()[6:].strip()


def is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/ready") as answer:
            return bool(answer.status == 200)
    except HTTPError as error:
        with error:
            return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_leaves_nothing_behind(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    with process(model, tmp_path, "--drain-s", "600") as service:
        workers = [worker.pid for worker in service.workers]
        assert len(workers) == 2
        assert any(tmp_path.iterdir())
        events = ask(service.url)
        next(events)
        service.process.send_signal(number)
        rest = list(events)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        _, errors = service.process.communicate(timeout=limit_s(60))
        assert "Traceback" not in errors, errors
        assert service.process.returncode == 0
        wait_for_end(workers)
        assert not any(tmp_path.iterdir())


def test_a_second_signal_ends_at_once_and_cleans_up_all_the_same(model: Path, tmp_path: Path) -> None:
    with process(model, tmp_path, "--drain-s", "3600", "--max-length", "20000") as service:
        workers = [worker.pid for worker in service.workers]
        events = ask(service.url, max_tokens=19_000)  # which takes a minute or so
        next(events)
        service.process.terminate()
        wait_until(lambda: not is_ready(service.url))
        service.process.terminate()
        rest = list(events)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["error"]["code"] == "unavailable"
        _, errors = service.process.communicate(timeout=limit_s(60))
        assert "Traceback" not in errors, errors
        assert service.process.returncode == 128 + signal.SIGTERM
        wait_for_end(workers)
        assert not any(tmp_path.iterdir())


def test_a_signal_while_workers_start_cleans_up(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsi_actors.cli.main", "serve", "--target", str(model), "--sp", "1", "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as started:
        while not (workers := psutil.Process(started.pid).children()):
            assert started.poll() is None
        started.terminate()
        _, errors = started.communicate(timeout=limit_s(60))
        assert "Traceback" not in errors, errors
        assert started.returncode == 128 + signal.SIGTERM
        wait_for_end([worker.pid for worker in workers])
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_an_open_dashboard_is_warned_of(tmp_path: Path, host: str, warned: bool) -> None:
    command = [sys.executable, "-m", "dsi_actors.cli.main", "serve", "--target", str(tmp_path), "--host", host]
    result = subprocess.run(command, capture_output=True, text=True, timeout=limit_s(60), check=False)
    assert result.returncode == 1, "there is no model"
    assert ("warning: without --api-keys" in result.stderr) == warned


async def test_a_service_leaves_the_levels_of_loggers_alone(tmp_path: Path) -> None:
    """uvicorn sets that of its own logger if it is given one: from then on `show_logs` did not decide alone."""
    async with served(tmp_path):
        assert logging.getLogger("uvicorn.error").level == logging.NOTSET

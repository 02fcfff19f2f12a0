"""examples/ray_serve.py on a cluster on this machine: HTTP through Ray Serve, workers placed by Ray."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import runpy
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import dsi_actors
from dsi_actors.config import DEFAULT_TARGET
from dsi_actors.models import resolve_model
from dsi_actors.tokenizer import Tokenizer
from support.patience import limit_s, wait_until
from support.timed import gone, text_of

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings
ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed", exc_type=ImportError)

EXAMPLES = Path(__file__).parents[2] / "examples"
PORT = 18_123
MARK = "DSI_TEST_OF_RAY_SERVE"
SETTINGS: dict[str, Any] = {
    "engine": "timed", "sp": 2, "devices": ("cpu",), "ready_timeout_s": 600, "silence_ms": 600_000,
    "target_options": {"latency_ms": 3, "vocabulary_size": 49_152},
    "drafter_options": {"latency_ms": 1, "acceptance": 0.7, "vocabulary_size": 49_152},
}  # fmt: skip


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The example's module, and Serve on a cluster of one node."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), *sys.path]))
    monkeypatch.setenv(MARK, MARK)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        yield vars(importlib.import_module("ray_serve"))
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(question: str) -> str:
    query = urllib.parse.urlencode({"question": question, "max_tokens": 30})
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ask?{query}", timeout=limit_s(60)) as response:
        return str(response.read().decode())


def workers_of_the_example() -> list[int]:
    """Processes of workers that have this test's environment."""
    found = list[int]()
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if "dsi_actors.worker" in (process.info["cmdline"] or ()) and process.environ().get(MARK) == MARK:
                found.append(process.pid)
    return found


async def expected_answer(question: str) -> str:
    """What the same models say without Ray."""
    tokenizer = Tokenizer(await resolve_model(DEFAULT_TARGET))
    prompt_ids = tokenizer.encode_chat([{"role": "user", "content": question}])
    sampling = dsi_actors.Sampling(max_tokens=30, stop_token_ids=tokenizer.stop_token_ids)
    async with dsi_actors.Orchestrator(dsi_actors.Config(**SETTINGS)) as orchestrator:
        tokens = await text_of(orchestrator.generate(prompt_ids, sampling))
    stream = tokenizer.stream()
    return "".join(stream.add(token) for token in tokens)


def test_serve_answers_with_the_targets_text_and_leaves_no_worker(example: dict[str, Any]) -> None:
    serve.run(example["Answers"].bind(SETTINGS))
    workers = workers_of_the_example()
    assert len(workers) == 3, "two target servers and the drafter, wherever Ray has placed them"
    answer = ask("Why?")
    assert answer
    assert answer == asyncio.run(expected_answer("Why?"))
    serve.delete("default")
    wait_until(lambda: gone(workers), 60)


def test_the_command_line_gives_numbers_as_text() -> None:
    application = runpy.run_path(str(EXAMPLES / "ray_serve.py"))["application"]
    bound = application({"sp": "3", "target": "your/model"})
    assert isinstance(bound, serve.Application)

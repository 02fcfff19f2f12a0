"""What whoever runs a service sees: its status, and logs that a machine can read."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import openai
import pytest

from serving.test_openai import served
from support.engines import make_tiny_model
from support.fork_server import run_forked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def status(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked("dsi_actors.cli.main", "status", *arguments)


def test_status_says_who_works_on_what(model: Path) -> None:
    with served(model) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                # A fixed lookahead: left to itself, the service soon does without a drafter as slow as the target.
                client.completions.create(
                    model="tiny", prompt="w1 w2", max_tokens=200, temperature=0, extra_body={"dsi": {"lookahead": 2}}
                )

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            result = status("--url", url, "--json")
            picture = status("--url", url, "--once")
        finally:
            stop.set()
            asking.join()
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert sorted(worker["role"] for worker in said["workers"]) == ["drafter", "target"]
    assert said["tokens_per_second"] > 0
    assert all(worker["per_second"] > 0 for worker in said["workers"])
    assert "generations run" in picture.stdout
    assert "target" in picture.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["--url", "nowhere"], "is no address"), (["--url", "http://127.0.0.1:9"], "no service at http://127.0.0.1:9")],
)
def test_status_without_a_service_says_so(arguments: list[str], problem: str) -> None:
    result = status(*arguments, "--once")
    assert result.returncode == 1
    assert problem in result.stderr


def test_json_logs_carry_the_request_id(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with served(model, "--log-format", "json", log=log) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model="tiny", prompt="w1 w2", max_tokens=5, temperature=0)
        client.close()
        request_id = answer.id.rpartition("-")[2]
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    of_request = [
        line for line in lines if request_id in (line.get("id"), line.get("correlation", "").rpartition("-")[0])
    ]
    assert [line["event"] for line in of_request if line["logger"] == "dsi.serving"] == ["request", "answered"]
    assert any(line["logger"] == "dsi.generation" for line in of_request)
    assert of_request[-1].keys() >= {"time", "level", "took_ms", "outcome"}

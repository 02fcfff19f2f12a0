"""The engine of examples/custom-engine, installed as a package of its own: real workers run it, as target and as drafter."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import dsi_actors
from dsi_actors.config import ALGORITHMS
from support.command import dsi_actors_command
from support.engines import make_tiny_model
from support.packages import EXAMPLE, put_on_path, write_package
from support.patience import limit_s
from support.timed import start_worker, text_of, workers

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
SAMPLINGS = (
    dsi_actors.Sampling(max_tokens=60, logprobs=True),
    dsi_actors.Sampling(max_tokens=60, logprobs=True, temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=5),
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def patient_si(monkeypatch: pytest.MonkeyPatch) -> None:
    """SI waits for its drafts, however slow the machine is."""
    for name in ("_LATE_S", "_LATE_UNKNOWN_S"):
        monkeypatch.setattr(f"dsi_actors.generation.draft_timeout.{name}", 600.0)


async def same_by_all_algorithms(
    orchestrator: dsi_actors.Orchestrator, prompt: Sequence[int], sampling: dsi_actors.Sampling
) -> tuple[list[int], float]:
    """The text, and how often SI's drafts were right. Fails if AR, SI and DSI differ in a token or a log probability."""
    found, rate = [], 0.0
    for algorithm in ALGORITHMS:
        text, logprobs = list[int](), list[float]()
        stream = orchestrator.generate(prompt, sampling, algorithm=algorithm, lookahead=3)
        async for tokens in stream:
            text += tokens
            logprobs += tokens.logprobs
        if algorithm == "si":
            rate = (await stream.report()).acceptance_rate
        found.append((text, logprobs))
    assert found[0] == found[1] == found[2]
    return found[0][0], rate


@pytest.mark.usefixtures("patient_si")
async def test_it_is_target_and_drafter_of_one_orchestrator(example_model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(example_model, half)
    text = (half / "text.txt").read_text(encoding="utf-8")
    (half / "text.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    config = dsi_actors.Config(
        engine="trigrams", target=str(example_model), drafter=str(half), sp=2, devices=("cpu",), silence_ms=600_000
    )
    async with dsi_actors.Orchestrator(config) as orchestrator:
        assert {worker.ready.fingerprint != 0 for worker in orchestrator.workers if worker.ready} == {True, False}
        for sampling in SAMPLINGS:
            _, rate = await same_by_all_algorithms(orchestrator, [65, 66, 67], sampling)
            assert 0 < rate < 1, "it has learnt something, and something else"


@pytest.mark.usefixtures("patient_si", "example_model")
async def test_it_drafts_for_a_target_of_another_engine(tiny_model: Path, tmp_path: Path) -> None:
    """In the target's tokens. It learns from what the target has said before."""
    taught = tmp_path / "taught"
    taught.mkdir()
    config = dsi_actors.Config(
        target=str(tiny_model),
        drafter=str(taught),
        listen=f"ipc://{tmp_path}/dsi.sock",
        devices=("cpu",),
        silence_ms=600_000,
    )
    async with dsi_actors.Orchestrator(config) as orchestrator:
        with workers(orchestrator.endpoint, ["--role", "target"]):
            assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s(60))
            said = await text_of(orchestrator.generate([5, 6, 7], SAMPLINGS[0], algorithm="ar"))
            (taught / "text.txt").write_text(" ".join(f"w{token}" for token in said))
            with workers(orchestrator.endpoint, ["--engine", "trigrams"]):
                assert await orchestrator.wait_for_workers(targets=1, drafters=1, timeout_s=limit_s(60))
                text, rate = await same_by_all_algorithms(orchestrator, [5, 6, 7], SAMPLINGS[0])
                assert text == said
                assert rate > 0.3


def test_the_command_line_takes_it(example_model: Path) -> None:
    """With the drafter that is the default: self-int8 is left to the engine."""
    words = ["--raw", "--engine", "trigrams", "--gpu", "cpu", "--sp", "1", "--max-tokens", "20", "--compare", "--json"]
    done = dsi_actors_command("generate", "Alice was", "--target", example_model, *words)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["identical"]
    assert answer["results"][0]["text"].startswith(" beginning to get")


async def test_an_engine_that_is_not_installed_is_refused() -> None:
    config = dsi_actors.Config(engine="no-such", target="", drafter=None, sp=1, devices=("cpu",))
    problem = (
        "unknown engine 'no-such': choose one of transformers, llama-cpp, timed, ngram, or pip install the package"
    )
    with pytest.raises(dsi_actors.WorkerStartError, match=problem):
        async with dsi_actors.Orchestrator(config):
            pytest.fail("it started")


@pytest.mark.parametrize("name", ["", "auto", "ngram"])
def test_what_target_servers_cannot_run_is_no_engine_of_an_orchestrator(name: str) -> None:
    with pytest.raises(
        dsi_actors.ConfigError, match="engine must be the name of an engine that target servers can run"
    ):
        dsi_actors.Config(engine=name)


async def test_an_orchestrator_cannot_make_a_worker_import_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that lies on the worker's path."""
    trace = tmp_path / "it ran"
    (tmp_path / "lying_about.py").write_text(f"open({str(trace)!r}, 'w')\ndef make(**arguments): pass\n")
    put_on_path(tmp_path, monkeypatch)
    config = dsi_actors.Config(engine="lying_about:make", target="x", drafter=None, listen=f"ipc://{tmp_path}/dsi.sock")
    async with dsi_actors.Orchestrator(config) as orchestrator:
        worker = start_worker(orchestrator.endpoint)
        while worker.poll() is None:
            await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=0.05)
        _, said = worker.communicate(timeout=limit_s())
    assert worker.returncode == 1
    assert said.splitlines()[-1].startswith("worker: unknown engine 'lying_about:make': choose one of transformers,")
    assert not trace.exists()


async def test_a_factory_is_told_all_and_gets_its_models_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is not looked at before, nor is the worker kept from the hub."""
    code = """
import os
from dsi_workers.engine import EngineError

def make(**arguments):
    raise EngineError(f"told {arguments} and {os.environ.get('HF_HUB_OFFLINE')}")
"""
    write_package(tmp_path, "refuses", {"theirs": "refuses:make"}, code)
    put_on_path(tmp_path, monkeypatch)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    config = dsi_actors.Config(
        engine="theirs", target="their://model", target_options={"x": 1}, drafter=None, sp=1, devices=("cpu",)
    )
    told = {"role": "target", "model": "their://model", "device": "cpu:0", "options": {"x": 1, "calibrate": True}}
    with pytest.raises(dsi_actors.WorkerStartError) as refused:
        async with dsi_actors.Orchestrator(config):
            pytest.fail("it started")
    assert str(refused.value).endswith(f"did not start: told {told} and None")


# The page


def test_the_page_shows_the_example_as_it_is() -> None:
    code = (EXAMPLE / "dsi_trigrams.py").read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 60
    blocks = re.findall(r"^```(?:python|toml)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert code in blocks
    assert (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8") in blocks


def test_the_page_names_files_that_are_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGE.read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (PAGE.parent / link).exists()] == []

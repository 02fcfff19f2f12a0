"""Models come onto the machine before anything waits for them: the whole command line, embedders, and workers elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import psutil
import pytest

import dsi_actors
from dsi_actors import models
from dsi_actors.host.devices import cores
from dsi_actors.models import resolve_model
from dsi_actors.workforce.members import Member
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import FromWorker, Goodbye, Hello, Message, Preparing, Welcome
from support.engines import make_tiny_model
from support.fake_worker import FakeWorker, running, silent
from support.hub import LoopbackHub
from support.patience import limit_s, patience, until
from support.timed import timed_config, wait_for_end

TARGET, DRAFTER = "org/target", "org/drafter"
PROMPT = "w3 w1 w4"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny_model(tmp_path_factory.mktemp("target")), make_tiny_model(
        tmp_path_factory.mktemp("drafter"), words=64
    )


@pytest.fixture
def hub(directories: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub(redirects=True) as hub:
        for name, directory in zip((TARGET, DRAFTER), directories, strict=True):
            hub.add(name, directory)
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(models, "_known", {})
        yield hub


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "dsi_actors.cli.main", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=limit_s(180), check=False)


def preparations() -> list[psutil.Process]:
    """Children of this process that fetch a model."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "dsi_workers.models.preparation" in child.cmdline():
                found.append(child)
    return found


def test_generate_takes_target_and_drafter_from_the_hub(hub: LoopbackHub, directories: tuple[Path, Path]) -> None:
    words = ["--max-tokens", "8", "--ignore-eos", "--json", "--sp", "1"]
    done = command("generate", PROMPT, "--target", TARGET, "--drafter", DRAFTER, *words)
    assert done.returncode == 0, done.stderr
    expected = command("generate", PROMPT, "--target", str(directories[0]), "--drafter", "none", *words)
    assert json.loads(done.stdout)["token_ids"] == json.loads(expected.stdout)["token_ids"]
    said = done.stderr.splitlines()
    for what in (
        f"fetching {TARGET} 100%",
        f"fetching {DRAFTER} 100%",
        "starting workers 0% (0 of 2: ",
        "starting workers 50% (1 of 2: ",
    ):
        assert any(line.startswith(what) for line in said), done.stderr
    large = [each.path for each in hub.requests if each.path.startswith("/large/") and each.method == "GET"]
    assert len(set(large)) == len(large) == 2  # no worker fetched anything


def test_download_prints_where_models_are(hub: LoopbackHub, directories: tuple[Path, Path]) -> None:
    done = command("download", TARGET, str(directories[1]), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["machine"]["cores"] == cores()
    first, second = found["results"]
    assert (first["model"], second["directory"]) == (TARGET, str(directories[1]))
    weights = directories[0] / "model.safetensors"
    assert (Path(first["directory"]) / weights.name).read_bytes() == weights.read_bytes()
    assert first["size_bytes"] == sum(path.stat().st_size for path in directories[0].iterdir())
    again = command("download", f"{TARGET}@main")
    assert again.stdout == f"{first['directory']}\n"
    refused = command("download", "org/nothing")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("dsi-actors: unknown model 'org/nothing'")
    assert "Traceback" not in refused.stderr


def test_how_long_loading_may_take_is_an_option(directories: tuple[Path, Path]) -> None:
    words = ["generate", PROMPT, "--target", str(directories[0]), "--drafter", "none", "--sp", "1", "--ready-timeout"]
    assert "ready_timeout_s must be positive" in command(*words, "0").stderr
    late = command(*words, "0.01")
    assert late.returncode == 1
    assert "only 0 of 1 workers were ready after 0.01 s" in late.stderr
    assert "Traceback" not in late.stderr


def bytes_fetched(directory: Path) -> int:
    """Of files that are being fetched. One may be complete, and have another name, as soon as it is seen."""
    fetched = 0
    for path in directory.rglob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):
            fetched += path.stat().st_size
    return fetched


async def test_nothing_waits_while_a_model_is_fetched_and_a_cancel_ends_it(hub: LoopbackHub, tmp_path: Path) -> None:
    """The event loop goes on, no worker is started, and the time is not counted."""
    reported: list[str] = []
    hub.hold_after(10_000)
    config = dsi_actors.Config(target=TARGET, drafter=None, sp=1, ready_timeout_s=0.001)
    orchestrator = dsi_actors.Orchestrator(config, report=lambda what, done, detail: reported.append(what))
    entering = asyncio.create_task(orchestrator.__aenter__())
    await until(hub.held.is_set)
    await until(lambda: f"fetching {TARGET}" in reported)
    await until(lambda: bytes_fetched(tmp_path / "home") > 0)
    [fetcher] = preparations()
    assert not entering.done()
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    wait_for_end([fetcher.pid])
    hub.release()
    directory = await resolve_model(TARGET)
    checksum = (directory / "model.safetensors").resolve().name
    assert hub.begins(f"/large/{checksum}")[1] > 0


async def test_what_cannot_be_fetched_is_told_before_anything_starts(hub: LoopbackHub) -> None:
    for config in (
        dsi_actors.Config(target="org/nothing"),
        dsi_actors.Config(target=TARGET, drafter="ngram+org/nothing"),
    ):
        with pytest.raises(dsi_actors.ConfigError, match="unknown model 'org/nothing'"):
            async with dsi_actors.Orchestrator(config):
                pass


async def test_what_a_process_has_resolved_is_not_asked_for_again(hub: LoopbackHub) -> None:
    directory = await resolve_model(TARGET)
    asked = len(hub.requests)
    assert await resolve_model(TARGET) == await resolve_model(TARGET, tokenizer_only=True) == directory
    assert len(hub.requests) == asked


# Workers that come from elsewhere


@contextlib.asynccontextmanager
async def worker(endpoint: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dsi_actors.worker", "--gpu", "cpu", "--connect", endpoint, "--once",
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_worker_elsewhere_fetches_by_itself(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.hold_after(10_000)
    reported: list[str] = []
    config = dsi_actors.Config(target=TARGET, drafter=None, listen=f"ipc://{tmp_path}/dsi.sock")
    async with dsi_actors.Orchestrator(config, report=lambda what, done, detail: reported.append(what)) as orchestrator:
        async with worker(orchestrator.endpoint) as process, patience(60):
            await until(lambda: any(what.endswith(f"fetching {TARGET}") for what in reported))
            assert orchestrator.preparing == 1
            assert orchestrator.workers == []
            hub.release()
            assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
            assert orchestrator.preparing == 0
            process.terminate()
            _, said = await process.communicate()
        assert f"fetching {TARGET} 100%" in said.decode()


async def test_a_worker_that_fetches_hears_that_it_is_not_needed(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.hold_after(10_000)
    config = dsi_actors.Config(target=TARGET, drafter=None, listen=f"ipc://{tmp_path}/dsi.sock")
    async with contextlib.AsyncExitStack() as stack:
        async with dsi_actors.Orchestrator(config) as orchestrator, patience(60):
            process = await stack.enter_async_context(worker(orchestrator.endpoint))
            await until(hub.held.is_set)
            fetchers = [each.pid for each in preparations()]
            assert len(fetchers) == 1
        async with patience():
            _, said = await process.communicate()
        assert process.returncode == 0
        assert "the orchestrator ends" in said.decode()
        wait_for_end(fetchers)


async def test_a_worker_elsewhere_says_why_it_cannot_fetch(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.gated.add(TARGET)
    config = dsi_actors.Config(target=TARGET, drafter=None, listen=f"ipc://{tmp_path}/dsi.sock")
    async with dsi_actors.Orchestrator(config) as orchestrator, worker(orchestrator.endpoint) as process:
        async with patience():
            _, said = await process.communicate()
        assert process.returncode == 1
        assert "set HF_TOKEN" in said.decode()
        assert "Traceback" not in said.decode()


def test_time_to_fetch_is_not_time_to_load() -> None:
    """The clock of loading begins with Welcome, and again with each Preparing."""
    config = timed_config(ready_timeout_s=30, silence_ms=1000)
    hello = Hello(1, 7, "target", "auto", "", "cpu:0", "elsewhere", 1)
    handle = WorkerHandle(1, b"w", hello, "target", lambda message: None)
    member = Member(
        handle, Welcome(1, "target", "timed", "", {}, 250, 10_000), heard_s=1000, since_s=0, greet_again_s=0
    )
    assert member.why_dead(1000, config) == "it was not ready after 30 s"
    member.since_s = 980
    assert member.why_dead(1000, config) is None


class Slow(FakeWorker):
    """Answers the first Welcomes by saying that it prepares its model."""

    welcomes = 0

    def _react(self, message: Message) -> Iterable[FromWorker]:
        if isinstance(message, Welcome):
            self.welcomes += 1
            if self.welcomes < 4:
                return [Preparing("fetching a model", 250 * self.welcomes)]
        return super()._react(message)


async def test_each_preparing_starts_the_clock_again(tmp_path: Path) -> None:
    reported: list[tuple[str, float | None]] = []
    since_s: list[float] = []

    def report(what: str, done: float | None, detail: str) -> None:
        reported.append((what, done))
        assert orchestrator._root is not None
        since_s.extend(member.since_s for member in orchestrator._root.workforce._members)

    config = timed_config(listen=f"ipc://{tmp_path}/dsi.sock", heartbeat_ms=50, silence_ms=400)
    async with (
        dsi_actors.Orchestrator(config, report=report) as orchestrator,
        running(orchestrator.endpoint, Slow("target", silent)),
    ):
        assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
    assert [done for what, done in reported if "fetching a model" in what] == [0.25, 0.5, 0.75]
    assert since_s[0] < since_s[1] < since_s[2] == since_s[3]


class StillPreparing(FakeWorker):
    """Prepares its model, and stays when it is told to go."""

    def _react(self, message: Message) -> Iterable[FromWorker]:
        return [Preparing("preparing a model", 0)] if isinstance(message, Welcome) else ()


async def test_a_worker_that_prepares_its_model_is_dismissed_until_it_leaves(tmp_path: Path) -> None:
    """What it has not read when the socket closes is lost, and it may look for messages only now and then."""
    config = timed_config(listen=f"ipc://{tmp_path}/dsi.sock")
    worker = StillPreparing("target", silent)
    async with patience(), running(config.listen or "", worker):
        async with dsi_actors.Orchestrator(config) as orchestrator:
            await until(lambda: orchestrator.preparing == 1)
        # One that is not waited for is told twice: at the beginning of the end, and when the socket closes.
        await until(lambda: sum(isinstance(message, Goodbye) for message in worker.heard) > 2)

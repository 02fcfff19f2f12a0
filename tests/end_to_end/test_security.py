"""Who gets in: keys, and what strangers can do to a generation that runs meanwhile (nothing)."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import dsi_actors
from dsi_actors.keys import Keyring, load_worker_key, new_keys, revoke
from support.command import dsi_actors_command
from support.connections import Relay, leave, listening
from support.patience import limit_s, patience, slowness, until
from support.strangers import giant_frame, half_a_handshake, strange_frames
from support.timed import PROMPT, plain_decoding, start_worker, text_of, timed_config, workers

TOKENS = 60


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    new_keys(tmp_path / "keys", ["one", "two", "three"])
    return tmp_path / "keys"


def roles_and_keys(keys: Path) -> list[list[str]]:
    roles = {"one": "target", "two": "target", "three": "drafter"}
    return [["--role", role, "--key", str(keys / "workers" / f"{name}.key")] for name, role in roles.items()]


@pytest.fixture
async def guarded(keys: Path) -> AsyncIterator[dsi_actors.Orchestrator]:
    """An orchestrator on TCP that wants keys, and three workers that have some. One that is not heard any more is dropped."""
    config = timed_config(listen="tcp://127.0.0.1:*", keys=str(keys), silence_ms=round(1000 * slowness()))
    async with dsi_actors.Orchestrator(config) as orchestrator:
        with workers(orchestrator.endpoint, *roles_and_keys(keys)):
            assert await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=limit_s())
            yield orchestrator


async def test_workers_with_keys_serve(guarded: dsi_actors.Orchestrator) -> None:
    text = await text_of(guarded.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)))
    assert text == plain_decoding(PROMPT, TOKENS)


@pytest.mark.parametrize("key", ["none", "not allowed", "for another orchestrator"])
async def test_a_worker_without_the_right_key_is_turned_away(
    guarded: dsi_actors.Orchestrator, keys: Path, tmp_path: Path, key: str
) -> None:
    other = tmp_path / "other"
    [path] = new_keys(other, ["stranger"])
    arguments = [] if key == "none" else ["--key", str(path)]
    if key == "not allowed":
        text = path.read_text().replace(load_worker_key(path)[0], Keyring(keys).public)
        path.write_text(text)
    stranger = start_worker(guarded.endpoint, "--role", "target", *arguments)
    text_there = await text_of(guarded.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)))
    assert text_there == plain_decoding(PROMPT, TOKENS)
    if key == "for another orchestrator":  # it cannot even tell that somebody is there
        stranger.kill()
        await asyncio.to_thread(stranger.communicate, timeout=limit_s())
    else:
        _, said = await asyncio.to_thread(stranger.communicate, timeout=limit_s())
        assert stranger.returncode == 1
        assert "refused the connection: " in said
        assert "make a key with dsi-actors keys new DIRECTORY NAME" in said
    assert len(guarded.workers) == 3


async def test_a_handshake_that_was_listened_to_opens_nothing(guarded: dsi_actors.Orchestrator, keys: Path) -> None:
    relay = Relay(guarded.endpoint.removeprefix("tcp://"))
    async with listening(relay.answer) as listened_to:
        new_keys(keys, ["four"])
        with workers(f"tcp://{listened_to}", ["--role", "target", "--key", str(keys / "workers" / "four.key")]):
            assert await guarded.wait_for_workers(targets=3, drafters=1, timeout_s=limit_s())
            before = bytes(relay.heard[0])
    assert len(before) > 500, "greeting, hello, initiate, and messages"
    root = guarded._root
    assert root is not None
    members = len(root.workforce.workers)
    host, port = relay.there.rsplit(":", 1)
    for replayed in (before, before[:300]):
        reader, writer = await asyncio.open_connection(host, int(port))
        async with patience():
            answer = await reader.readexactly(1)  # ZeroMQ greets first, unless it has all of the rest to read
            writer.write(replayed)
            with suppress(ConnectionResetError):
                while more := await reader.read(100_000):
                    answer += more
        await leave(writer)
        assert 1 < len(answer) < 400, "a greeting and a cookie, nothing that was meant for the worker"
    assert len(root.workforce.workers) <= members


async def test_a_revoked_key_is_not_heard_any_more(guarded: dsi_actors.Orchestrator, keys: Path) -> None:
    text: list[int] = []
    async for tokens in guarded.generate(PROMPT, dsi_actors.Sampling(max_tokens=600)):
        text.extend(tokens)
        if len(text) > 10 and len(text) - len(tokens) <= 10:
            revoke(keys, "two")
    await until(lambda: len(guarded.workers) == 2)
    assert text == plain_decoding(PROMPT, 600)


def test_keys_are_private_and_names_are_checked(keys: Path) -> None:
    for path in [keys / "orchestrator.key", *(keys / "workers").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(Keyring(keys).allowed.values()) == ["one", "three", "two"]
    for name, problem in (("../one", "is no name for a key"), ("one", "exists already: choose another name")):
        with pytest.raises(dsi_actors.ConfigError, match=problem):
            new_keys(keys, [name])
    with pytest.raises(dsi_actors.ConfigError, match="has no key of a worker 'four'"):
        revoke(keys, "four")
    with pytest.raises(dsi_actors.ConfigError, match=r"there is no .*orchestrator.key: make keys with"):
        Keyring(keys / "workers")
    with pytest.raises(dsi_actors.ConfigError, match="is no key file: it must have orchestrator, public, secret"):
        load_worker_key(keys / "allowed" / "one.pub")


def test_a_damaged_key_keeps_its_own_worker_out_only(keys: Path) -> None:
    (keys / "allowed" / "four.pub").write_text("")
    assert sorted(Keyring(keys).allowed.values()) == ["one", "three", "two"]


def test_the_command_makes_lists_and_revokes(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return dsi_actors_command("keys", *arguments)

    directory = str(tmp_path / "keys")
    made = command("new", directory, "gpu-1", "gpu-2")
    assert made.stdout.split() == [f"{directory}/workers/gpu-1.key", f"{directory}/workers/gpu-2.key"]
    assert [line.split()[0] for line in command("list", directory).stdout.splitlines()] == ["gpu-1", "gpu-2"]
    assert command("revoke", directory, "gpu-1").returncode == 0
    assert [line.split()[0] for line in command("list", directory).stdout.splitlines()] == ["gpu-2"]
    again = command("revoke", directory, "gpu-1")
    assert again.returncode == 1
    assert "has no key of a worker 'gpu-1'" in again.stderr


@pytest.mark.parametrize("attack", [giant_frame, half_a_handshake, strange_frames])
async def test_nonsense_is_refused_and_harms_nobody(attack: Callable[[str], None]) -> None:
    async with dsi_actors.Orchestrator(timed_config(listen="tcp://127.0.0.1:*")) as orchestrator:
        with workers(orchestrator.endpoint, *(["--role", role] for role in ("target", "target", "drafter"))):
            assert await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=limit_s())
            stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS))
            reading = asyncio.create_task(text_of(stream))
            await asyncio.to_thread(attack, orchestrator.endpoint)
            assert await reading == plain_decoding(PROMPT, TOKENS)
            assert len(orchestrator.workers) == 3


async def test_a_flood_of_hellos_keeps_nobody_out() -> None:
    silence_ms = round(2000 * slowness())  # then a stranger that said Hello and no more is forgotten
    async with dsi_actors.Orchestrator(timed_config(listen="tcp://127.0.0.1:*", silence_ms=silence_ms)) as orchestrator:
        endpoint = orchestrator.endpoint
        with workers(endpoint, ["--role", "target"]), flooding(endpoint, seconds=6.0):
            assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
            with workers(endpoint, ["--role", "drafter"]):
                text = await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)))
                assert text == plain_decoding(PROMPT, TOKENS)
                assert await orchestrator.wait_for_workers(targets=1, drafters=1, timeout_s=limit_s()), (
                    "a real one gets in"
                )


@contextmanager
def flooding(endpoint: str, seconds: float) -> Iterator[None]:
    command = [sys.executable, "-m", "dsi_actors.chaos.strangers", "hellos", endpoint, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        yield
        process.kill()


@pytest.mark.long
def test_bench_flood_prints_a_row_for_each_attack() -> None:
    words = ["bench", "flood", "--tokens", "15", "--repeats", "1", "--target-ms", "4", "--drafter-ms", "1", "--json"]
    done = dsi_actors_command(*words)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert [row["attack"] for row in rows] == ["nobody", "hellos", "noise", "large frames", "half handshakes"]

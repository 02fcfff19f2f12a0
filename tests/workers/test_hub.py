"""Models of the hub, fetched from one on this machine that is slow, breaks off, or says no."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from dsi_workers.models import hub as fetching
from dsi_workers.models.files import ModelError
from dsi_workers.models.resolve import resolve_model
from support.engines import make_tiny_model
from support.hub import LoopbackHub
from support.patience import limit_s, wait_until

NAME = "org/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(params=[False, True], ids=["one host", "files of another host"])
def redirects(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add(NAME, files)
        use(hub, tmp_path, monkeypatch)
        yield hub


def use(hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where the library has read its environment already."""
    for name, value in hub.environment(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(fetching, "_PAUSE_S", 0.0)


def left_behind(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*.incomplete"))


def test_a_model_is_fetched_once(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redirects: bool
) -> None:
    reported: list[tuple[str, float | None]] = []
    with LoopbackHub(redirects=redirects) as hub:
        others = (
            "onnx.bin", "consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors", "onnx/model.onnx",
            "tf_model.h5", "consolidated.00.pth", "tiny-q4.gguf",
        )  # fmt: skip
        commit = hub.add(NAME, {**files, **dict.fromkeys(others, b"x" * 100)})
        use(hub, tmp_path, monkeypatch)
        directory = resolve_model(NAME, report=lambda what, done, detail: reported.append((what, done)))
        assert directory.name == commit
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == files
        assert (f"fetching {NAME}", 1.0) in reported
        assert resolve_model(f"{NAME}@main") == resolve_model(f"{NAME}@{commit}") == directory
        large = "/large/" if redirects else WEIGHTS
        assert sum(large in each.path for each in hub.requests if each.method == "GET") == 1
    assert left_behind(tmp_path) == []


def test_the_library_finds_what_was_fetched(hub: LoopbackHub) -> None:
    directory = resolve_model(NAME)
    hub.requests.clear()
    assert huggingface_hub.try_to_load_from_cache(NAME, WEIGHTS) == str(directory / WEIGHTS)
    assert huggingface_hub.hf_hub_download(NAME, WEIGHTS) == str(directory / WEIGHTS)
    assert hub.begins(WEIGHTS) == []


def test_the_tokenizer_alone(hub: LoopbackHub) -> None:
    directory = resolve_model(NAME, tokenizer_only=True)
    assert (directory / "tokenizer.json").is_file()
    assert not (directory / WEIGHTS).exists()
    assert hub.begins(WEIGHTS) == []
    assert (resolve_model(NAME) / WEIGHTS).is_file()


def test_what_a_killed_process_had_is_not_fetched_again(
    hub: LoopbackHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.hold_after(50_000)
    environment = {**os.environ, **hub.environment(tmp_path)}
    command = [sys.executable, "-m", "dsi_workers.models.preparation", NAME]
    killed = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert hub.held.wait(limit_s())
    wait_until(lambda: any(path.stat().st_size >= 40_000 for path in tmp_path.rglob("*.incomplete")))
    killed.kill()
    killed.communicate(timeout=limit_s())
    [part] = tmp_path.rglob("*.incomplete")
    size = part.stat().st_size
    assert 0 < size < len(files[WEIGHTS])
    hub.release()
    directory = resolve_model(NAME)
    assert hub.begins(WEIGHTS) == [0, size]
    assert (directory / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert left_behind(tmp_path) == []


def test_a_parent_that_is_gone_ends_the_fetch(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.hold_after(1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "dsi_workers.models.preparation", NAME], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env={**os.environ, **hub.environment(tmp_path)},
    )  # fmt: skip
    assert hub.held.wait(limit_s())
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(limit_s()) == 1


@pytest.mark.parametrize("breaks", [[1], [30_000, 20_000, 0, 0, 1], [0, 0]])
def test_a_fetch_that_breaks_off_goes_on(
    hub: LoopbackHub, files: dict[str, bytes], tmp_path: Path, breaks: list[int]
) -> None:
    hub.breaks = list(breaks)
    assert (resolve_model(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]
    begins = hub.begins(WEIGHTS)
    assert len(begins) == len(breaks) + 1
    assert begins == [sum(breaks[:count]) for count in range(len(begins))]
    assert left_behind(tmp_path) == []


def test_a_fetch_that_always_breaks_off_says_so_and_can_go_on(
    hub: LoopbackHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.breaks = [90_000] + [0] * 100
    with pytest.raises(
        ModelError, match=r"interrupted again and again .*: try later, the fetch will continue after the 0\.1 MB"
    ):
        resolve_model(NAME)
    hub.breaks.clear()
    assert (resolve_model(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert hub.begins(WEIGHTS)[-1] == 90_000
    assert left_behind(tmp_path) == []


def test_a_file_that_is_too_short_is_not_taken(hub: LoopbackHub) -> None:
    hub.truncated_at = 50_000
    with pytest.raises(ModelError, match="interrupted again and again"):
        resolve_model(NAME)
    hub.truncated_at = None
    assert resolve_model(NAME)
    assert hub.begins(WEIGHTS)[-1] == 50_000


def test_a_damaged_file_is_fetched_again_once(hub: LoopbackHub, files: dict[str, bytes]) -> None:
    hub.damages = 1
    assert (resolve_model(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_file_that_is_always_damaged_is_not_taken(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.damages = 2
    with pytest.raises(ModelError, match="arrived damaged twice"):
        resolve_model(NAME)
    assert left_behind(tmp_path) == []


def test_a_part_that_was_damaged_on_disk_is_thrown_away(
    hub: LoopbackHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.breaks = [60_000] + [0] * 100
    with pytest.raises(ModelError):
        resolve_model(NAME)
    hub.breaks.clear()
    [part] = tmp_path.rglob("*.incomplete")
    part.write_bytes(b"z" * 200_000)  # longer than the file, too
    assert (resolve_model(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_cached_file_of_another_length_is_fetched_again(hub: LoopbackHub, files: dict[str, bytes]) -> None:
    weights = resolve_model(NAME) / WEIGHTS
    with weights.resolve().open("r+b") as file:
        file.truncate(1000)
    assert (resolve_model(NAME) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_parts_that_nobody_goes_on_with_are_removed(hub: LoopbackHub, tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    for name, age_s in (
        ("old.1234abcd.incomplete", 9999),
        ("older.dsi.incomplete", 9999),
        ("now.5678abcd.incomplete", 0),
    ):
        (blobs / name).write_bytes(b"part")
        at_s = (blobs / name).stat().st_mtime - age_s
        os.utime(blobs / name, (at_s, at_s))
    resolve_model(NAME)
    assert left_behind(tmp_path) == ["now.5678abcd.incomplete"]  # its process may live


def test_processes_that_want_the_same_fetch_it_once(hub: LoopbackHub) -> None:
    hub.hold_after(10_000)
    reported: list[str] = []
    found: list[Path] = []

    def get() -> None:
        found.append(resolve_model(NAME, report=lambda what, done, detail: reported.append(what)))

    threads = [threading.Thread(target=get) for _ in range(3)]  # each opens the lock for itself, as processes do
    for thread in threads:
        thread.start()
    assert hub.held.wait(limit_s())
    wait_until(lambda: sum(what.startswith("waiting for another process") for what in reported) >= 2)
    hub.release()
    for thread in threads:
        thread.join(limit_s())
    assert len(set(found)) == 1
    assert len(found) == 3
    assert hub.begins(WEIGHTS) == [0]


def test_weights_in_several_files(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    whole = tmp_path / "whole"
    whole.mkdir()
    for name, content in files.items():
        (whole / name).write_bytes(content)
    parted = tmp_path / "parted"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(parted, max_shard_size="40KB")
    (parted / "tokenizer.json").write_bytes(files["tokenizer.json"])
    parts = sorted(path.name for path in parted.glob("*.safetensors"))
    assert len(parts) > 2
    with LoopbackHub() as hub:
        hub.add("org/parted", parted)
        use(hub, tmp_path, monkeypatch)
        hub.breaks = [random.Random(3).randrange(1, 30_000) for _ in range(5)]
        directory = resolve_model("org/parted")
        assert sorted(path.name for path in directory.glob("*.safetensors")) == parts
        assert all((directory / name).read_bytes() == (parted / name).read_bytes() for name in parts)


def test_pytorch_files_are_fetched_where_there_is_nothing_else(
    hub: LoopbackHub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, or in parts that an index names; and read as tensors, never as a program."""
    import json

    import torch
    from safetensors.torch import load, load_file

    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    weights = load(files[WEIGHTS])
    for name, place in (
        ("org/whole", dict.fromkeys(weights, "pytorch_model.bin")),
        ("org/parts", {tensor: f"pytorch_model-0000{1 + ('lm_head' in tensor)}-of-00002.bin" for tensor in weights}),
    ):
        source = tmp_path / name
        source.mkdir(parents=True)
        for part in set(place.values()):
            torch.save({tensor: weights[tensor] for tensor in weights if place[tensor] == part}, source / part)
        if len(set(place.values())) > 1:
            (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))
        for file in ("config.json", "tokenizer.json"):
            (source / file).write_bytes(files[file])
        hub.add(name, source)
        directory = resolve_model(name)
        found = {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}
        assert all(torch.equal(found[tensor], weights[tensor]) for tensor in weights)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve_model(name) == directory
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


# What the hub refuses


def refusal(reference: str = NAME) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(reference)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_gated_model_asks_for_a_token(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(NAME)
    assert refusal() == (
        f"the model '{NAME}' is gated: accept its conditions at {hub.url}/{NAME}, then log in (hf auth login) or set HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert resolve_model(NAME)


def test_a_private_model_asks_for_a_token(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private.add(NAME)
    assert refusal().endswith("if it is private, log in (hf auth login) or set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert resolve_model(NAME)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("org/nothing", "unknown model 'org/nothing': .* the model hub does not have it; if it is private, log in"),
        (f"{NAME}@v9", f"the model '{NAME}' has no revision 'v9'"),
        ("models/of/mine", "unknown model 'models/of/mine': .* it is not a valid name for the model hub"),
        ("./nowhere", "unknown model './nowhere'"),
        ("two words", "unknown model 'two words'"),
    ],
)
def test_a_model_that_is_not_there(hub: LoopbackHub, reference: str, reason: str) -> None:
    import re

    assert re.match(reason, refusal(reference))


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        (
            {"model.ckpt": b"x"},
            r"the weights of org/odd are a pickle of an unknown kind \(model.ckpt\), which can run code",
        ),
        ({"adapter_config.json": b"{}"}, "org/odd is an adapter .*--adapter DIR"),
        ({"odd-q4.gguf": b"x"}, "org/odd has GGUF files and no safetensors"),
        ({}, r"org/odd has no weights \(model.safetensors is missing\)"),
    ],
)
def test_a_model_without_safetensors(
    hub: LoopbackHub, files: dict[str, bytes], lacking: dict[str, bytes], reason: str
) -> None:
    import re

    hub.add("org/odd", {**{name: files[name] for name in files if name != WEIGHTS}, **lacking})
    assert re.match(reason, refusal("org/odd"))


def test_without_a_hub_what_is_here_is_used(
    hub: LoopbackHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.broken_with = 503
    assert "cannot be reached" in refusal() or "answered 503" in refusal()
    hub.broken_with = None
    directory = resolve_model(NAME)
    hub.broken_with = 503
    assert resolve_model(NAME) == directory
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(NAME) == directory
    (directory / WEIGHTS).unlink()
    assert "HF_HUB_OFFLINE forbids fetching it" in refusal()
    assert resolve_model(NAME, tokenizer_only=True) == directory


def test_nobody_answers(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the model hub http://127.0.0.1:9 cannot be reached" in refusal()


def test_no_room(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
        assert "are free: make room, or set HF_HOME" in refusal()

    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching._Download, "_resume", full)
    assert refusal().startswith(f"fetching '{NAME}' failed (No space left on device)")


def test_a_cache_that_cannot_be_written_to(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "which is not possible (" in refusal()
    assert "HF_HOME" in refusal()

"""Model references, conversions that were interrupted, and files that are missing or damaged: one sentence for each."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsi_workers.engines import EngineError, load_engine
from dsi_workers.models import conversion
from dsi_workers.models.files import ModelError, cache_directory, read_vocabulary_hash
from dsi_workers.models.resolve import resolve_model
from support.engines import make_tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def problem_of(reference: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(reference))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_an_interrupted_conversion_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dsi_workers.models.resolve.check_model", lambda directory, **settings: None)
    monkeypatch.setattr("dsi_workers.models.resolve.completed", lambda directory, **settings: directory)
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF, but no more")
    attempts: list[Path] = []

    def fill(directory: Path, *settings: object) -> None:
        conversion._remove_leftovers(directory)
        attempts.append(directory)
        directory.mkdir(parents=True)
        (directory / ("complete" if len(attempts) > 1 else "half")).touch()

    monkeypatch.setattr(conversion, "_fill", fill)
    first = resolve_model(str(gguf))
    (first.parent / f"{first.name}xyz123").mkdir()  # as mkdtemp names it
    assert not (first / "complete").exists()
    second = resolve_model(str(gguf))
    assert second == first
    assert (second / "complete").exists()
    assert not (second / "half").exists()
    assert sorted(path.name for path in second.parent.iterdir() if path.is_dir()) == [second.name]
    assert resolve_model(str(gguf)) == second
    assert len(attempts) == 2


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_directory() == Path("/var/cache/dsi-actors")
    own = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "dsi-actors"
    monkeypatch.setenv("XDG_CACHE_HOME", "var/cache")  # relative to whatever: the XDG specification says to ignore it
    assert cache_directory() == own
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == own
    monkeypatch.setenv("DSI_CACHE", "/elsewhere")
    assert cache_directory() == Path("/elsewhere")


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number without a name."""
    import pwd

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("DSI_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF, but no more")
    assert problem_of(gguf) == "this user has no home directory to keep models in: set DSI_CACHE to a directory"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    assert problem_of("org/name") == "this user has no home directory to keep models in: set HF_HOME to a directory"
    assert (
        problem_of("~nobody-at-all/model")
        == "the home directory in ~nobody-at-all/model does not exist: give the full path"
    )


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "file").touch()
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF, but no more")
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / place))
    problem = problem_of(gguf)
    assert problem.startswith(
        f"converting tiny.gguf needs to write to {tmp_path / place / 'models'}, which is not possible"
    )
    assert "set DSI_CACHE" in problem


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system: what was converted before is used, what was not is told."""
    import errno

    def refuse(self: Path, *arguments: object, **settings: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF, but no more")
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)
        assert "which is not possible (Read-only file system)" in problem_of(gguf)


@pytest.mark.parametrize(
    "content", [b"", b"no such thing", b"GGUF\x03\0\0\0"], ids=["empty", "something else", "cut short"]
)
def test_a_damaged_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(content)
    problem = problem_of(gguf)
    assert str(gguf) in problem
    assert "damaged" in problem
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*arguments: object, **settings: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.mkdtemp", full)
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF\x03\0\0\0")
    assert "No space left on device" in problem_of(gguf)


@pytest.mark.parametrize("files", [(), ("one.gguf", "two.gguf")])
def test_a_package_that_carries_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...]
) -> None:
    package = tmp_path / f"carries_{len(files)}"
    package.mkdir()
    for name in ("__init__.py", *files):
        (package / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert problem_of(f"package:{package.name}") == (
        f"the Python package {package.name!r} must contain one .gguf file, but it contains {len(files)}"
    )
    assert package.name not in sys.modules


def test_references_that_name_nothing(tmp_path: Path) -> None:
    assert "is empty" in problem_of("")
    assert problem_of("package:no_such_thing").startswith("no Python package 'no_such_thing' is installed")
    assert problem_of("/nowhere/x.gguf") == "there is no file /nowhere/x.gguf: check the path"
    assert "cannot be read (File name too long): check the path" in problem_of("x" * 5000)
    assert problem_of(tmp_path) == (
        f"{tmp_path} has no config.json, so it is not a transformers model: give the directory of one"
    )


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b'"text"', b"null"])
def test_a_damaged_configuration(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    assert problem_of(model).startswith(f"{model / 'config.json'} is damaged (")


def cut(size: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:size]


@pytest.mark.parametrize(
    "damage",
    [cut(0), cut(4), cut(100), cut(-1), lambda content: b"x" * len(content), lambda content: content + b"x"],
    ids=["empty", "no header", "half a header", "a byte is missing", "noise", "a byte too much"],
)
def test_damaged_weights(model: Path, damage: Callable[[bytes], bytes]) -> None:
    file = model / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert problem_of(model).startswith(f"{file} is damaged (")


@pytest.mark.parametrize(
    "index",
    [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": "../model.safetensors"}}'],
)  # fmt: skip
def test_a_damaged_index(model: Path, index: bytes) -> None:
    (model / "model.safetensors.index.json").write_bytes(index)
    assert problem_of(model).startswith(f"{model / 'model.safetensors.index.json'} is damaged")


def test_a_part_of_the_weights_is_missing(model: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert problem_of(model) == f"{model / 'more.safetensors'} is missing: fetch the model again"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"model": 3}', b"\xff"])
def test_a_tokenizer_that_cannot_be_read(model: Path, content: bytes | None) -> None:
    file = model / "tokenizer.json"
    if content is None:
        file.unlink()
        reason = f"{model} has no tokenizer.json: use a model that has one"
    else:
        file.write_bytes(content)
        reason = f"{file} is damaged ("
    with pytest.raises(ModelError) as caught:
        read_vocabulary_hash(model)
    assert str(caught.value).startswith(reason)
    with pytest.raises(EngineError) as refused:
        load_engine("transformers", role="target", model=str(model), device="cpu:0", options={})
    assert str(refused.value) == str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 2.5},
        {"rope_parameters": [1]},
        {"model_type": "no-such-model", "architectures": ["NoSuchModel"]},
        {"hidden_act": None},
        {"max_position_embeddings": "long"},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense(model: Path, changes: dict[str, object]) -> None:
    """Whatever is raised deep inside of a library: one sentence that names the model."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(EngineError) as caught:
        load_engine("transformers", role="target", model=str(model), device="cpu:0", options={"calibrate": False})
    assert str(model) in str(caught.value)
    assert "\n" not in str(caught.value)

"""Model references, and a conversion that was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsi_workers import models
from dsi_workers.models import ModelError, cache_directory, resolve_model


def test_what_an_interrupted_conversion_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF, but no more")
    attempts: list[Path] = []

    def convert(source: Path, directory: Path) -> None:
        models._remove_leftovers(directory)
        attempts.append(directory)
        directory.mkdir(parents=True)
        (directory / ("complete" if len(attempts) > 1 else "half")).touch()

    monkeypatch.setattr(models, "_convert", convert)
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
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "dsi-actors"
    monkeypatch.setenv("DSI_CACHE", "/elsewhere")
    assert cache_directory() == Path("/elsewhere")


def test_a_hub_name_without_a_hub_is_an_unknown_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"unknown model 'org/name': .* did not give it \(no network\)"):
        resolve_model("org/name")

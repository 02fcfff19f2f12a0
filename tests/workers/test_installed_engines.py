"""Engines that other packages bring: found by name among what is installed, and in no other way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsi_workers.engines import Engine, EngineError, check_known, engine_names, load_engine
from support.packages import put_on_path, write_package

CODE = """
from dsi_workers.engines import load_engine

def make(*, role, model, device, options):
    return load_engine("timed", role=role, model=model, device=device, options={"vocabulary_size": 77})

def make_nothing(**arguments):
    return None
"""


def load(name: str, role: str = "target") -> Engine:
    return load_engine(name, role=role, model="", device="cpu:0", options={})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    put_on_path(tmp_path, monkeypatch)
    return tmp_path


def test_an_installed_engine_is_known_before_it_is_imported(site: Path) -> None:
    write_package(site, "installed_one", {"theirs": "installed_one:make"}, CODE)
    assert engine_names() == ["transformers", "llama-cpp", "timed", "ngram", "theirs"]
    check_known("theirs")
    with pytest.raises(
        EngineError, match="choose one of transformers, llama-cpp, timed, ngram, theirs, or pip install"
    ):
        load("nonsense")
    assert "installed_one" not in sys.modules
    assert load("theirs").info.vocabulary_size == 77


@pytest.mark.parametrize(
    "name",
    [
        "uninstalled", "uninstalled:make", "uninstalled.make", "dsi_workers.engines.timed:TimedEngine", "os:system", "pip",
        "", "auto", "dsi_workers.engines", "__init__", "../uninstalled", "theirs:make", "theirs\n", "uninstalled:make [x]",
    ],
)  # fmt: skip
def test_what_is_no_name_of_an_installed_engine_is_not_imported(site: Path, name: str) -> None:
    """The name may have come over the wire."""
    write_package(site, "installed_two", {"theirs": "installed_two:make"}, "raise SystemExit('it ran')")
    (site / "uninstalled.py").write_text("raise SystemExit('it ran')")
    loaded = set(sys.modules)
    for use in (load, check_known):
        with pytest.raises(EngineError, match="unknown engine"):
            use(name)
    assert not {module for module in set(sys.modules) - loaded if "installed" in module}


def test_no_package_takes_the_place_of_our_own_engines(site: Path) -> None:
    write_package(site, "greedy", {"timed": "greedy:make", "ngram": "greedy:make"}, CODE)
    assert load("timed").info.vocabulary_size == 1000
    assert engine_names() == ["transformers", "llama-cpp", "timed", "ngram"]


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("broken:no_such_factory", r"'theirs' of the package broken cannot be imported \(AttributeError: .*reinstall"),
        (
            "no_such_module:make",
            r"'theirs' of the package broken cannot be imported \(ModuleNotFoundError: No module named",
        ),
        (
            "broken:make_nothing",
            "the factory of the engine 'theirs' gives a NoneType: it must give a dsi_workers.engine.Engine",
        ),
    ],
)
def test_what_a_package_has_broken_is_named(site: Path, place: str, problem: str) -> None:
    write_package(site, "broken", {"theirs": place}, CODE)
    with pytest.raises(EngineError, match=problem):
        load("theirs")


def test_two_packages_with_an_engine_of_one_name(site: Path) -> None:
    write_package(site, "one_of_two", {"theirs": "one_of_two:make"}, CODE)
    write_package(site, "two_of_two", {"theirs": "two_of_two:make"}, CODE)
    with pytest.raises(
        EngineError, match=r"'theirs' is brought by (one|two)_of_two and by (one|two)_of_two: uninstall"
    ):
        load("theirs")

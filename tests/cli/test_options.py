"""Options of all commands: each says what it does, its default is shown, and what cannot be meant is refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dsi_actors
import dsi_workers
from dsi_actors.cli.main import _parser
from dsi_actors.console.options import add_cluster_options, add_worker_options, config_from
from dsi_actors.engine_options import KNOWN
from dsi_actors.errors import ConfigError
from support.command import dsi_actors_command
from support.patience import limit_s


def options(
    parser: argparse.ArgumentParser, path: str
) -> Iterator[tuple[str, argparse.ArgumentParser, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from options(child, f"{path} {name}")
        elif action.option_strings:
            yield path, parser, action


ALL = [
    pytest.param(parser, action, id=f"{path} {action.option_strings[-1]}")
    for path, parser, action in options(_parser(), "")
]


@pytest.mark.parametrize(("parser", "action"), ALL)
def test_an_option_says_what_it_does_and_its_default(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    assert action.help
    shown = parser._get_formatter()._expand_help(action)
    if action.default not in (None, argparse.SUPPRESS, []) and not isinstance(action.default, bool):
        assert "default" in shown
        assert "default" in action.help or str(action.default) in shown


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_worker_options(parser)
    add_cluster_options(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        (["--gpu", "0,1"], ("0", "1")),
        (["--gpu", "0", "--gpu", "cpu"], ("0", "cpu")),
        (["--gpus", "4"], ("0", "1", "2", "3")),
        ([], ()),
    ],
)
def test_devices_are_listed_repeated_or_counted(words: list[str], devices: tuple[str, ...]) -> None:
    assert config_from(parsed(*words)).devices == devices


def test_engine_options_are_set_by_name() -> None:
    words = [
        "--slots", "3", "--set", "target.kernels=false", "--set", "drafter.window=16", "--set", "target.dtype=float16"
    ]  # fmt: skip
    config = config_from(parsed(*words))
    assert config.target_options == {"slots": 3, "kernels": False, "dtype": "float16"}
    assert config.drafter_options == {"slots": 3, "window": 16}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--gpus", "0"], "--gpus 0: give a number from 1 to 64"),
        (["--gpus", "2", "--gpu", "cpu"], "both say where workers run"),
        (["--set", "kernels=false"], "--set kernels=false: write target.KEY=VALUE or drafter.KEY=VALUE"),
        (
            ["--set", "target.graph=false"],
            "the engine transformers has no option graph; it has adapter, calibrate, dtype",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        config_from(parsed(*words))


def test_every_option_that_our_engines_read_can_be_set() -> None:
    folder = Path(dsi_workers.__file__).parent / "engines"
    for engine, file in (("transformers", "loading.py"), ("timed", "timed.py"), ("ngram", "ngram.py")):
        source = (folder / file).read_text(encoding="utf-8")
        read = set(re.findall(r'(?:options\.get\(|options, |number\()"(\w+)"', source))
        assert read
        assert read <= KNOWN[engine], engine


def test_each_device_of_a_worker_must_be_one() -> None:
    words = [sys.executable, "-m", "dsi_actors.worker", "--gpu", "0,one"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s(), check=False)
    assert done.returncode == 2
    assert "'one' is no device" in done.stderr


def test_a_table_that_goes_through_a_pipe_is_whole() -> None:
    done = dsi_actors_command("plan", "--target-ms", "37.7", "--drafter-ms", "2.5", "--acceptance", "0.63")
    assert "…" not in done.stdout
    [heading] = [line for line in done.stdout.splitlines() if "ms per token" in line and "GPUs" in line]
    assert "held GPU ms" in heading


def test_keys_are_listed_as_json(tmp_path: Path) -> None:
    assert dsi_actors_command("keys", "new", tmp_path / "keys", "rack-1", "rack-2").returncode == 0
    listed = json.loads(dsi_actors_command("keys", "list", tmp_path / "keys", "--json").stdout)
    assert set(listed) == {"machine", "results"}
    assert [result["name"] for result in listed["results"]] == ["rack-1", "rack-2"]


@pytest.mark.parametrize("settings", [dsi_actors.Config, dsi_actors.Sampling])
def test_help_of_a_class_of_settings_names_each_field(settings: type[Any]) -> None:
    """`help(dsi_actors.Config)` shows the docstring and nothing of comments."""
    assert settings.__doc__
    for field in dataclasses.fields(settings):
        assert f"`{field.name}`" in settings.__doc__

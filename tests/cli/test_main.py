"""What `dsi-actors` says about itself, and whether a command that a message advises works."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest

from support.command import dsi_actors_in_a_shell


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], "usage: dsi-actors [-h] [--version] COMMAND"),
        (["bench"], "usage: dsi-actors bench [-h] BENCHMARK"),
        (["keys"], "usage: dsi-actors keys [-h] ACTION"),
    ],
    ids=["dsi-actors", "bench", "keys"],
)
def test_without_a_command_it_shows_the_commands(arguments: list[str], shown: str) -> None:
    done = dsi_actors_in_a_shell(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(shown)


def test_it_says_its_version() -> None:
    done = dsi_actors_in_a_shell("--version")
    assert (done.returncode, done.stdout) == (0, f"dsi-actors {metadata.version('dsi-actors')}\n")


def test_a_key_that_is_there_is_ended_as_advised(tmp_path: Path) -> None:
    directory = tmp_path / "our keys"
    assert dsi_actors_in_a_shell("keys", "new", directory, "one").returncode == 0
    again = dsi_actors_in_a_shell("keys", "new", directory, "one")
    assert again.returncode == 1
    advised = re.search(r"choose another name, or end that worker's key for good with dsi-actors (.*)", again.stderr)
    assert advised is not None, again.stderr
    (directory / "allowed" / "one.pub").unlink()  # by hand: half of a key is one that can be ended, too
    assert dsi_actors_in_a_shell(*shlex.split(advised[1])).returncode == 0
    assert dsi_actors_in_a_shell("keys", "new", directory, "one").returncode == 0

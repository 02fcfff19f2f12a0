"""A short run of the command that harms workers and messages on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsi_actors.chaos.run import FAULTS
from support.group import make_uneven_model
from support.patience import slowness

COMMAND = [sys.executable, "-m", "dsi_actors.cli.main", "chaos"]


def chaos(*arguments: str, detection_ms: float) -> dict[str, Any]:
    more = ["--detection-ms", str(round(detection_ms * slowness())), "--json"]
    done = subprocess.run([*COMMAND, *arguments, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return dict(json.loads(done.stdout))


def test_nothing_is_lost_in_a_little_chaos() -> None:
    words = ["--faults", "18", "--pause", "0.7", "--seed", "3", "--tokens", "60", "--target-ms", "10"]
    found = chaos(*words, detection_ms=800)
    assert found["faults"] == 18
    assert len(found["faults_by_kind"]) >= 5
    assert found["generations"] >= 2
    bad = ("lost", "differing", "leaked_processes", "leaked_descriptors")
    assert {name: found[name] for name in bad} == dict.fromkeys(bad, 0)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["kill a rank", "stop a rank"])
def test_nothing_is_lost_while_ranks_of_groups_are_harmed(tmp_path: Path, kind: str) -> None:
    words = ["--tp", "2", "--target", str(make_uneven_model(tmp_path)), "--kinds", kind]
    found = chaos(*words, "--faults", "2", "--pause", "0.5", "--seed", "1", "--tokens", "60", detection_ms=2000)
    assert found["faults_by_kind"] == {kind: 2}
    assert found["workers_started_again"] >= 1
    assert found["tokens"] > 0
    bad = ("lost", "differing", "leaked_processes", "leaked_descriptors")
    assert {name: found[name] for name in bad} == dict.fromkeys(bad, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "0"], "--minutes and --pause must be above 0, --tokens at least 1"),
        (["--pause", "-1"], "--minutes and --pause must be above 0, --tokens at least 1"),
        (["--tokens", "0"], "--minutes and --pause must be above 0, --tokens at least 1"),
        (["--tp", "2"], "--tp 2: only a model can be divided among processes: give --target, too"),
        (["--engine", "llama-cpp"], "--engine llama-cpp needs a model: give --target, too"),
        (
            ["--kinds", "kill a rank"],
            f"--kinds: 'kill a rank' is no fault without --tp: choose from {', '.join(FAULTS)}",
        ),
    ],
)
def test_bad_words_are_named(arguments: list[str], said: str) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"dsi-actors: {said}\n"

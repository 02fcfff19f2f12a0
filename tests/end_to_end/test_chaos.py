"""A short run of the command that harms workers and messages on purpose."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.patience import slowness


def test_nothing_is_lost_in_a_little_chaos() -> None:
    command = [
        sys.executable,
        "-m",
        "dsi_actors.cli.main",
        "chaos",
        "--faults",
        "18",
        "--pause",
        "0.7",
        "--seed",
        "3",
    ]
    detection_ms = round(800 * slowness())
    more = ["--detection-ms", str(detection_ms), "--tokens", "60", "--target-ms", "10", "--json"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert found["faults"] == 18
    assert len(found["faults_by_kind"]) >= 5
    assert found["generations"] >= 2
    bad = ("lost", "differing", "leaked_processes", "leaked_descriptors")
    assert {name: found[name] for name in bad} == dict.fromkeys(bad, 0)


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--pause", "-1"], ["--tokens", "0"]])
def test_bad_words_are_named(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "dsi_actors.cli.main", "chaos", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "dsi-actors: --minutes and --pause must be above 0, --tokens at least 1\n"

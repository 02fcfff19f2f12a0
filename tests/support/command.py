"""`dsi-actors` as a user types it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from support.fork_server import run_forked
from support.patience import limit_s


def words(*arguments: str | bytes | Path) -> list[str | bytes | Path]:
    return [sys.executable, "-m", "dsi_actors.cli.main", *arguments]


def dsi_actors_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_forked("dsi_actors.cli.main", *arguments)


def dsi_actors_in_a_shell(
    *arguments: str | bytes | Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """With an interpreter of its own, for tests of its start, of its streams, and of what cannot be imported."""
    return subprocess.run(
        words(*arguments), capture_output=True, text=True, timeout=limit_s(180), check=False, env=env
    )  # fmt: skip

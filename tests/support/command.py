"""`dsi-actors` as a user types it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

#: A command that does not end by itself would stop here; none that a test runs takes as long, on any machine.
_TIMEOUT_S = 200


def words(*arguments: str | bytes | Path) -> list[str | bytes | Path]:
    return [sys.executable, "-m", "dsi_actors.cli.main", *arguments]


def dsi_actors_command(
    *arguments: str | bytes | Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words(*arguments), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=env
    )  # fmt: skip

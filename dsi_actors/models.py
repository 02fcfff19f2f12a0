"""From a model reference to a directory, without torch: what is missing is fetched or converted by a worker process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dsi_actors.errors import ConfigError
from dsi_actors.requirements import require


def resolve_model(reference: str) -> Path:
    """The directory with the model's tokenizer and configuration. May take a while, once. Raises ConfigError."""
    require(f"the model {reference!r}", models=[reference])
    path = Path(reference).expanduser()
    if (path / "tokenizer.json").is_file():
        return path
    prepared = subprocess.run(
        [sys.executable, "-m", "dsi_actors.worker", "--prepare", reference, "--tokenizer-only"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=None, text=True, check=False,
    )  # fmt: skip
    if prepared.returncode:
        raise ConfigError(f"the model {reference!r} cannot be used (see above)")
    return Path(prepared.stdout.strip().splitlines()[-1])

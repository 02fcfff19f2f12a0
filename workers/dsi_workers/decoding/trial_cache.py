"""Keeps the results of trials, such as which widths agree, in the user's cache directory, because finding them takes seconds.

A result is kept for facts: texts that tell all that it depends on. The processor and this package's code belong to them always.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsi_workers.models.files import ModelError, cache_directory


def read_trial(facts: Iterable[str]) -> dict[str, Any]:
    """Return what `keep_trial` kept for these facts. Empty if there is nothing."""
    try:
        kept = json.loads(_file(facts).read_text(encoding="utf-8"))
    except (OSError, ValueError, ModelError):
        return {}
    return kept if isinstance(kept, dict) else {}


def keep_trial(facts: Iterable[str], found: Mapping[str, object]) -> None:
    """Keep the result of a trial."""
    with contextlib.suppress(OSError, ModelError):  # a cache that cannot be written to costs only time
        file = _file(facts)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as written:
            json.dump(found, written)
        Path(written.name).replace(file)


def directory_for(kind: str) -> Path | None:
    """A directory in the user's cache for what is made at the first use. None: nothing can be kept on this machine."""
    try:
        directory = cache_directory() / kind
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ModelError):
        return None
    return directory if os.access(directory, os.W_OK) else None


def _file(facts: Iterable[str]) -> Path:
    """Raises ModelError if the user has no home directory."""
    key = hashlib.sha256("\0".join([*facts, _processor(), _code_digest()]).encode()).hexdigest()[:16]
    return cache_directory() / "trials" / f"{key}.json"


def _processor() -> str:
    """Model and features of this machine's processor."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor()
    kinds = ("model name", "stepping", "microcode", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in file.read_text().splitlines() if line.startswith(kinds)}))


@functools.cache
def _code_digest() -> str:
    """A hash of this package's code, and the version of transformers, whose layers a model may use."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    from importlib import metadata

    return digest.hexdigest() + metadata.version("transformers")

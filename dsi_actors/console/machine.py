"""What a benchmark ran on, which every bench prints beside its figures, and what processes used meanwhile."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import psutil

from dsi_actors.host.devices import cores


def describe_machine() -> dict[str, object]:
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("dsi-actors", "torch", "transformers", "pyzmq", "uvloop")},
    }


def memory_of(process: int) -> dict[str, int]:
    """Resident memory of a process, and the part that it shares with no other. Empty if this user may not see it, or if the
    process is gone."""
    try:
        memory = psutil.Process(process).memory_full_info()
    except psutil.Error:
        return {}
    return {"resident_bytes": memory.rss, "private_bytes": memory.uss}


def processor_s_of(process: int) -> float:
    """Seconds of a processor that a process has used, without its children. 0 if the process is gone."""
    try:
        used = psutil.Process(process).cpu_times()
    except psutil.Error:
        return 0.0
    return float(used.user + used.system)


def _cpu_model() -> str:
    """The name of the processor, which psutil does not tell."""
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

"""What a benchmark ran on: every bench prints it beside its figures."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path


def describe_machine() -> dict[str, object]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("dsi-actors", "torch", "transformers", "pyzmq", "uvloop")},
    }


def memory_of(process: int) -> dict[str, int]:
    """Resident memory of a process, and the part that it shares with no other. Empty where /proc does not tell."""
    file = Path(f"/proc/{process}/smaps_rollup")
    if not file.is_file():
        return {}
    sizes = {line.partition(":")[0]: int(line.split()[1]) for line in file.read_text().splitlines()[1:]}
    return {
        "resident_bytes": sizes["Rss"] * 1024,
        "private_bytes": (sizes["Private_Clean"] + sizes["Private_Dirty"]) * 1024,
    }


def processor_s_of(process: int) -> float:
    """Seconds of a processor that a process has used. 0 where /proc does not tell."""
    file = Path(f"/proc/{process}/stat")
    if not file.is_file():
        return 0.0
    user, system = file.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
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

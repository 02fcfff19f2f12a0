"""Which devices local workers run on, found out without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dsi_actors.errors import ConfigError

#: Each has weights of its own, and the memory's speed is shared.
_MOST_ON_A_CPU = 2


def device_name(text: str) -> str:
    """What `--gpu` takes as torch names it: 0 is cuda:0, cpu is cpu:0, cpu:1 is itself. Raises ConfigError."""
    if text.isdecimal():
        return f"cuda:{int(text)}"
    if match := re.fullmatch(r"cpu(?::(\d+))?", text):
        return f"cpu:{int(match[1] or 0)}"
    raise ConfigError(f"{text!r} is no device: give a CUDA device number, cpu or cpu:N")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def crowding(devices: Sequence[str], threads: int) -> str | None:
    """What is wrong if a worker that computes is started on each of these devices (as for local_devices); None: nothing."""
    names = [device_name(device) for device in devices]
    on_cpu = sum(name.startswith("cpu") for name in names)
    if on_cpu * threads > cores():
        return f"{on_cpu} workers with {threads} thread(s) each share {cores()} core(s): they slow one another down"
    for name in names:
        if not name.startswith("cpu") and names.count(name) > 1:
            return f"{names.count(name)} workers share {name}: they take turns"
    return None


def servers_beside_drafters(wanted: Sequence[str], drafters: int, *, threads: int) -> int:
    """Local target servers for these devices (as for local_devices), if each worker shall have one for itself: a GPU, or on a
    CPU so many cores as it has threads. Of several drafters, a generation keeps one busy. At least one; on a CPU at most two."""
    devices = local_devices(wanted)
    if all(device_name(device).startswith("cpu") for device in devices):
        return max(1, min(_MOST_ON_A_CPU, cores() // threads - min(1, drafters)))
    return max(1, len(set(devices)) - drafters)


def local_devices(wanted: Sequence[str]) -> list[str]:
    """The devices to use in turn, as `--gpu` takes them: those wanted, else every visible CUDA device, else the CPU."""
    if wanted:
        return list(wanted)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    else:
        count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return [str(number) for number in range(count)] or ["cpu"]

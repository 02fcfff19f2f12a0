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
    """Those that this process may use; on macOS, which does not tell them, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def crowding(targets: Sequence[str], drafters: Sequence[str], threads: int) -> str | None:
    """What is wrong if workers that compute are started on these devices (as for local_devices; of a group several, with commas
    between); None: nothing. Of several drafters one computes for a generation."""
    targets = [device for group in targets for device in group.split(",")]
    on_cpu = [name for name in map(device_name, targets) if name.startswith("cpu")]
    on_cpu += [name for name in map(device_name, drafters) if name.startswith("cpu")][:1]
    if len(on_cpu) * threads > cores():
        each = "1 thread" if threads == 1 else f"{threads} threads"
        return f"{len(on_cpu)} workers with {each} each have {cores()} cores: they slow one another down"
    on_gpus = [name for name in map(device_name, [*targets, *drafters]) if not name.startswith("cpu")]
    crowd = next((name for name in on_gpus if on_gpus.count(name) > 1), None)
    return None if crowd is None else f"{on_gpus.count(crowd)} workers share {crowd}: they take turns"


def servers_beside_drafters(wanted: Sequence[str], drafters: int, *, threads: int, each: int = 1) -> int:
    """Local target servers for these devices (as for local_devices), if a drafter shall have one for itself, and a target server
    `each`: GPUs, or on a CPU so many cores as it has threads. Of several drafters, a generation keeps one busy. At least one; on
    a CPU at most two."""
    devices = local_devices(wanted)
    if all(device_name(device).startswith("cpu") for device in devices):
        return max(1, min(_MOST_ON_A_CPU, (cores() // threads - min(1, drafters)) // each))
    return max(1, (len(set(devices)) - drafters) // each)


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

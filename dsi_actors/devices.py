"""Which devices local workers run on, found out without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dsi_actors.errors import ConfigError


def device_name(text: str) -> str:
    """What `--gpu` takes as torch names it: 0 is cuda:0, cpu is cpu:0, cpu:1 is itself. Raises ConfigError."""
    if text.isdecimal():
        return f"cuda:{int(text)}"
    if match := re.fullmatch(r"cpu(?::(\d+))?", text):
        return f"cpu:{int(match[1] or 0)}"
    raise ConfigError(f"{text!r} is no device: give a CUDA device number, cpu or cpu:N")


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

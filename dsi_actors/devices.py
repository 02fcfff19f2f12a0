"""Which devices local workers run on, found out without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


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

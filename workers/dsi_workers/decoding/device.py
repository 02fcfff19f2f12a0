"""What an engine asks of the machine: a device that is there, and memory that stays."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from dsi_workers.engine import EngineError


def torch_device(name: str) -> torch.device:
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index) >= count:
        has = f"this machine has {count}" if count else "this machine has no CUDA device; --gpu cpu runs on the CPU"
        raise EngineError(f"there is no GPU {index}: {has}")
    torch.cuda.set_device(int(index))
    return torch.device(name)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device. None: it is not known. For a CPU it is what the system can give without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # another system than Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def keep_freed_memory() -> None:
    """Give back what loading needed, once. From then on stop glibc from giving large blocks back after each forward:
    at long contexts the page faults that follow can cost as much as the forward itself."""
    if os.uname().sysname == "Linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
        except OSError:  # another C library
            return
        libc.malloc_trim(0)
        m_mmap_threshold, m_trim_threshold = -3, -1
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 1 << 30)

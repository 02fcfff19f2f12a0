"""Settings of the machine for an engine: choose the device, and keep freed memory in the process."""

from __future__ import annotations

import ctypes
import os

import psutil
import torch

from dsi_workers.engine import EngineError


def torch_device(name: str) -> torch.device:
    """Return the device with this name, such as "cpu:0" or "cuda:1", and select it. Raises EngineError if it is missing."""
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index) >= count:
        has = f"this machine has {count}" if count else "this machine has no CUDA device; --gpu cpu runs on the CPU"
        raise EngineError(f"there is no GPU {index}: {has}")
    torch.cuda.set_device(int(index))
    return torch.device(name)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device. For a CPU it is what the system can give without swapping."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def total_bytes(device: torch.device) -> int:
    """All memory of the device, free or not."""
    return int(torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total)


def keep_freed_memory() -> None:
    """Stop glibc from returning large freed blocks to the system after each forward pass.

    With long contexts, the page faults for getting such blocks again can take as long as the forward pass. Memory that loading
    the model has freed is returned once, before that.
    """
    if os.uname().sysname == "Linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
        except OSError:  # another C library
            return
        libc.malloc_trim(0)
        m_mmap_threshold, m_trim_threshold = -3, -1
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 1 << 30)

"""What benchmarks say of the machine and of processes, also of one that has ended meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from dsi_actors.console.machine import describe_machine, memory_of, processor_s_of
from dsi_actors.host.devices import cores


def test_the_machine_has_memory_and_cores() -> None:
    machine = describe_machine()
    assert machine["memory_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine["cores"] == cores()
    assert machine["cpu"]


def test_memory_and_time_of_a_process_are_its_own() -> None:
    before, used_s = memory_of(os.getpid()), processor_s_of(os.getpid())
    held = bytearray(os.urandom(1 << 20) * 64)
    begun_s = time.process_time()
    while time.process_time() - begun_s < 0.1:
        pass
    after = memory_of(os.getpid())
    assert 0 < after["private_bytes"] <= after["resident_bytes"]
    assert after["private_bytes"] - before["private_bytes"] > len(held) // 2
    assert 0.05 < processor_s_of(os.getpid()) - used_s <= time.process_time()


def test_a_process_that_has_ended_uses_nothing() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert memory_of(ended.pid) == {}
    assert processor_s_of(ended.pid) == 0.0

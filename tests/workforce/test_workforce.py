"""What the workforce decides about a worker when time passed that no worker could use."""

from __future__ import annotations

from dsi_actors.config import Config
from dsi_actors.workforce.members import Member
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_actors.workforce.workforce import Workforce
from dsi_protocol import Hello, Ready, Welcome


def test_a_process_that_stood_still_gives_a_broken_connection_that_time_back() -> None:
    config = Config(listen="tcp://127.0.0.1:*")
    workforce = Workforce(config, lambda worker: None, lambda worker: None, lambda worker, done: None)
    handle = WorkerHandle(1, b"w", Hello(1, 7, "target", "auto", "", "cpu:0", "host", 1), "target", lambda _: None)
    handle.ready = Ready("", 100, 100, 8, 1, 1, 1, 1, 1, 0)
    member = Member(handle, Welcome(1, "target", "timed", "", {}, 250, 2000), 100.0, 100.0, 100.0, unreachable_s=100.2)
    workforce._members.add(member)
    workforce._forgive(late_s=10.0, now_s=110.3)
    assert member.why_dead(110.3, config) is None, "for the process it was broken for 0.1 s"
    assert member.since_s == 110.0, "the time to load begins later, too"
    assert member.why_dead(111.0, config) == "its connection is gone"

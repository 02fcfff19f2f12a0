"""Workers that cannot serve beside the others are refused, and only while there are others."""

from __future__ import annotations

from dsi_actors.workforce.compatibility import Compatibility
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import Hello, Ready

MEMORY_S = 60.0


def ready(fingerprint: int = 0, vocabulary: str = "v", devices: int = 1) -> Ready:
    return Ready(vocabulary, 100, 100, 8, 1, 1, 4, 1, 1, fingerprint, devices=devices)


def worker(number: int, role: str = "target") -> WorkerHandle:
    return WorkerHandle(number, b"", Hello(1, number, role, "auto", "", "cpu:0", "host", 1), role, lambda _: None)


def begun() -> Compatibility:
    compatibility = Compatibility(MEMORY_S)
    assert not compatibility.known
    compatibility.target_is(ready())
    return compatibility


def test_two_that_say_different_ones_are_never_there_together() -> None:
    """Also where the first one says nothing."""
    compatibility = begun()
    assert compatibility.why_not(worker(1), ready(0), 0.0) is None
    assert compatibility.why_not(worker(2), ready(5), 0.0) is None
    assert "different bits" in (compatibility.why_not(worker(3), ready(6), 0.0) or "")
    assert compatibility.why_not(worker(4), ready(5), 0.0) is None
    assert compatibility.why_not(worker(5), ready(0), 0.0) is None
    assert compatibility.why_not(worker(6, "drafter"), ready(6), 0.0) is None


def test_once_all_have_left_and_nobody_can_wait_for_them_others_may_come() -> None:
    compatibility = begun()
    first, second = worker(1), worker(2)
    for each in (first, second):
        assert compatibility.why_not(each, ready(5), 0.0) is None
    compatibility.left(first, 10.0)
    assert compatibility.why_not(worker(3), ready(6), 1000.0) is not None
    compatibility.left(second, 1000.0)
    assert compatibility.why_not(worker(3), ready(6), 1000.0 + MEMORY_S - 1) is not None
    assert compatibility.why_not(worker(4), ready(6), 1000.0 + MEMORY_S + 1) is None
    assert compatibility.why_not(worker(5), ready(5), 1000.0 + MEMORY_S + 1) is not None


def test_who_speaks_in_other_tokens_is_refused() -> None:
    compatibility = begun()
    for role in ("target", "drafter"):
        assert f"the {role}'s vocabulary" in (compatibility.why_not(worker(1, role), ready(vocabulary="w"), 0.0) or "")
        assert compatibility.why_not(worker(1, role), ready(vocabulary=""), 0.0) is None


def test_servers_of_another_number_of_devices_are_refused_with_that_reason() -> None:
    compatibility = begun()
    assert compatibility.why_not(worker(1), ready(5), 0.0) is None
    reason = compatibility.why_not(worker(2), ready(6, devices=2), 0.0) or ""
    assert "it computes on 2 devices together, and the target servers here on 1 device" in reason
    compatibility.left(worker(1), 1.0)
    assert compatibility.why_not(worker(2), ready(6, devices=2), 2.0 + MEMORY_S) is None
    assert "on 1 device, and the target servers here on 2 devices" in (
        compatibility.why_not(worker(3), ready(5), 2.0 + MEMORY_S) or ""
    )

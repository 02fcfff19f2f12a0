"""What a generation's account counts."""

from __future__ import annotations

import time

import pytest

from dsi_actors.generation.account import Account


def test_it_counts_the_time_in_which_something_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    counted = Account()
    counted.verification_began()
    now_s = 1.0
    counted.verification_began()
    assert counted.verified_ms == 1000, "the one that runs counts, too"
    now_s = 3.0
    counted.verification_ended()
    now_s = 4.0
    counted.verification_ended()
    now_s = 10.0
    assert counted.verified_ms == 4000, "two at the same time count once, and rests do not"
    counted.verification_began()
    now_s = 10.5
    assert counted.verified_ms == 4500

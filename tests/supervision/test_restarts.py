"""Restarts: at once, then later and later, and not for ever."""

from __future__ import annotations

from dsi_actors.supervision.restarts import RestartBudget


def test_delays_double_and_end() -> None:
    budget = RestartBudget(5, 60.0)
    assert [budget.delay_s(now_s) for now_s in range(6)] == [0.0, 0.25, 0.5, 1.0, 2.0, None]


def test_what_is_long_ago_is_forgotten() -> None:
    budget = RestartBudget(2, 60.0)
    assert [budget.delay_s(0.0), budget.delay_s(1.0), budget.delay_s(2.0)] == [0.0, 0.25, None]
    assert budget.delay_s(60.5) == 0.25
    assert budget.delay_s(200.0) == 0.0


def test_one_that_served_is_started_again_at_once() -> None:
    budget = RestartBudget(3, 60.0)
    assert [budget.delay_s(float(now_s), served_s=9.0) for now_s in range(4)] == [0.0, 0.0, 0.0, None]


def test_none_at_all() -> None:
    assert RestartBudget(0, 60.0).delay_s(0.0) is None

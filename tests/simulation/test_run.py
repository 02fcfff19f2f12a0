"""The simulator agrees with the closed forms within 1 %, replays what it is given, and DSI loses no single run."""

from __future__ import annotations

import functools
import statistics
from dataclasses import replace

import pytest

from dsi_actors.planning.estimates import flat
from dsi_actors.planning.search import best_si
from dsi_actors.results import Trace
from dsi_actors.simulation.run import Scenario, simulate

PAIRS = [(20.6, 6.8, 0.93), (37.7, 2.5, 0.63), (20.0, 6.0, 0.5)]


@functools.cache
def mean_ms(
    scenario: Scenario, algorithm: str, *, sp: int = 1, lookahead: int | None = None, tokens: int, repeats: int = 4
) -> float:
    runs = simulate(scenario, algorithm, sp=sp, lookahead=lookahead, tokens=tokens, repeats=repeats, seed=3)
    return statistics.fmean(run.ms_per_token for run in runs)


@pytest.mark.parametrize(("target_ms", "drafter_ms", "acceptance"), PAIRS)
def test_closed_forms(target_ms: float, drafter_ms: float, acceptance: float) -> None:
    """With the share of drafts that were right in these runs, which chance has made another one than `acceptance`."""
    scenario = Scenario(target_ms=target_ms, drafter_ms=drafter_ms, acceptance=acceptance)

    def means(algorithm: str, *, sp: int = 1, lookahead: int | None = None, tokens: int) -> tuple[float, float]:
        runs = simulate(scenario, algorithm, sp=sp, lookahead=lookahead, tokens=tokens, repeats=5, seed=3)
        rate = statistics.fmean(run.acceptance_rate for run in runs)
        return statistics.fmean(run.ms_per_token for run in runs), rate

    assert means("ar", tokens=100)[0] == pytest.approx(target_ms)
    for lookahead in (1, 5):
        si_ms, rate = means("si", lookahead=lookahead, tokens=1500)
        expected_ms = (lookahead * drafter_ms + target_ms) * (1 - rate) / (1 - rate ** (lookahead + 1))
        assert si_ms == pytest.approx(expected_ms, rel=0.01)
    dsi_ms, rate = means("dsi", sp=16, lookahead=1, tokens=500)
    assert rate == pytest.approx(acceptance, abs=0.05)
    assert dsi_ms == pytest.approx(rate * drafter_ms + (1 - rate) * target_ms, rel=0.01)


@pytest.mark.parametrize(("jitter", "share"), [(0.0, 0.05), (0.0, 0.7), (0.0, 1.2), (0.3, 0.05)])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("sp", [1, 4])
def test_never_slower_in_the_mean(jitter: float, share: float, acceptance: float, sp: int) -> None:
    scenario = Scenario(target_ms=10.0, drafter_ms=10 * share, acceptance=acceptance, jitter=jitter)
    si = best_si(flat(10.0), 10 * share, acceptance).lookahead
    noise = 1 + 0.01 * (jitter > 0)
    dsi_ms = mean_ms(scenario, "dsi", sp=sp, tokens=500, repeats=8)
    assert dsi_ms <= mean_ms(scenario, "ar", tokens=500, repeats=8) * max(noise, 1.002), (
        "now and then it hopes for drafts"
    )
    assert dsi_ms <= mean_ms(scenario, "si", lookahead=si, tokens=500, repeats=8) * max(noise, 1.003)


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.6, 0.9])
def test_at_once_dsi_is_not_slower_than_ar_in_any_single_run(acceptance: float) -> None:
    scenario = Scenario(target_ms=10.0, drafter_ms=3.0, acceptance=acceptance)
    for lookahead, sp in ((1, 4), (2, 2), (4, 1)):
        for run in simulate(scenario, "dsi", sp=sp, lookahead=lookahead, tokens=60, repeats=25, seed=5):
            assert run.ms_per_token <= 10.0 + 1e-9


def test_nothing_known_at_the_start_costs_little() -> None:
    scenario = Scenario(target_ms=20.0, drafter_ms=1.0, acceptance=0.8)
    runs = {
        calibrated: simulate(
            scenario, "dsi", sp=2, lookahead=None, tokens=300, repeats=1, seed=1, calibrated=calibrated
        )[0].ms_per_token
        for calibrated in (True, False)
    }
    assert runs[False] < runs[True] * 1.15


def test_a_trace_is_replayed() -> None:
    trace = Trace(target_ms=(10.0, 30.0), drafter_ms=(1.0,), accepted=(True, True, False))
    scenario = Scenario(target_ms=99.0, drafter_ms=99.0, acceptance=0.0, trace=trace)
    [ar] = simulate(scenario, "ar", sp=1, lookahead=None, tokens=40, repeats=1, seed=0)
    assert ar.ms_per_token == 20.0
    [si] = simulate(scenario, "si", sp=1, lookahead=2, tokens=30, repeats=1, seed=0)
    assert (si.target_forwards, si.acceptance_rate) == (10, 1.0), "two drafts right, and the third is the target's"


def test_a_cancel_that_takes_longer_costs_time() -> None:
    def ms(cancel_ms: float) -> float:
        return mean_ms(
            Scenario(target_ms=20.0, drafter_ms=2.0, acceptance=0.7, cancel_ms=cancel_ms), "dsi", sp=2, tokens=500
        )

    at_once, per_layer, never = ms(0.0), ms(1.0), ms(1e9)
    assert at_once <= per_layer * 1.001
    assert per_layer < never


def test_seeds_are_all_there_is_to_chance() -> None:
    scenario = Scenario(target_ms=20.0, drafter_ms=2.0, acceptance=0.7, jitter=0.5)
    first, again = (simulate(scenario, "dsi", sp=2, lookahead=None, tokens=50, repeats=3, seed=9) for _ in range(2))
    assert first == again
    assert len({run.ms_per_token for run in first}) == 3


@pytest.mark.parametrize("sp", [1, 7])
@pytest.mark.parametrize("second", [(0.1, 0.1), (2.5, 0.63), (30.0, 0.9)])
def test_a_second_drafter_saves_rejections_and_one_that_is_poor_costs_nothing(
    second: tuple[float, float], sp: int
) -> None:
    alone = Scenario(target_ms=37.7, drafter_ms=2.5, acceptance=0.63)
    both = replace(alone, second_drafter_ms=second[0], second_acceptance=second[1])
    for lookahead in (3, None):
        alone_ms, both_ms = (mean_ms(each, "dsi", sp=sp, lookahead=lookahead, tokens=200) for each in (alone, both))
        assert both_ms <= alone_ms * 1.01
        if second == (2.5, 0.63):
            assert both_ms < alone_ms * 0.9


def test_two_drafters_are_not_slower_than_ar_in_any_single_run() -> None:
    scenario = Scenario(
        target_ms=10.0, drafter_ms=3.0, acceptance=0.3, second_drafter_ms=0.5, second_acceptance=0.2, jitter=0.0
    )
    for lookahead, sp in ((1, 4), (2, 2), (4, 1)):
        for run in simulate(scenario, "dsi", sp=sp, lookahead=lookahead, tokens=60, repeats=20, seed=5):
            assert run.ms_per_token <= 10.0 + 1e-9

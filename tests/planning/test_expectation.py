"""Expected times: closed forms, the simulator, and the promise that the chosen policy loses to neither AR nor SI."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsi_actors.core import Policy
from dsi_actors.planning import search
from dsi_actors.planning.arms import ArmChoice, Arms
from dsi_actors.planning.controller import Controller
from dsi_actors.planning.estimates import Estimates, flat
from dsi_actors.planning.expectation import Branching, Expectation, equation_1_servers, expect, limit
from dsi_actors.planning.search import TIE, best_dsi, best_in_turns, best_si, with_rows
from dsi_actors.planning.tuner import Tuner
from dsi_actors.simulation.run import Scenario, simulate_once

PAIRS = [
    (20.6, 6.8, 0.93),
    (49.6, 33.4, 0.87),
    (37.7, 2.5, 0.63),
    (29.4, 2.5, 0.67),
    (20.0, 1.0, 0.25),
    (20.0, 1.0, 0.97),
]


@pytest.mark.parametrize(("target_ms", "drafter_ms", "acceptance"), PAIRS)
def test_with_enough_servers_dsi_is_the_papers_closed_form(
    target_ms: float, drafter_ms: float, acceptance: float
) -> None:
    policy = Policy.distributed(1, equation_1_servers(target_ms, drafter_ms))
    expected = expect(policy, flat(target_ms), drafter_ms, acceptance).ms_per_token
    assert expected == pytest.approx(acceptance * drafter_ms + (1 - acceptance) * target_ms, rel=1e-3)


@pytest.mark.parametrize(("target_ms", "drafter_ms", "acceptance"), PAIRS)
@pytest.mark.parametrize("sp", [1, pytest.param(2, marks=pytest.mark.long), 3, pytest.param(7, marks=pytest.mark.long)])
def test_the_expectation_is_what_the_core_does(target_ms: float, drafter_ms: float, acceptance: float, sp: int) -> None:
    scenario = Scenario(target_ms=target_ms, drafter_ms=drafter_ms, acceptance=acceptance)
    policies = [best_si(flat(target_ms), drafter_ms, acceptance)] if sp == 1 else []
    policies.append(best_dsi(flat(target_ms), drafter_ms, acceptance, sp))
    if drafter_ms < target_ms / 3:
        policies.append(Policy.distributed(3, sp, 2, max_ahead=64, span=4))
    for policy in policies:
        expected = expect(policy, flat(target_ms), drafter_ms, acceptance)
        run = simulate_once(scenario, Fixed(policy), tokens=4_000, seed=1)
        assert run.ms_per_token == pytest.approx(expected.ms_per_token, rel=0.03), policy
        assert run.target_forwards / run.tokens == pytest.approx(expected.target_forwards, rel=0.1), policy


class Fixed(Controller):
    """A controller with one policy."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(Tuner("ar", policy.sp, policy.lookahead, Estimates()), ArmChoice(Arms(), left_to_us=False))
        self._only = policy

    def begin(self) -> Policy:
        return self._only


@example(share=0.99999, acceptance=0.96875, sp=2, window_cost=1.125)
@settings(max_examples=150)
@given(
    share=st.floats(0.02, 1.5), acceptance=st.floats(0, 1), sp=st.integers(1, 8), window_cost=st.floats(1, 3),
)  # fmt: skip
def test_the_best_dsi_is_never_slower_than_ar_or_the_best_si(
    share: float, acceptance: float, sp: int, window_cost: float
) -> None:
    cost_ms = Estimates(1.0, window_cost, 8).cost_ms
    dsi = expect(best_dsi(cost_ms, share, acceptance, sp, most=7), cost_ms, share, acceptance)
    si = expect(best_si(cost_ms, share, acceptance, most=7), cost_ms, share, acceptance)
    assert dsi.ms_per_token <= 1.0 + TIE  # of what is equally fast, what keeps servers less busy is best
    assert dsi.ms_per_token <= si.ms_per_token * 1.005


@pytest.mark.parametrize(("servers", "lookahead"), [(8, 1), (4, 2), (1, 8)])
def test_equation_1(servers: int, lookahead: int) -> None:
    assert equation_1_servers(20.0, 2.5, lookahead) == servers


def test_a_verification_costs_a_line_up_to_each_window() -> None:
    cost_ms = Estimates(target_ms=50, window_ms=106, window=8).cost_ms
    assert [cost_ms(positions) for positions in (1, 8, 9, 16)] == [50, 106, 156, 212]
    assert cost_ms(2) == 58
    assert [cost_ms(1, 40), cost_ms(8, 40), cost_ms(9, 1)] == [50 + 320, 106 + 320, 156 + 8], (
        "branches share the last forward"
    )


@pytest.mark.parametrize("sp", [3, 7])
def test_trees_larger_than_a_window_are_planned(sp: int) -> None:
    """Where rows cost nothing, few rows were planned: beyond a window, branches were thought to need a second forward."""
    branching = Branching(0.55, rows=1024)
    planned = best_dsi(Estimates(26, 26, 32).cost_ms, 2.5, 0.59, sp, branching, most=31)
    best = best_dsi(flat(26), 2.5, 0.59, sp, branching)
    assert planned.rows == best.rows > 4


def test_a_burst_of_drafts_is_verified_at_once() -> None:
    """Two drafts come while one verification runs, so any longer one is as good, until there are more for once."""
    known = Estimates(2.5, 3.6, 8)
    assert best_dsi(known.cost_ms, 1.0, 0.9, 1, most=7).span == 7


@pytest.mark.parametrize(("target_ms", "drafter_ms", "acceptance"), PAIRS)
def test_where_drafter_and_target_take_turns_nothing_overlaps(
    target_ms: float, drafter_ms: float, acceptance: float
) -> None:
    """DSI is SI then, on however many servers: one verification at a time, and no draft meanwhile; or plain decoding."""
    policy = best_in_turns(flat(target_ms), drafter_ms, acceptance, 3)
    si = best_si(flat(target_ms), drafter_ms, acceptance)
    best_ms = min(target_ms, expect(si, flat(target_ms), drafter_ms, acceptance).ms_per_token)
    scenario = Scenario(target_ms=target_ms, drafter_ms=drafter_ms, acceptance=acceptance)
    run = simulate_once(scenario, Fixed(policy), tokens=4_000, seed=1)
    assert (policy.algorithm, policy.sp) == ("dsi", 3)
    assert run.ms_per_token == pytest.approx(best_ms, rel=0.03)
    busy_ms = run.target_busy_ms + run.drafter_busy_ms
    assert busy_ms <= 1.03 * run.ms_per_token * run.tokens


@pytest.mark.parametrize("sp", [1, 2, 7, 50])
def test_a_drafter_that_takes_no_time_does_not_send_a_message_for_each_token(sp: int) -> None:
    policy = best_dsi(flat(1.2), 0.003, 0.85, sp)
    assert 1.2 / (0.003 * policy.lookahead) <= max(32, 2 * sp)


def mean_ms(scenario: Scenario, policy: Policy, *, runs: int, tokens: int) -> tuple[float, float]:
    """Milliseconds per token over some short runs, and the standard error of that. Short ones differ enough to tell it."""
    each = [simulate_once(scenario, Fixed(policy), tokens=tokens, seed=seed).ms_per_token for seed in range(runs)]
    return statistics.fmean(each), statistics.stdev(each) / math.sqrt(runs)


@pytest.mark.parametrize(("target_ms", "drafter_ms", "acceptance"), [PAIRS[0], PAIRS[2], (12.0, 1.0, 0.75)])
@pytest.mark.parametrize("sp", [1, 3])
def test_the_expectation_of_trees_is_what_the_core_does(
    target_ms: float, drafter_ms: float, acceptance: float, sp: int
) -> None:
    scenario = Scenario(target_ms=target_ms, drafter_ms=drafter_ms, acceptance=acceptance, alternatives=0.5)
    branching = Branching(0.5, rows=32)
    chains = [best_dsi(flat(target_ms), drafter_ms, acceptance, sp)]
    if sp == 1:
        chains.append(best_si(flat(target_ms), drafter_ms, acceptance))
    for policy in (with_rows(chain, 8) for chain in chains):
        expected = expect(policy, flat(target_ms), drafter_ms, acceptance, branching).ms_per_token
        found, error = mean_ms(scenario, policy, runs=8, tokens=250)
        assert abs(found - expected) <= 0.03 * expected + 2 * error, policy


#: The pairs of the published measurements.
PUBLISHED = [(37.7, 2.5, 0.63), (26.0, 2.5, 0.59), (12.0, 1.0, 0.75), (5.5, 0.9, 0.8), (20.6, 6.8, 0.93)]


@pytest.mark.parametrize(("target_ms", "drafter_ms", "acceptance"), PUBLISHED)
def test_the_limit_of_a_tree_is_what_the_core_does_with_enough_servers(
    target_ms: float, drafter_ms: float, acceptance: float
) -> None:
    """To within 2 %, as far as so many tokens can tell."""
    chance = 0.5
    scenario = Scenario(target_ms=target_ms, drafter_ms=drafter_ms, acceptance=acceptance, alternatives=chance)
    servers = equation_1_servers(target_ms, drafter_ms) + 2
    policy = with_rows(Policy.distributed(1, servers, max_ahead=8 * servers), 16)
    found, error = mean_ms(scenario, policy, runs=8, tokens=250)
    expected = limit(target_ms, drafter_ms, acceptance, chance)
    assert abs(found - expected) <= 0.02 * expected + 2 * error


def test_a_drafter_is_faster_while_nothing_is_verified() -> None:
    """Blocks of four, each verified in the time of two drafts; the other two take half as long if they are drafted alone. Nothing
    is rejected, so three quarters of a draft's time for each token, and one without that."""
    policy = Policy.distributed(4, 1, max_ahead=64)
    for alone, each in ((0.5, 0.75), (1.0, 1.0)):
        expected = expect(policy, flat(20.0), 10.0, 1.0, alone=alone)
        assert expected.ms_per_token == pytest.approx(10.0 * each, rel=0.01)
    always = expect(Policy.distributed(1, 4, max_ahead=64), flat(20.0), 10.0, 1.0, alone=0.5)
    assert always.ms_per_token == pytest.approx(10.0, rel=0.05), "something is verified all the time"


def test_where_both_slow_one_another_down_less_is_verified_at_once_and_more_together() -> None:
    """SmolLM2 and its copy in 4 bits on two cores: both take a third less if the other one rests."""
    cost_ms = Estimates(13.2, 20.3, 8).cost_ms
    beside, alone = (best_dsi(cost_ms, 6.35, 0.96, 1, most=7, alone=share) for share in (1.0, 0.67))
    assert beside.lookahead == 1
    assert alone.lookahead > 2
    old, new = (expect(policy, cost_ms, 6.35, 0.96, alone=0.67).ms_per_token for policy in (beside, alone))
    assert new < 0.95 * old


def test_without_alternatives_the_limit_is_that_of_a_chain() -> None:
    assert limit(20.0, 2.0, 0.75) == pytest.approx(0.75 * 2 + 0.25 * 20)
    assert limit(2.0, 20.0, 0.75) == 2.0, "a slow drafter is of no use"


def test_a_search_is_made_of_short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages of workers wait for a step of it while a generation runs. It took up to 14 ms in one piece."""
    asked = 0

    def counted(*args: Any, **kwargs: Any) -> Expectation:
        nonlocal asked
        asked += 1
        return expect(*args, **kwargs)

    monkeypatch.setattr(search, "expect", counted)
    known = Estimates(20.0, 30.0, 32).cost_ms, 3.0, 0.8, 3, Branching(0.35, rows=1024)
    steps, longest = search.search_dsi(*known), 0
    while True:
        before = asked
        try:
            next(steps)
        except StopIteration as end:
            policy = end.value
            break
        longest = max(longest, asked - before)
    assert policy == best_dsi(*known)
    assert longest <= 2


@pytest.mark.parametrize(("target_ms", "drafter_ms", "acceptance"), PUBLISHED)
def test_a_plan_takes_few_walks(
    monkeypatch: pytest.MonkeyPatch, target_ms: float, drafter_ms: float, acceptance: float
) -> None:
    """A plan is made in the event loop, while a generation runs. Plans of trees took 500 expectations and 10 to 110 ms."""
    asked: dict[tuple[str, bool], int] = {}

    def counted(policy: Policy, *known: Any, alone: float = 1.0) -> Expectation:
        kind = ("turns" if policy.first_wait == policy.max_ahead else "walk", policy.rows > 1)
        asked[kind] = asked.get(kind, 0) + 1
        return expect(policy, *known)

    monkeypatch.setattr(search, "expect", counted)
    cost_ms = Estimates(target_ms, 1.5 * target_ms, 32).cost_ms
    search.best_dsi(cost_ms, drafter_ms, acceptance, 3, Branching(0.35, rows=1024))
    assert asked["turns", True] <= 60
    assert asked["walk", True] <= 30
    assert asked["walk", False] <= 100

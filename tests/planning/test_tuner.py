"""The tuner finds the policy of a pair it knew nothing about, and follows when the pair changes."""

from __future__ import annotations

import pytest

from dsi_actors.core.actions import Judged
from dsi_actors.planning import plans
from dsi_actors.planning.estimates import Estimates, Guesser, flat
from dsi_actors.planning.expectation import expect
from dsi_actors.planning.search import best_dsi, in_one_go
from dsi_actors.planning.tuner import Tuner


def feed(tuner: Tuner, target_ms: float, drafter_ms: float, acceptance: float, tokens: int = 400) -> None:
    for token in range(tokens):
        tuner.verified(1, target_ms)
        tuner.drafted(1, drafter_ms)
        tuner.judged(Judged(accepted=round((token + 1) * acceptance) - round(token * acceptance), judged=1))
        tuner.retune()


@pytest.mark.parametrize("known", [Estimates(window=64), Estimates(30, 30, 64, 29)])
@pytest.mark.parametrize(("target_ms", "drafter_ms", "acceptance"), [(20, 1, 0.9), (20, 6, 0.3), (40, 60, 0.9)])
@pytest.mark.parametrize("sp", [1, 4])
def test_it_finds_a_policy_nearly_as_good_as_the_best(
    known: Estimates, target_ms: float, drafter_ms: float, acceptance: float, sp: int
) -> None:
    tuner = Tuner("dsi", sp, None, known)
    tuner.choose()
    feed(tuner, target_ms, drafter_ms, acceptance)
    cost_ms = flat(target_ms)
    best = expect(best_dsi(cost_ms, drafter_ms, acceptance, sp), cost_ms, drafter_ms, acceptance).ms_per_token
    assert expect(tuner.choose(), cost_ms, drafter_ms, acceptance).ms_per_token <= best * 1.02


def test_it_follows_a_drafter_that_becomes_slow() -> None:
    tuner = Tuner("dsi", 1, None, Estimates(20, 20, 32, 1))
    before = tuner.choose()
    assert before.first_wait > 1
    feed(tuner, 20, 25, 0.8)
    assert tuner.choose().first_wait == 0, "as plain decoding: no draft comes in time"


def slowed(calibrated_ms: float) -> Tuner:
    """A pair whose verifications take 13.2 ms beside the drafter."""
    known = Estimates(13.2, 20.3, 8, 6.35, calibrated_ms, accepted=96, judged=100)
    return Tuner("dsi", 1, None, known)


def test_it_verifies_less_often_where_drafter_and_target_slow_each_other_down() -> None:
    assert slowed(13.0).choose().lookahead == 1
    assert slowed(9.3).choose().lookahead > 2


def test_what_was_drafted_while_nothing_was_verified_would_have_taken_longer_beside_that() -> None:
    tuner = slowed(9.9)  # three quarters of 13.2
    for _ in range(400):
        tuner.drafted(1, 3.0, beside=0.0)
        tuner.drafted(1, 4.0, beside=1.0)
        tuner.drafted(1, 3.5, beside=0.5)
    assert tuner.estimates.drafter_ms == pytest.approx(4.0)


def test_what_is_fixed_stays() -> None:
    tuner = Tuner("dsi", 2, 3, Estimates(20, 20, 32, 1))
    assert tuner.choose().lookahead == 3
    for token in range(200):
        tuner.judged(Judged(accepted=token % 2, judged=1))
        assert tuner.retune() is None


def test_a_prompt_is_not_taken_for_a_slow_verification() -> None:
    tuner = Tuner("dsi", 2, None, Estimates(20, 40, 8, 5))
    tuner.verified(500, 3000.0)
    assert tuner.estimates.target_ms == 20


def test_a_tree_is_not_taken_for_a_prompt() -> None:
    tuner = Tuner("dsi", 2, None, Estimates(20, 27, 8, 5))
    tuner.verified(5, 50.0, branches=30)
    assert tuner.estimates.target_ms == pytest.approx(20 * (1 + 0.1 * (50 / 54 - 1)))


def test_fewer_servers_change_the_plan() -> None:
    tuner = Tuner("dsi", 4, None, Estimates(20, 20, 32, 1))
    before = tuner.choose()
    tuner.servers = 1
    tuner.judged(Judged(accepted=8, judged=10))
    after = tuner.retune()
    assert after is not None
    assert after.sp == before.sp == 4, "more may come back"
    assert after.first_wait > before.first_wait


@pytest.mark.parametrize("servers", [[1], [2, 1], [1, 2, 1], [2, 4]])
def test_a_search_begins_anew_where_the_circumstances_change_meanwhile(
    servers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_plans", {})
    tuner = Tuner("dsi", 4, None, Estimates(21.7, 21.7, 32, 1.3))
    before = tuner.choose()
    tuner.servers = 3
    tuner.judged(Judged(accepted=8, judged=10))
    steps = tuner.retuning()
    for number in servers:
        next(steps)
        tuner.judged(Judged(accepted=8, judged=10))  # measuring goes on meanwhile
        tuner.servers = number
    found = in_one_go(steps)
    fresh = Tuner("dsi", 4, None, tuner.estimates)
    fresh.servers = servers[-1]
    assert (found or before) == fresh.choose()
    assert tuner.retune() is None, "it is the plan for what is there now"


def test_another_drafter_ends_the_search_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_plans", {})
    tuner = Tuner("dsi", 1, None, Estimates(23.9, 23.9, 32, 1.7))
    tuner.choose()
    tuner.judged(Judged(accepted=0, judged=40))
    steps = tuner.retuning()
    next(steps)
    tuner.another_drafter(Guesser.unjudged(11.0))
    assert in_one_go(steps) == Tuner("dsi", 1, None, tuner.estimates).choose()


@pytest.mark.parametrize("lie_ms", [0.0, 1e12])
def test_estimates_stay_numbers_whatever_workers_say(lie_ms: float) -> None:
    tuner = Tuner("dsi", 2, None, Estimates(20.0, 25.0, 8, 4.0))
    for _ in range(20_000):
        tuner.drafted(1, lie_ms)
        tuner.verified(1, 20.0)
    tuner.judged(Judged(accepted=8, judged=9))
    tuner.retune()
    for _ in range(200):
        for _ in range(100):
            tuner.verified(1, lie_ms)
        tuner.judged(Judged(accepted=8, judged=9))
        tuner.retune()
    assert tuner.estimates.target_ms > 1e-6
    assert Tuner("dsi", 2, None, tuner.carry_over()).choose().sp == 2


def test_who_shares_a_server_plans_with_the_time_that_it_waits_and_with_the_others_positions() -> None:
    tuner = Tuner("dsi", 1, None, Estimates(20.0, 20.0, 32, 2.0, position_ms=0.2))
    alone = tuner.choose()
    for _ in range(60):
        tuner.verified(5, 5.0, sharers=32, waited_ms=26.0 + 0.2 * 32 * 4)
    tuner.judged(Judged(accepted=8, judged=10))
    assert tuner.estimates.latencies_ms == pytest.approx((26.0, 26.0 + 0.2 * 32 * 31))
    crowded = tuner.retune()
    assert crowded is not None
    assert crowded.span < alone.span  # what each adds costs all
    tuner.verified(5, 20.0)
    assert tuner.estimates.latencies_ms == (20.0, 20.0)
    tuner.judged(Judged(accepted=8, judged=10))
    again = tuner.retune()
    assert again is not None
    assert again.span == alone.span


def test_what_the_forward_of_others_lasts_is_time_to_draft() -> None:
    tuner = Tuner("dsi", 1, None, Estimates(20.0, 20.0, 32, 2.0, sharers=4, shared_ms=20.0))
    assert tuner.choose().first_wait == 0  # it was answered as if alone: waiting for drafts would miss a forward
    for _ in range(60):
        tuner.verified(1, 5.0, sharers=4, waited_ms=30.0)
    tuner.judged(Judged(accepted=8, judged=10))
    policy = tuner.retune()
    assert policy is not None
    assert policy.first_wait in (4, 5)  # ten milliseconds, at two for each draft


def test_a_promise_is_what_was_measured_or_what_the_target_takes_if_that_is_less() -> None:
    """Workers that started together measured one another; that a drafter slows the target down is not its promise."""
    tuner = Tuner("dsi", 1, None, Estimates(100.0, 150.0, 8, drafter_ms=10.0, calibrated_ms=100.0))
    tuner.choose()
    assert tuner.drafting
    for _ in range(60):
        tuner.verified(1, 60.0)
    assert 60 <= tuner.estimates.promised_ms < 61
    for _ in range(60):
        tuner.verified(1, 300.0)
    assert tuner.estimates.promised_ms == 100


def test_what_is_not_known_of_a_drafter_is_not_taken_for_nothing() -> None:
    tuner = Tuner("dsi", 1, None, Estimates(26.0, 30.0, 8, 8.0))
    tuner.another_drafter(Guesser(0.0, 4.8, 6.0, 2.4, 6.0))
    tuner.drafted(1, 20.0)
    assert tuner.estimates.drafter_ms == 20.0


def test_a_chain_takes_as_long_as_it_does_on_the_average() -> None:
    """What it copies takes no time; what its model drafts does."""
    tuner = Tuner("dsi", 1, None, Estimates(26.0, 30.0, 8, 8.0))
    found = []
    for block in range(200):
        tuner.drafted(7, 0.14 if block % 5 < 3 else 56.0)
        found.append(tuner.estimates.drafter_ms)
    assert all(2.0 < drafter_ms < 4.6 for drafter_ms in found[10:])


def test_plain_decoding_promises_what_it_takes() -> None:
    tuner = Tuner("ar", 1, None, Estimates(100.0, 150.0, 8))
    tuner.choose()
    tuner.verified(1, 80.0)
    assert tuner.estimates.promised_ms == 80, "it was not calibrated"
    for _ in range(100):
        tuner.verified(1, 120.0)
    assert tuner.estimates.promised_ms == pytest.approx(120, rel=0.01)

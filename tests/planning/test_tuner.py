"""The tuner finds the policy of a pair it knew nothing about, and follows when the pair changes."""

from __future__ import annotations

import math
import random

import pytest

from dsi_actors.core import Policy
from dsi_actors.planning.expectation import best_dsi, expect
from dsi_actors.planning.pace import Pace
from dsi_actors.planning.tuner import Estimates, Tuner, flat


def feed(tuner: Tuner, target_ms: float, drafter_ms: float, acceptance: float, tokens: int = 400) -> None:
    for token in range(tokens):
        tuner.verified(1, target_ms)
        tuner.drafted(1, drafter_ms)
        tuner.judged(round((token + 1) * acceptance) - round(token * acceptance), 1)
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


def test_what_is_fixed_stays() -> None:
    tuner = Tuner("dsi", 2, 3, Estimates(20, 20, 32, 1))
    assert tuner.choose().lookahead == 3
    for token in range(200):
        tuner.judged(token % 2, 1)
        assert tuner.retune() is None


def test_a_prompt_is_not_taken_for_a_slow_verification() -> None:
    tuner = Tuner("dsi", 2, None, Estimates(20, 40, 8, 5))
    tuner.verified(500, 3000.0)
    assert tuner.estimates.target_ms == 20


def test_fewer_servers_change_the_plan() -> None:
    tuner = Tuner("dsi", 4, None, Estimates(20, 20, 32, 1))
    before = tuner.choose()
    tuner.servers = 1
    tuner.judged(8, 10)
    after = tuner.retune()
    assert after is not None
    assert after.sp == before.sp == 4, "more may come back"
    assert after.first_wait > before.first_wait


@pytest.mark.parametrize("lie_ms", [0.0, 1e12])
def test_estimates_stay_numbers_whatever_workers_say(lie_ms: float) -> None:
    tuner = Tuner("dsi", 2, None, Estimates(20.0, 25.0, 8, 4.0))
    for _ in range(20_000):
        tuner.drafted(1, lie_ms)
        tuner.verified(1, 20.0)
    tuner.judged(8, 9)
    tuner.retune()
    for _ in range(200):
        for _ in range(100):
            tuner.verified(1, lie_ms)
        tuner.judged(8, 9)
        tuner.retune()
    assert tuner.estimates.target_ms > 1e-6
    assert Tuner("dsi", 2, None, tuner.carry_over()).choose().sp == 2


def test_who_shares_a_server_plans_with_the_time_that_it_waits_and_with_the_others_positions() -> None:
    tuner = Tuner("dsi", 1, None, Estimates(20.0, 20.0, 32, 2.0, position_ms=0.2))
    alone = tuner.choose()
    for _ in range(60):
        tuner.verified(5, 5.0, sharers=32, waited_ms=26.0 + 0.2 * 32 * 4)
    tuner.judged(8, 10)
    assert tuner.estimates.latencies_ms == pytest.approx((26.0, 26.0 + 0.2 * 32 * 31))
    crowded = tuner.retune()
    assert crowded is not None
    assert crowded.span < alone.span  # what each adds costs all
    tuner.verified(5, 20.0)
    assert tuner.estimates.latencies_ms == (20.0, 20.0)
    tuner.judged(8, 10)
    again = tuner.retune()
    assert again is not None
    assert again.span == alone.span


def test_what_the_forward_of_others_lasts_is_time_to_draft() -> None:
    tuner = Tuner("dsi", 1, None, Estimates(20.0, 20.0, 32, 2.0, sharers=4, shared_ms=20.0))
    assert tuner.choose().first_wait == 0  # it was answered as if alone: waiting for drafts would miss a forward
    for _ in range(60):
        tuner.verified(1, 5.0, sharers=4, waited_ms=30.0)
    tuner.judged(8, 10)
    policy = tuner.retune()
    assert policy is not None
    assert policy.first_wait in (4, 5)  # ten milliseconds, at two for each draft


def _crowded(pace: Pace) -> Tuner:
    known = Estimates(45.0, 50.0, 8, 5.0, 45.0, position_ms=2.0, sharers=4, shared_ms=80.0)
    return Tuner("dsi", 1, None, known, pace)


def _looks(tuner: Tuner, tokens: int, each_ms: float) -> Policy | None:
    """So many tokens are committed, one by one; the last change of the policy."""
    policy = None
    for _ in range(tokens):
        tuner.verified(1, 30.0, sharers=tuner.estimates.sharers, waited_ms=60.0)
        tuner.paced(1, each_ms)
        tuner.judged(4, 5)
        policy = tuner.retune() or policy
    return policy


def test_all_generations_leave_speculation_together_where_plain_decoding_is_faster() -> None:
    """On processors that target and drafter share: what the workers promised without a drafter beside is faster."""
    pace = Pace()
    first, second = _crowded(pace), _crowded(pace)
    assert first.choose().max_ahead > 0
    assert second.choose().max_ahead > 0
    assert _looks(first, 60, 110.0) == Policy.undrafted(1)
    assert _looks(second, 4, 110.0) == Policy.undrafted(1)
    assert _crowded(pace).choose() == Policy.undrafted(1)


def test_speculation_comes_back_if_plain_decoding_does_not_keep_its_promise_either() -> None:
    pace = Pace()
    tuner = _crowded(pace)
    tuner.choose()
    assert _looks(tuner, 60, 110.0) == Policy.undrafted(1)
    policy = _looks(tuner, 60, 120.0)
    assert policy is not None
    assert policy.max_ahead > 0


def test_one_long_wait_does_not_end_speculation() -> None:
    tuner = _crowded(Pace())
    assert tuner.choose().max_ahead > 0
    for _ in range(20):
        _looks(tuner, 30, 20.0)
        tuner.paced(1, 900.0)
        policy = _looks(tuner, 8, 20.0)
        assert policy is None or policy.max_ahead > 0


def test_a_generation_that_went_plain_speculates_again_once_it_is_alone() -> None:
    running = 4
    pace = Pace(lambda: running)
    tuner = _crowded(pace)
    for _ in range(1000):
        pace.committed(1, 200.0, drafter=tuner.drafter, promised_ms=50.0, position=0)
    assert tuner.choose() == Policy.undrafted(1)
    running = 1
    tuner.verified(1, 45.0)
    for _ in range(30):
        tuner.paced(8, 360.0)
    policy = tuner.retune()
    assert policy is not None
    assert policy.max_ahead > 0


def test_who_is_alone_leaves_speculation_too_where_it_is_slower_than_what_the_workers_promised() -> None:
    """More workers than processors: each forward takes longer while the drafter runs, and the estimates with it."""
    tuner = Tuner("dsi", 2, None, Estimates(40.0, 45.0, 8, 20.0, 40.0))
    assert tuner.choose().max_ahead > 0
    policy = None
    for _ in range(60):
        tuner.verified(4, 90.0)
        tuner.drafted(4, 160.0)
        tuner.paced(1, 60.0)
        tuner.judged(1, 1)
        policy = tuner.retune() or policy
    assert policy == Policy.undrafted(2)


@pytest.mark.parametrize("algorithm", ["ar", "si"])
def test_what_others_do_on_request_says_nothing_about_dsi(algorithm: str) -> None:
    pace = Pace()
    known = Estimates(45.0, 50.0, 8, 5.0, 45.0, position_ms=2.0, sharers=4, shared_ms=80.0)
    for tuner in (Tuner(algorithm, 1, None, known, pace), Tuner("dsi", 1, 2, known, pace)):
        tuner.choose()
        _looks(tuner, 100, 500.0)
    assert _crowded(pace).choose().max_ahead > 0


def test_a_drafter_that_takes_nothing_is_not_left() -> None:
    """Where prompt lookup finds nothing for a while, tokens come as slowly as in plain decoding, or a little more so."""
    for computes in (False, True):  # a chain that copied for a while seems to take no time, too
        pace = Pace()
        tuner = Tuner("dsi", 1, None, Estimates(40, 50, 8, 0.01, calibrated_ms=40), pace)
        tuner.drafter_is("d", computes=computes)
        tuner.choose()
        for _ in range(100):
            tuner.paced(1, 50.0)
        assert (tuner.choose().max_ahead == 0) == computes


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


def _drafted_share(plain_ms: float, drafted_ms: float, noise: float, tokens: int = 4000) -> tuple[float, float]:
    """Of a lone generation whose tokens take so long in plain decoding and by drafts, while 26 ms were promised: the share
    of tokens that were drafted, and the milliseconds of one."""
    random_number = random.Random(3)
    tuner = Tuner("dsi", 1, None, Estimates(26.0, 30.0, 8, 9.0, calibrated_ms=26.0))
    tuner.choose()
    drafted, total_ms = 0, 0.0
    for _ in range(tokens):
        sigma = math.sqrt(math.log(1 + noise**2))
        draw = random_number.lognormvariate(-(sigma**2) / 2, sigma)
        took_ms = draw * (drafted_ms if tuner.drafting else plain_ms)
        drafted, total_ms = drafted + tuner.drafting, total_ms + took_ms
        tuner.verified(1, draw * plain_ms)
        tuner.paced(1, took_ms)
        if tuner.drafting:
            tuner.judged(4, 5)
        tuner.retune()
    return drafted / tokens, total_ms / tokens


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4])
def test_noise_does_not_end_speculation_that_pays(noise: float) -> None:
    share, _ = _drafted_share(26.0, 22.0, noise)
    assert share > 0.9


@pytest.mark.parametrize("plain_ms", [34.0, 40.0, 52.0])
def test_a_context_that_slows_everything_down_does_not_end_speculation(plain_ms: float) -> None:
    """What plain decoding promised was measured without a context. It is tried, and left."""
    share, each_ms = _drafted_share(plain_ms, 30.0, 0.1)
    assert share > 0.95
    assert each_ms < 30.0 * 1.03


def test_speculation_that_does_not_pay_is_left_whatever_was_promised() -> None:
    share, each_ms = _drafted_share(26.0, 40.0, 0.1)
    assert share < 0.1
    assert each_ms < 26.0 * 1.05


def test_a_drafter_that_takes_nothing_is_used_where_another_one_did_not_pay() -> None:
    tuner = Tuner("dsi", 1, None, Estimates(40.0, 50.0, 8, 10.0, calibrated_ms=40.0))
    tuner.choose()
    for _ in range(40):
        tuner.paced(1, 60.0)
    tuner.judged(1, 1)
    assert tuner.choose() == Policy.undrafted(1)
    tuner.drafter_is("ngram", computes=False)
    policy = tuner.retune()
    assert policy is not None
    assert policy.max_ahead > 0
    tuner.drafter_is("another", computes=True)
    assert tuner.choose().max_ahead > 0, "it was not tried"
    tuner.drafter_is("drafter", computes=True)
    assert tuner.retune() == Policy.undrafted(1)


def test_what_is_not_known_of_a_drafter_is_not_taken_for_nothing() -> None:
    tuner = Tuner("dsi", 1, None, Estimates(26.0, 30.0, 8, 8.0))
    tuner.another_drafter(0.0, 4.8, 6.0)
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


def test_where_nothing_overlaps_a_bad_text_does_not_end_speculation_for_ever() -> None:
    known = Estimates(10.0, 10.0, 32, drafter_ms=2.0, calibrated_ms=10.0)
    tuner = Tuner("dsi", 1, None, known, overlaps=False)
    assert tuner.choose().max_ahead > 0
    tuner.judged(0, 300)
    assert tuner.retune() == Policy.undrafted(1)
    tokens = 0
    while not tuner.drafting:
        tokens += 1
        tuner.paced(1, 10.0)
        tuner.retune()
        assert tokens < 5000
    assert tokens > 100

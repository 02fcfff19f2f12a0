"""What one generation learns while it runs, and what it changes by that, beside what all generations share."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest

from dsi_actors.core import Policy
from dsi_actors.core.actions import Judged
from dsi_actors.core.policy import UNLIMITED
from dsi_actors.planning.arms import TOGETHER, ArmChoice, Arms, chooses_arms
from dsi_actors.planning.controller import Controller
from dsi_actors.planning.estimates import Estimates, Guesser
from dsi_actors.planning.tuner import Tuner

KINDS = ["a", "b"]
LOOKUP = "ngram"
PLAIN_MS, SLOW_MS, FAST_MS = 10.0, 30.0, 4.0
GUESSER = Guesser.unjudged(2.0)


def with_one_drafter(known: Estimates, arms: Arms | None = None, *, sp: int = 1) -> Controller:
    controller = Controller.with_one_drafter("dsi", sp, None, known, arms)
    controller.begin()
    return controller


def crowded(arms: Arms) -> Controller:
    known = Estimates(45.0, 50.0, 8, 5.0, 45.0, position_ms=2.0, sharers=4, shared_ms=80.0)
    return with_one_drafter(known, arms)


def commit(controller: Controller, tokens: int, took_ms: float) -> None:
    controller.committed(tokens, took_ms, 1, drafts=True)


def looks(controller: Controller, tokens: int, each_ms: float) -> Policy | None:
    """So many tokens are committed, one by one; the last change of the policy."""
    policy, tuner = None, controller.tuner
    for _ in range(tokens):
        tuner.verified(1, 30.0, sharers=tuner.estimates.sharers, waited_ms=60.0)
        commit(controller, 1, each_ms)
        tuner.judged(Judged(accepted=4, judged=5))
        policy = controller.retune() or policy
    return policy


def test_all_generations_leave_speculation_together_where_plain_decoding_is_faster() -> None:
    """On processors that target and drafter share: what the workers promised without a drafter beside is faster."""
    arms = Arms()
    first, second = crowded(arms), crowded(arms)
    assert first.tuner.drafting
    assert second.tuner.drafting
    assert looks(first, 60, 110.0) == Policy.undrafted(1)
    assert looks(second, 4, 110.0) == Policy.undrafted(1)
    assert not crowded(arms).tuner.drafting


def test_speculation_comes_back_if_plain_decoding_does_not_keep_its_promise_either() -> None:
    controller = crowded(Arms())
    assert looks(controller, 60, 110.0) == Policy.undrafted(1)
    policy = looks(controller, 60, 120.0)
    assert policy is not None
    assert policy.max_ahead > 0


def decode(controller: Controller, tokens: int, *, slowed: float, both_ms: float, turns_ms: float) -> int:
    """So many tokens, where drafter and target slow each other down. Of these, tokens for which they took turns."""
    tuner, turns = controller.tuner, 0
    for _ in range(tokens):
        in_turns = tuner.in_turns
        turns += in_turns
        tuner.verified(5, 40.0 * (1.0 if in_turns else slowed))
        tuner.drafted(1, 5.0 * (1.0 if in_turns else slowed))
        commit(controller, 1, turns_ms if in_turns else both_ms)
        tuner.judged(Judged(accepted=9, judged=10))
        controller.retune()
    return turns


SHARED = Estimates(40.0, 44.0, 8, 5.0, 40.0)


def test_drafter_and_target_take_turns_where_they_slow_each_other_down() -> None:
    """Two processes on two cores that read their weights at the same time: DSI took 40 ms for a token, and SI 31."""
    arms = Arms()
    first = with_one_drafter(SHARED, arms)
    assert decode(first, 200, slowed=2.0, both_ms=30.0, turns_ms=16.0) > 100
    policy = first.tuner.choose()
    assert (policy.algorithm, policy.first_wait) == ("dsi", policy.max_ahead), (
        "nothing is drafted during a verification"
    )
    first.ended()
    assert with_one_drafter(SHARED, arms).tuner.in_turns, "others begin so"


def test_taking_turns_is_left_where_it_keeps_no_promise() -> None:
    controller = with_one_drafter(SHARED)
    assert 0 < decode(controller, 400, slowed=2.0, both_ms=30.0, turns_ms=33.0) < 60


@pytest.mark.parametrize("both_ms", [10.0, 30.0])
def test_turns_are_not_tried_where_nothing_is_slowed_down(both_ms: float) -> None:
    assert decode(with_one_drafter(SHARED), 400, slowed=1.05, both_ms=both_ms, turns_ms=8.0) == 0


def test_both_at_once_is_tried_again_after_a_while() -> None:
    controller = with_one_drafter(SHARED)
    decode(controller, 200, slowed=2.0, both_ms=30.0, turns_ms=16.0)
    turns = decode(controller, 2000, slowed=1.0, both_ms=10.0, turns_ms=16.0)
    assert 300 < turns < 700


def test_one_long_wait_does_not_end_speculation() -> None:
    controller = crowded(Arms())
    for _ in range(20):
        looks(controller, 30, 20.0)
        commit(controller, 1, 900.0)
        policy = looks(controller, 8, 20.0)
        assert policy is None or policy.max_ahead > 0


def test_a_generation_that_went_plain_speculates_again_once_it_is_alone() -> None:
    running = 4
    arms = Arms(lambda: running)
    for _ in range(1000):
        arms.committed(1, 1, 200.0, arm="drafter", promised_ms=50.0, position=0, who="another")
    controller = crowded(arms)
    assert not controller.tuner.drafting
    running = 1
    controller.tuner.verified(1, 45.0)
    for _ in range(30):
        commit(controller, 8, 360.0)
    policy = controller.retune()
    assert policy is not None
    assert policy.max_ahead > 0


def test_a_lone_generation_leaves_speculation_where_it_is_slower_than_what_the_workers_promised() -> None:
    """More workers than processors: each forward takes longer while the drafter runs, and the estimates with it."""
    controller = with_one_drafter(Estimates(40.0, 45.0, 8, 20.0, 40.0), sp=2)
    assert controller.tuner.drafting
    policy = None
    for _ in range(60):
        controller.tuner.verified(4, 90.0)
        controller.tuner.drafted(4, 160.0)
        commit(controller, 1, 60.0)
        controller.tuner.judged(Judged(accepted=1, judged=1))
        policy = controller.retune() or policy
    assert policy == Policy.undrafted(2)


@pytest.mark.parametrize(("algorithm", "lookahead"), [("ar", None), ("si", None), ("dsi", 2)])
def test_what_others_do_on_request_says_nothing_about_dsi(algorithm: str, lookahead: int | None) -> None:
    arms = Arms()
    known = Estimates(45.0, 50.0, 8, 5.0, 45.0, position_ms=2.0, sharers=4, shared_ms=80.0)
    controller = Controller.with_one_drafter(algorithm, 1, lookahead, known, arms)
    controller.begin()
    looks(controller, 100, 500.0)
    assert crowded(arms).tuner.drafting


def drafted_share(plain_ms: float, drafted_ms: float, noise: float, tokens: int = 4000) -> tuple[float, float]:
    """Of a lone generation whose tokens take so long in plain decoding and by drafts, while 26 ms were promised: the share
    of tokens that were drafted, and the milliseconds of one."""
    random_number = random.Random(3)
    controller = with_one_drafter(Estimates(26.0, 30.0, 8, 9.0, calibrated_ms=26.0))
    tuner, drafted, total_ms = controller.tuner, 0, 0.0
    for _ in range(tokens):
        sigma = math.sqrt(math.log(1 + noise**2))
        draw = random_number.lognormvariate(-(sigma**2) / 2, sigma)
        took_ms = draw * (drafted_ms if tuner.drafting else plain_ms)
        drafted, total_ms = drafted + tuner.drafting, total_ms + took_ms
        tuner.verified(1, draw * plain_ms)
        commit(controller, 1, took_ms)
        if tuner.drafting:
            tuner.judged(Judged(accepted=4, judged=5))
        controller.retune()
    return drafted / tokens, total_ms / tokens


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4])
def test_noise_does_not_end_speculation_that_pays(noise: float) -> None:
    share, _ = drafted_share(26.0, 22.0, noise)
    assert share > 0.9


@pytest.mark.parametrize("plain_ms", [34.0, 40.0, 52.0])
def test_a_long_text_that_slows_everything_down_does_not_end_speculation(plain_ms: float) -> None:
    """What plain decoding promised was measured with a short text. It is tried, and left."""
    share, each_ms = drafted_share(plain_ms, 30.0, 0.1)
    assert share > 0.95
    assert each_ms < 30.0 * 1.03


def test_speculation_that_does_not_pay_is_left_whatever_was_promised() -> None:
    share, each_ms = drafted_share(26.0, 40.0, 0.1)
    assert share < 0.1
    assert each_ms < 26.0 * 1.05


def test_where_nothing_overlaps_a_bad_text_does_not_end_speculation_for_ever() -> None:
    controller = with_one_drafter(Estimates(10.0, 10.0, 32, drafter_ms=2.0, calibrated_ms=10.0))
    controller.set_servers(1, overlaps=False, rows=1)
    controller.tuner.judged(Judged(accepted=0, judged=300))
    assert controller.retune() == Policy.undrafted(1)
    tokens = 0
    while not controller.tuner.drafting:
        tokens += 1
        commit(controller, 1, 10.0)
        controller.retune()
        assert tokens < 5000
    assert tokens > 100


@pytest.mark.parametrize("running", [1, 2, 8])
def test_one_device_that_several_generations_share_does_not_draft(running: int) -> None:
    """From the first token on: a trial in each context would cost more than is ever gained."""
    arms = Arms(lambda: running)
    arms.generation_begins()

    def begun_on_one_device() -> Controller:
        controller = Controller.with_one_drafter(
            "dsi", 1, None, Estimates(10.0, 10.0, 32, 1.0, calibrated_ms=10.0), arms
        )
        controller.set_servers(1, overlaps=False, rows=1)
        controller.begin()
        controller.set_servers(1, overlaps=None, rows=1)  # the drafter is there later
        controller.tuner.look_again()
        controller.retune()
        return controller

    first = begun_on_one_device()
    assert first.tuner.drafting, "it is not known yet that there are others"
    looks(first, 256, 10.0)
    assert first.tuner.drafting == begun_on_one_device().tuner.drafting == (running == 1)


# Several drafters


def begun(
    arms: Arms, *, drafters: Sequence[str] = KINDS, lookahead: int | None = None, position: int = 0
) -> Controller:
    known = Estimates(PLAIN_MS, PLAIN_MS, 8, drafter_ms=2.0, calibrated_ms=PLAIN_MS)
    choice = ArmChoice(arms, left_to_us=chooses_arms("dsi", lookahead), never_left=(LOOKUP,))
    choice.position = position
    choice.use(choice.first(drafters))
    controller = Controller(Tuner("dsi", 1, lookahead, known), choice)
    controller.begin()
    return controller


def run(
    controller: Controller,
    tokens: int,
    each_ms: dict[str, float],
    drafters: list[str],
    *,
    granted: Callable[[int], bool] = lambda position: True,
) -> tuple[int, int, float]:
    """For how many tokens something was drafted, how often the drafter was exchanged, and the milliseconds of a token."""
    begin = controller.choice.position
    controller.drafter_joined(controller.drafter if controller.drafter in drafters else drafters[0], GUESSER, begin)
    drafted, exchanges, total_ms = 0, 0, 0.0
    for position in range(begin + 1, begin + tokens):
        drafts = controller.tuner.drafting
        drafted += drafts
        took_ms = each_ms[controller.drafter] if drafts else PLAIN_MS
        total_ms += took_ms
        another = controller.committed(1, took_ms, position, drafts=True, drafters=drafters)
        if drafts:
            controller.judged(Judged(accepted=1, judged=1), position)
        controller.retune()
        if another is not None and granted(position):
            exchanges += 1
            controller.drafter_joined(another, GUESSER, position)
    controller.ended()
    return drafted, exchanges, total_ms / tokens


def test_a_drafter_that_comes_when_speculation_was_left_is_tried_all_the_same() -> None:
    arms = Arms()
    run(begun(arms), 300, {"a": SLOW_MS}, ["a"])
    assert not arms.pays("a", 0)
    drafted = sum(run(begun(arms), 1000, {"a": SLOW_MS, "b": FAST_MS}, KINDS)[0] for _ in range(20))
    assert drafted > 10_000
    assert begun(arms).drafter == "b"


def test_what_the_drafter_before_has_left_is_not_the_new_ones() -> None:
    arms = Arms()
    controller = begun(arms)
    controller.drafter_joined("a", GUESSER, 0)
    controller.drafter_joined("b", GUESSER, 100)
    for position in range(1, 100):
        assert controller.committed(1, SLOW_MS, position, drafts=True, drafters=KINDS) is None
    controller.judged(Judged(accepted=0, judged=50), 100)
    assert arms.ratio("b", 0) == 0
    assert controller.estimates.judged == Estimates().judged
    controller.judged(Judged(accepted=0, judged=50), 101)
    assert controller.estimates.acceptance < 0.3


def test_after_a_rejection_all_drafts_are_the_new_ones() -> None:
    """A drafter may have been far ahead when another one took its place."""
    controller = begun(Arms())
    controller.drafter_joined("a", GUESSER, 0)
    controller.drafter_joined("b", GUESSER, 270)
    controller.judged(Judged(accepted=2, judged=3), 5)
    assert controller.estimates.judged == Estimates().judged, "they were the other one's"
    controller.judged(Judged(accepted=0, judged=50), 6)
    assert controller.estimates.acceptance < 0.3


def test_while_nobody_drafts_nothing_is_held_against_speculation() -> None:
    arms = Arms()
    controller = begun(arms)
    controller.drafter_joined("a", GUESSER, 0)
    for position in range(1, 200):
        controller.committed(1, SLOW_MS, position, drafts=False, drafters=["a"])
    assert arms.pays("a", 0)
    assert controller.tuner.drafting


@pytest.mark.parametrize("tokens", [40, 60, 100])
def test_a_drafter_whose_turn_it_is_again_does_not_hold_generations_in_plain_decoding(tokens: int) -> None:
    """It was found not to pay, and is found so again."""
    arms, each_ms = Arms(), {"a": FAST_MS, "b": SLOW_MS}
    for _ in range(40):
        run(begun(arms), 60, each_ms, KINDS)
    plain = sum(run(begun(arms), tokens, each_ms, KINDS)[0] < tokens / 2 for _ in range(400))
    assert plain <= 2


def test_what_is_fast_elsewhere_only_is_not_tried_again_and_again() -> None:
    """One drafter is the fastest in short texts, and does not pay in long ones."""
    arms = Arms()
    for _ in range(20):
        run(begun(arms), 200, {"a": 4.0, "b": 9.0}, KINDS)
    exchanges = 0
    for _ in range(20):
        _, more, each_ms = run(begun(arms, position=3000), 1000, {"a": 30.0, "b": 9.0}, KINDS)
        exchanges += more
    assert exchanges <= 10
    assert each_ms < 9.5
    assert run(begun(arms), 200, {"a": 4.0, "b": 9.0}, KINDS)[2] < 5


def test_one_that_was_left_alone_is_not_begun_with_when_others_come() -> None:
    arms = Arms()
    for _ in range(3):
        run(begun(arms, drafters=["a"]), 300, {"a": 30.0}, ["a"])
    _, exchanges, each_ms = run(begun(arms), 1000, {"a": 30.0, "b": FAST_MS}, KINDS)
    assert exchanges <= 2
    assert each_ms < 1.3 * FAST_MS


def test_a_fixed_lookahead_leaves_no_drafter_for_what_others_found() -> None:
    arms = Arms()
    for _ in range(3):
        run(begun(arms, drafters=["a"]), 300, {"a": 30.0}, ["a"])
    _, exchanges, _ = run(begun(arms, lookahead=2), 2000, {"a": 30.0, "b": 40.0}, KINDS)
    assert exchanges <= 2


@pytest.mark.parametrize("lookup_ms", [10.4, 13.5, 15.0])
def test_lookup_that_is_slower_than_plain_decoding_does_not_take_its_place(lookup_ms: float) -> None:
    """Nor does a model that is."""
    arms, drafters = Arms(), ["a", LOOKUP]
    each_ms = {"a": 13.0, LOOKUP: lookup_ms}
    found = [run(begun(arms, drafters=drafters), 300, each_ms, drafters) for _ in range(20)]
    assert sum(ms for *_, ms in found[3:]) / len(found[3:]) < 10.7


def test_lookup_is_not_left_for_plain_decoding_where_there_is_no_other() -> None:
    """Where it finds nothing for a while, tokens come as slowly as in plain decoding, or a little more so."""
    controller = begun(Arms(), drafters=[LOOKUP])
    drafted, _, _ = run(controller, 300, {LOOKUP: 1.2 * PLAIN_MS}, [LOOKUP])
    assert drafted == 299


def test_a_drafter_that_was_busy_is_asked_for_again() -> None:
    controller = begun(Arms())
    _, exchanges, each_ms = run(
        controller, 1000, {"a": SLOW_MS, "b": FAST_MS}, KINDS, granted=lambda position: position > 200
    )
    assert exchanges == 1
    assert each_ms < 0.3 * PLAIN_MS + 0.7 * FAST_MS + 2


def test_a_drafter_that_was_never_asked_does_not_keep_another_one_out() -> None:
    """It has yet to read the text, since plain decoding is faster than with it."""
    arms = Arms()
    run(begun(arms, drafters=["a"]), 300, {"a": SLOW_MS}, ["a"])
    controller = begun(arms, drafters=["a"])
    asked = [controller.committed(1, PLAIN_MS, at, drafts=True, reads=True, drafters=KINDS) for at in range(2, 40)]
    assert not controller.tuner.drafting
    assert "b" in asked


def test_another_drafter_is_planned_with_what_is_known_of_it() -> None:
    controller = begun(Arms())
    controller.drafter_joined("a", Guesser(5.0, 1.0, 2.0, 2.4, 6.0), 0)
    assert controller.estimates.drafter_ms == 2.0, "it was planned with"
    controller.drafter_joined("b", Guesser(5.0, 1.0, 2.0, 2.4, 6.0), 0)
    assert (controller.estimates.drafter_ms, controller.estimates.acceptance) == (5.0, 0.5)


def test_a_plan_follows_another_drafter_at_once() -> None:
    """Before any of its drafts is judged."""
    controller = begun(Arms())
    controller.drafter_joined("a", GUESSER, 0)
    controller.retune()
    controller.drafter_joined("b", Guesser(8.0, 1.0, 6.0, 2.4, 6.0), 0)
    assert controller.retune() is not None


# All drafters together


def test_drafters_that_draft_together_have_all_they_say_verified() -> None:
    """Even if each of them drafts chains. And a plan follows the drafters that are there."""
    controller = begun(Arms())
    controller.drafter_joined("a", GUESSER, 0)
    controller.retune()
    assert controller.begin().branches == 0
    controller.drafter_joined(TOGETHER, GUESSER, 0)
    policy = controller.retune()
    assert policy is not None
    assert (policy.rows, policy.branches) == (1, UNLIMITED)
    controller.drafter_joined("b", GUESSER, 0)
    policy = controller.retune()
    assert policy is not None
    assert policy.branches == 0


@pytest.mark.parametrize(("lookahead", "rows", "expected"), [
    (None, None, True), (None, 1, False), (None, 4, True), (3, None, False), (3, 1, False), (3, 4, True),
])  # fmt: skip
def test_branches_are_verified_unless_the_user_asked_for_chains(
    lookahead: int | None, rows: int | None, expected: bool
) -> None:
    assert Tuner("dsi", 1, lookahead, Estimates(), rows=rows).may_branch == expected

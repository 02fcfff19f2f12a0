"""Whether to speculate and with which drafter: learnt from what tokens took, under like conditions."""

from __future__ import annotations

import itertools

import pytest

from dsi_actors.planning.arms import PLAIN, TOGETHER, TRIAL, WARM_UP, ArmChoice, Arms, arms_of

_LONG = 20_000
DRAFTER = "d"
PROMISED_MS = 50.0


def commit(
    arms: Arms, tokens: int, each_ms: float, arm: str = DRAFTER, *, position: int = 0, promised_ms: float = PROMISED_MS,
    who: str = "somebody",
) -> None:  # fmt: skip
    for _ in range(tokens):
        arms.committed(1, 1, each_ms, arm=arm, promised_ms=promised_ms, position=position, who=who)


def pays(arms: Arms) -> bool:
    return arms.pays(DRAFTER, 0)


def until_it_changes(arms: Arms, drafted_ms: float, plain_ms: float) -> tuple[bool, int]:
    """Whether it speculates now, and for how many tokens."""
    speculates = pays(arms)
    for tokens in range(_LONG):
        if pays(arms) != speculates:
            return speculates, tokens
        commit(arms, 1, drafted_ms if speculates else plain_ms, DRAFTER if speculates else PLAIN)
    return speculates, _LONG


# What all generations share


def test_speculation_is_tried_before_it_is_judged() -> None:
    arms = Arms()
    commit(arms, TRIAL - 1, 500.0)
    assert pays(arms)
    commit(arms, 1, 500.0)
    assert not pays(arms)


def test_a_trial_ends_early_where_all_guesses_are_wrong() -> None:
    arms = Arms()
    choice = ArmChoice(arms, DRAFTER)
    guesses = 0
    while choice.speculates:
        choice.committed(1, 60.0, arm=DRAFTER, promised_ms=PROMISED_MS)
        choice.judged(1, 0)
        guesses += 1
    assert guesses <= WARM_UP + TRIAL // 3
    assert not pays(arms), "nor do others try it"


@pytest.mark.parametrize(("right_at", "each_ms"), [(5, 60.0), (None, 50.0)])
def test_a_trial_goes_on_where_a_guess_was_right_or_nothing_is_lost(right_at: int | None, each_ms: float) -> None:
    choice = ArmChoice(Arms(), DRAFTER)
    for guess in range(WARM_UP + TRIAL - 1):
        choice.committed(1, each_ms, arm=DRAFTER, promised_ms=PROMISED_MS)
        choice.judged(int(guess != right_at), int(guess == right_at))
        assert choice.speculates


def test_plain_decoding_is_held_to_what_it_was_measured_at() -> None:
    arms = Arms()
    commit(arms, 100, 60.0)
    assert not pays(arms), "the workers promised 50"
    commit(arms, 100, 70.0, PLAIN)
    assert pays(arms)


def test_each_load_is_judged_by_itself() -> None:
    running = 4
    arms = Arms(lambda: running)
    commit(arms, 1000, 500.0)
    paid = {}
    for running in (3, 4, 5, 1, 2, 8):
        commit(arms, 160 * running, 50.0, PLAIN)
        paid[running] = pays(arms)
    assert paid == {3: False, 4: False, 5: False, 1: True, 2: True, 8: True}


def test_a_load_that_is_another_for_a_moment_is_still_the_same() -> None:
    running = 4
    arms = Arms(lambda: running)
    commit(arms, 1000, 500.0)
    for _ in range(20):
        running = 2
        commit(arms, 4, 50.0, PLAIN)
        assert not pays(arms)
        running = 4
        commit(arms, 20, 50.0, PLAIN)
        assert not pays(arms)


def test_texts_of_different_lengths_are_judged_by_themselves() -> None:
    """A long text takes longer with every arm: the time of a token of one says nothing of the other."""
    arms, total_ms, tokens = Arms(), 0.0, 0
    for generation in range(200):
        begin, plain_ms, drafted_ms = ((20, 20.0, 14.0), (3000, 60.0, 40.0))[generation % 2]
        for position in range(begin, begin + 100):
            speculates = arms.pays(DRAFTER, position)
            took_ms = drafted_ms if speculates else plain_ms
            commit(arms, 1, took_ms, DRAFTER if speculates else PLAIN, position=position, promised_ms=20.0)
            total_ms, tokens = total_ms + took_ms / drafted_ms, tokens + 1
    assert total_ms / tokens < 1.02


def test_a_text_that_is_longer_than_all_others_is_judged_as_soon() -> None:
    arms, speculated = Arms(lambda: 8), 0
    for step in range(4000):
        for who in "abcdefg":
            commit(arms, 1, 20.0, position=100, promised_ms=20.0, who=who)
        speculates = arms.pays(DRAFTER, 300 + step)
        speculated += speculates
        took_ms, arm = (20.0, DRAFTER) if speculates else (10.0, PLAIN)
        commit(arms, 1, took_ms, arm, position=300 + step, promised_ms=10.0, who="long")
    assert speculated < 300
    arms.generation_ends("long")
    assert len(arms._lengths) == 7


def test_what_a_rush_does_is_not_held_against_being_alone() -> None:
    running = 1
    arms = Arms(lambda: running)
    commit(arms, 100, 45.0)
    running = 4
    commit(arms, 1000, 500.0)
    assert not pays(arms)
    running = 0
    arms.generation_begins()
    assert pays(arms)


def test_after_a_lull_the_first_generation_is_alone() -> None:
    running = 4
    arms = Arms(lambda: running)
    commit(arms, 1000, 500.0)
    arms.generation_begins()
    assert not pays(arms)
    running = 0
    arms.generation_begins()
    assert pays(arms)


def test_what_is_slower_is_tried_again_and_ever_more_seldom() -> None:
    arms = Arms()
    found = [until_it_changes(arms, drafted_ms=100.0, plain_ms=50.0) for _ in range(16)]
    assert [speculates for speculates, _ in found] == [True, False] * 8
    assert all(tokens < 60 for _, tokens in found[::2])
    plain = [tokens for _, tokens in found[1::2]]
    assert plain[0] < 600
    assert plain == sorted(plain)
    assert 16_000 < plain[-1] < 17_000


def test_what_has_become_faster_is_found_out() -> None:
    arms = Arms()
    for _ in range(7):
        until_it_changes(arms, drafted_ms=100.0, plain_ms=50.0)
    assert not pays(arms)
    until_it_changes(arms, drafted_ms=25.0, plain_ms=50.0)
    assert until_it_changes(arms, drafted_ms=25.0, plain_ms=50.0) == (True, _LONG)
    until_it_changes(arms, drafted_ms=100.0, plain_ms=50.0)
    assert until_it_changes(arms, drafted_ms=25.0, plain_ms=50.0)[1] < 600, "impatient again"


def test_plain_decoding_slower_than_promised_is_tried_again_as_seldom() -> None:
    arms = Arms()
    found = [until_it_changes(arms, drafted_ms=60.0, plain_ms=80.0) for _ in range(16)]
    assert [speculates for speculates, _ in found] == [True, False] * 8
    assert all(tokens < 60 for speculates, tokens in found[1:] if not speculates)
    assert max(tokens for _, tokens in found) > 16_000


def test_what_counts_is_time_over_tokens_of_the_last_ones() -> None:
    arms = Arms()
    commit(arms, 1000, 500.0)
    for _ in range(100):
        for tokens, took_ms in ((4, 160.0), (1, 60.0)):
            arms.committed(tokens, tokens, took_ms, arm=DRAFTER, promised_ms=50.0, position=0, who="a")
    assert pays(arms)


@pytest.mark.parametrize("promised_ms", [0.0, 50.0])
def test_no_wait_counts_without_end(promised_ms: float) -> None:
    arms = Arms()
    commit(arms, 64, 40.0)
    commit(arms, 1, 1e12, promised_ms=promised_ms)
    commit(arms, 200, 40.0)
    assert pays(arms)


def test_without_a_promise_nothing_is_learnt() -> None:
    arms = Arms()
    commit(arms, 100, 1000.0, promised_ms=0.0)
    assert pays(arms)
    assert arms.ratio(DRAFTER, 0) == 0


# One generation, several drafters

PLAIN_MS = 40.0


def generate(arms: Arms, tokens: int, each_ms: dict[str, float], drafters: list[str] | None = None) -> list[str]:
    """The arm of each token of one generation, in which a token takes so long by each of them."""
    drafters = drafters or list(each_ms)
    choice, used = ArmChoice(arms), []
    choice.use(choice.first(drafters))
    for _ in range(tokens):
        arm = choice.drafter if choice.speculates else PLAIN
        used.append(arm)
        choice.committed(1, each_ms[arm] if arm else PLAIN_MS, arm=arm, promised_ms=PLAIN_MS)
        if (another := choice.another(drafters)) is not None:
            choice.use(another)
    choice.ended()
    return used


def begun(arms: Arms, drafter: str, tokens: int, each_ms: float) -> ArmChoice:
    """A generation in the middle."""
    choice = ArmChoice(arms)
    choice.use(drafter)
    for _ in range(tokens):
        choice.committed(1, each_ms, arm=drafter, promised_ms=PLAIN_MS)
    return choice


def test_each_is_tried_in_turn_then_the_fastest_stays() -> None:
    used = generate(Arms(), 400, {"a": 30.0, "b": 20.0, "c": 25.0})
    changes = [place for place in range(1, len(used)) if used[place] != used[place - 1]]
    trial = WARM_UP + TRIAL
    assert changes == [trial, 2 * trial, 3 * trial]
    assert [used[place] for place in (0, *changes)] == ["a", "b", "c", "b"]


def test_the_next_generation_begins_with_the_fastest_and_stays() -> None:
    arms = Arms()
    generate(arms, 200, {"a": 30.0, "b": 20.0})
    assert set(generate(arms, 200, {"a": 30.0, "b": 20.0})) == {"b"}


def test_a_text_for_which_it_is_slow_gets_another_one() -> None:
    """As prompt lookup, where nothing repeats: then the one that is usually second best is tried."""
    arms = Arms()
    generate(arms, 400, {"a": 10.0, "b": 20.0, "c": 30.0})
    used = generate(arms, 200, {"a": 38.0, "b": 20.0, "c": 30.0})
    assert used[: WARM_UP + TRIAL] == ["a"] * (WARM_UP + TRIAL)
    assert set(used[WARM_UP + TRIAL :]) == {"b"}


def test_what_differs_little_is_not_worth_a_change() -> None:
    arms = Arms()
    generate(arms, 200, {"a": 20.0, "b": 30.0})
    assert set(generate(arms, 200, {"a": 30.5, "b": 30.0})) == {"a"}


def test_how_it_begins_after_a_change_does_not_count() -> None:
    arms = Arms()
    choice = begun(arms, "a", WARM_UP, 1000.0)
    for _ in range(TRIAL):
        choice.committed(1, 20.0, arm="a", promised_ms=PLAIN_MS)
    assert arms.ratio("a", 0) == 0.5


def test_another_one_is_asked_for_once_in_a_while() -> None:
    """It may not be there: then what there is stays, and there may be room later."""
    choice = begun(Arms(), "a", WARM_UP + TRIAL, 30.0)
    assert choice.another(["a", "b"]) == "b"
    choice.committed(1, 20.0, arm="a", promised_ms=PLAIN_MS)
    assert choice.another(["a", "b"]) is None
    choice.committed(200, 4000.0, arm="a", promised_ms=PLAIN_MS)
    assert choice.another(["a", "b"]) == "b"


def test_one_long_wait_does_not_end_a_drafter() -> None:
    """A worker that died, say: the drafter is as good as before."""
    arms = Arms()
    generate(arms, 200, {"a": 20.0, "b": 30.0})
    choice = begun(arms, "a", WARM_UP, 20.0)
    choice.committed(1, 2000.0, arm="a", promised_ms=PLAIN_MS)
    assert choice.first(["a", "b"]) == "a"
    choice.committed(TRIAL, 20.0 * TRIAL, arm="a", promised_ms=PLAIN_MS)
    assert choice.another(["a", "b"]) is None


def test_what_was_not_used_for_long_is_tried_again() -> None:
    arms = Arms()
    generate(arms, 200, {"a": 20.0, "b": 30.0})
    generations = 1
    while "b" not in generate(arms, 100, {"a": 20.0, "b": 10.0}):
        generations += 1
        assert generations < 20
    assert generations > 3
    begun_with = [generate(arms, 100, {"a": 20.0, "b": 10.0})[0] for _ in range(10)]
    assert begun_with.count("b") >= 8


def test_what_does_not_pay_here_does_not_hide_the_next_best() -> None:
    arms = Arms()
    for drafter, each_ms in (("a", 8.0), ("b", 32.0), ("c", 20.0)):
        generate(arms, 200, {drafter: each_ms})
    commit(arms, 200, 100.0, "a", promised_ms=PLAIN_MS)
    choice = begun(arms, "b", WARM_UP + TRIAL, 32.0)
    assert choice.another(["a", "b", "c"]) == "c"


def test_one_with_a_long_past_may_become_the_fastest_again() -> None:
    arms = Arms()
    for each_ms in ({"a": 30.0, "b": 34.0}, {"a": 30.0, "b": 20.0}):
        for _ in range(400):
            generate(arms, 128, each_ms)
    generations = 0
    while generate(arms, 128, {"a": 10.0, "b": 20.0})[0] != "a":
        generations += 1
        assert generations < 300
    assert sum(generate(arms, 128, {"a": 10.0, "b": 20.0})[0] == "a" for _ in range(20)) >= 18


@pytest.mark.parametrize("slow_ms", [25.0, 30.0, 38.0, 60.0])
def test_what_stays_slower_is_tried_ever_more_seldom(slow_ms: float) -> None:
    arms, each_ms = Arms(), {"a": 20.0, "b": slow_ms}
    used = [generate(arms, 64, each_ms) for _ in range(600)]
    tried = [number for number, kinds in enumerate(used) if "b" in kinds]
    assert 3 <= len(tried) <= 10
    gaps = [after - before for before, after in itertools.pairwise(tried) if after - before > 1]
    assert gaps == sorted(gaps)


def test_where_no_drafter_pays_nothing_is_drafted() -> None:
    arms = Arms()
    for _ in range(20):
        used = generate(arms, 200, {"a": 60.0, "b": 70.0})
    assert set(used) == {PLAIN}


def test_one_that_is_never_left_is_not_left_for_plain_decoding() -> None:
    arms = Arms()
    choice = ArmChoice(arms, never_left=("lookup",))
    choice.use("lookup")
    for _ in range(500):
        choice.committed(1, 44.0, arm="lookup", promised_ms=PLAIN_MS)
        assert choice.speculates


def test_where_the_user_fixed_how_to_speculate_nothing_is_told_to_others() -> None:
    arms = Arms()
    choice = ArmChoice(arms, left_to_us=False)
    choice.use("a")
    for _ in range(200):
        choice.committed(1, 100.0, arm="a", promised_ms=PLAIN_MS)
    assert choice.speculates
    assert choice.another(["a", "b"]) == "b"
    assert arms.pays("a", 0)


# All drafters together


@pytest.mark.parametrize(("kinds", "trees", "arms"), [
    (["a", "b"], True, ["a", "b", TOGETHER]), (["a", "b"], False, ["a", "b"]), (["a"], True, ["a"]), ([], True, []),
])  # fmt: skip
def test_drafters_draft_together_where_there_are_several_and_trees_are_verified(
    kinds: list[str], trees: bool, arms: list[str]
) -> None:
    assert arms_of(kinds, trees=trees) == arms


def test_all_together_are_tried_after_each_alone_and_kept_if_that_is_faster() -> None:
    arms = Arms()
    each_ms = {"a": 20.0, "b": 25.0, TOGETHER: 15.0}
    used = generate(arms, 300, each_ms)
    assert used[0] == "a"
    assert set(used[-100:]) == {TOGETHER}
    assert set(generate(arms, 200, each_ms)) == {TOGETHER}


@pytest.mark.parametrize("together_ms", [20.5, 40.0])
def test_all_together_cost_no_more_than_a_trial_where_they_are_slower(together_ms: float) -> None:
    arms = Arms()
    each_ms = {"a": 20.0, "b": 25.0, TOGETHER: together_ms}
    used = [arm for _ in range(10) for arm in generate(arms, 300, each_ms)]
    assert used.count(TOGETHER) <= 4 * (WARM_UP + TRIAL)
    assert used.count("a") > 0.85 * len(used)

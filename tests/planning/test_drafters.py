"""Which of several drafters a generation takes: judged by how long tokens took, here and in other generations."""

from __future__ import annotations

import itertools

import pytest

from dsi_actors.planning.drafters import TRIAL, WARM_UP, DrafterChoice, Drafters

KINDS = ["a", "b", "c"]
PLAIN_MS = 40.0


def generate(drafters: Drafters, tokens: int, each_ms: dict[str, float], kinds: list[str] | None = None) -> list[str]:
    """The drafter of each token of one generation, in which a token takes so long by each of them."""
    kinds = kinds or list(each_ms)
    choice, used = DrafterChoice(drafters, drafters.first(kinds)), []
    choice.use(choice.kind)
    for _ in range(tokens):
        used.append(choice.kind)
        choice.committed(1, each_ms[choice.kind], PLAIN_MS)
        if (kind := choice.change(kinds)) is not None:
            choice.use(kind)
    choice.ended()
    return used


def test_each_is_tried_in_turn_then_the_fastest_stays() -> None:
    used = generate(Drafters(), 400, {"a": 30.0, "b": 20.0, "c": 25.0})
    changes = [place for place in range(1, len(used)) if used[place] != used[place - 1]]
    trial = WARM_UP + TRIAL
    assert changes == [trial, 2 * trial, 3 * trial]
    assert [used[place] for place in (0, *changes)] == ["a", "b", "c", "b"]


def test_the_next_generation_begins_with_the_fastest_and_stays() -> None:
    drafters = Drafters()
    generate(drafters, 200, {"a": 30.0, "b": 20.0})
    assert set(generate(drafters, 200, {"a": 30.0, "b": 20.0})) == {"b"}


def test_a_text_for_which_it_is_slow_gets_another_one() -> None:
    """As prompt lookup, where nothing repeats: then the one that is usually second best is tried."""
    drafters = Drafters()
    generate(drafters, 1000, {"a": 10.0, "b": 20.0, "c": 30.0})
    used = generate(drafters, 200, {"a": 38.0, "b": 20.0, "c": 30.0})
    assert used[: WARM_UP + TRIAL] == ["a"] * (WARM_UP + TRIAL)
    assert set(used[WARM_UP + TRIAL :]) == {"b"}
    assert generate(drafters, 40, {"a": 10.0, "b": 20.0, "c": 30.0})[0] in "ab"


def test_what_differs_little_is_not_worth_a_change() -> None:
    drafters = Drafters()
    generate(drafters, 200, {"a": 20.0, "b": 30.0})
    assert set(generate(drafters, 200, {"a": 30.5, "b": 30.0})) == {"a"}


def test_how_it_begins_after_a_change_does_not_count() -> None:
    choice = DrafterChoice(Drafters(), "a")
    choice.committed(WARM_UP, 1000.0 * WARM_UP, PLAIN_MS)
    choice.committed(TRIAL, 20.0 * TRIAL, PLAIN_MS)
    assert choice.drafters.ratio("a") == 0.5


def test_another_one_is_asked_for_once() -> None:
    """It may not be there: then what there is stays."""
    choice = DrafterChoice(Drafters(), "a")
    choice.committed(WARM_UP + TRIAL, 1000.0, PLAIN_MS)
    assert choice.change(["a", "b"]) == "b"
    choice.committed(1, 20.0, PLAIN_MS)
    assert choice.change(["a", "b"]) is None


def test_what_was_not_tried_is_not_settled() -> None:
    drafters = Drafters()
    choice = DrafterChoice(drafters, "a")
    choice.committed(WARM_UP + TRIAL, 1000.0, PLAIN_MS)
    assert not choice.settled(["a", "b"])
    assert choice.settled(["a"])
    generate(drafters, 100, {"b": 20.0})
    assert choice.settled(["a", "b"])


def test_without_a_promise_nothing_is_learnt() -> None:
    choice = DrafterChoice(Drafters(), "a")
    choice.committed(100, 1000.0, 0.0)
    assert choice.change(["a", "b"]) is None


def test_one_long_wait_does_not_end_a_drafter() -> None:
    """A worker that died, say: the drafter is as good as before."""
    drafters = Drafters()
    generate(drafters, 200, {"a": 20.0, "b": 30.0})
    choice = DrafterChoice(drafters, "a")
    choice.committed(WARM_UP, 20.0 * WARM_UP, PLAIN_MS)
    choice.committed(1, 2000.0, PLAIN_MS)
    assert drafters.first(["a", "b"]) == "a"
    choice.committed(TRIAL, 20.0 * TRIAL, PLAIN_MS)
    assert choice.change(["a", "b"]) is None


def test_what_was_not_used_for_long_is_tried_again() -> None:
    drafters = Drafters()
    generate(drafters, 200, {"a": 20.0, "b": 30.0})
    generations = 1
    while "b" not in generate(drafters, 100, {"a": 20.0, "b": 10.0}):
        generations += 1
        assert generations < 50
    assert generations > 5
    for _ in range(5):
        generate(drafters, 100, {"a": 20.0, "b": 10.0})
    assert generate(drafters, 100, {"a": 20.0, "b": 10.0})[0] == "b"


def test_what_does_not_pay_here_does_not_hide_the_next_best() -> None:
    drafters = Drafters()
    for kind, each_ms in (("a", 8.0), ("b", 32.0), ("c", 20.0)):
        generate(drafters, 200, {kind: each_ms})
    choice = DrafterChoice(drafters, "b")
    choice.committed(WARM_UP + TRIAL, 32.0 * (WARM_UP + TRIAL), PLAIN_MS)
    assert choice.change(KINDS, lambda kind: kind != "a") == "c"


def test_one_with_a_long_past_may_become_the_fastest_again() -> None:
    drafters = Drafters()
    for each_ms in ({"a": 30.0, "b": 34.0}, {"a": 30.0, "b": 20.0}):
        for _ in range(400):
            generate(drafters, 128, each_ms)
    generations = 0
    while drafters.first(["a", "b"]) != "a" or drafters.ratio("a") > drafters.ratio("b"):
        generate(drafters, 128, {"a": 10.0, "b": 20.0})
        generations += 1
        assert generations < 700
    assert sum("a" in generate(drafters, 128, {"a": 10.0, "b": 20.0}) for _ in range(20)) == 20


@pytest.mark.parametrize("slow_ms", [25.0, 30.0, 38.0])
def test_what_stays_slower_is_tried_ever_more_seldom(slow_ms: float) -> None:
    drafters, each_ms = Drafters(), {"a": 20.0, "b": slow_ms}
    used = [generate(drafters, 64, each_ms) for _ in range(600)]
    tried = [number for number, kinds in enumerate(used) if "b" in kinds]
    assert 3 <= len(tried) <= 8
    gaps = [after - before for before, after in itertools.pairwise(tried)]
    assert gaps == sorted(gaps)


def test_one_that_cannot_be_had_does_not_keep_the_others_from_being_judged() -> None:
    choice = DrafterChoice(Drafters(), "a")
    choice.committed(WARM_UP + TRIAL, 1000.0, PLAIN_MS)
    assert choice.change(["a", "b"]) == "b"
    assert choice.settled(["a", "b"])
    choice.committed(200, 4000.0, PLAIN_MS)
    assert choice.change(["a", "b"]) == "b", "there may be room now"

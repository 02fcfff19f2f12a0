"""Whether speculation pays: learned from how long tokens took."""

from __future__ import annotations

import pytest

from dsi_actors.planning.pace import Pace

_LONG = 20_000
DRAFTER = "d"


def pays(pace: Pace) -> bool:
    return pace.pays(DRAFTER, 0)


def commit(pace: Pace, tokens: int, each_ms: float, *, speculating: bool) -> None:
    for _ in range(tokens):
        pace.committed(1, each_ms, drafter=DRAFTER if speculating else None, promised_ms=50.0, position=0)


def until_it_changes(pace: Pace, speculating_ms: float, plain_ms: float) -> tuple[bool, int]:
    """Whether it speculates now, and for how many tokens."""
    speculates = pays(pace)
    for tokens in range(_LONG):
        if pays(pace) != speculates:
            return speculates, tokens
        commit(pace, 1, speculating_ms if speculates else plain_ms, speculating=speculates)
    return speculates, _LONG


def test_speculation_is_tried_before_it_is_judged() -> None:
    pace = Pace()
    commit(pace, 31, 500.0, speculating=True)
    assert pays(pace)
    commit(pace, 1, 500.0, speculating=True)
    assert not pays(pace)


def test_how_a_trial_begins_does_not_count() -> None:
    pace = Pace()
    commit(pace, 8, 5000.0, speculating=True)
    commit(pace, 100, 45.0, speculating=True)
    assert pays(pace)


def test_plain_decoding_is_held_to_what_it_was_measured_at() -> None:
    pace = Pace()
    commit(pace, 100, 60.0, speculating=True)
    assert not pays(pace), "the workers promised 50"
    commit(pace, 100, 70.0, speculating=False)
    assert pays(pace)


def test_each_load_is_judged_by_itself() -> None:
    running = 4
    pace = Pace(lambda: running)
    commit(pace, 1000, 500.0, speculating=True)
    paid = {}
    for running in (3, 4, 5, 1, 2, 8):
        commit(pace, 160 * running, 50.0, speculating=False)
        paid[running] = pays(pace)
    assert paid == {3: False, 4: False, 5: False, 1: True, 2: True, 8: True}


def test_a_load_that_is_another_for_a_moment_is_still_the_same() -> None:
    running = 4
    pace = Pace(lambda: running)
    commit(pace, 1000, 500.0, speculating=True)
    for _ in range(20):
        running = 2
        commit(pace, 4, 50.0, speculating=False)
        assert not pays(pace)
        running = 4
        commit(pace, 20, 50.0, speculating=False)
        assert not pays(pace)


def test_texts_of_different_lengths_are_judged_by_themselves() -> None:
    """A long text takes longer in every way: the time of a token of one says nothing of the other."""
    pace, total_ms, tokens = Pace(), 0.0, 0
    for generation in range(200):
        begin, plain_ms, drafted_ms = ((20, 20.0, 14.0), (3000, 60.0, 40.0))[generation % 2]
        for position in range(begin, begin + 100):
            speculates = pace.pays(DRAFTER, position)
            took_ms = drafted_ms if speculates else plain_ms
            pace.committed(1, took_ms, drafter=DRAFTER if speculates else None, promised_ms=20.0, position=position)
            total_ms, tokens = total_ms + took_ms / drafted_ms, tokens + 1
    assert total_ms / tokens < 1.02


def test_a_text_that_is_longer_than_all_others_is_judged_as_soon() -> None:
    pace, speculated = Pace(lambda: 8), 0
    for step in range(4000):
        for who in range(7):
            pace.committed(1, 20.0, drafter=DRAFTER, promised_ms=20.0, position=100, who=who)
        speculates = pace.pays(DRAFTER, 300 + step)
        speculated += speculates
        took_ms = 20.0 if speculates else 10.0
        pace.committed(
            1, took_ms, drafter=DRAFTER if speculates else None, promised_ms=10.0, position=300 + step, who="long"
        )
    assert speculated < 300
    pace.ended("long")
    assert len(pace._lengths) == 7


def test_all_that_are_alike_go_one_way() -> None:
    pace = Pace()
    for promised_ms in (26.0, 50.0):
        commit(pace, 1, 40.0, speculating=True)
        for _ in range(60):
            pace.committed(1, 40.0, drafter=DRAFTER, promised_ms=promised_ms, position=10)
        assert pace.pays(DRAFTER, 10) == pace.pays(DRAFTER, 200) == (promised_ms == 50.0)


def test_what_a_rush_does_is_not_held_against_being_alone() -> None:
    running = 1
    pace = Pace(lambda: running)
    commit(pace, 100, 45.0, speculating=True)
    running = 4
    commit(pace, 1000, 500.0, speculating=True)
    assert not pays(pace)
    running = 0
    pace.generation_begins()
    assert pays(pace)


def test_after_a_lull_who_comes_first_is_alone() -> None:
    running = 4
    pace = Pace(lambda: running)
    commit(pace, 1000, 500.0, speculating=True)
    pace.generation_begins()
    assert not pays(pace)
    running = 0
    pace.generation_begins()
    assert pays(pace)


def test_what_is_slower_is_tried_again_and_ever_more_seldom() -> None:
    pace = Pace()
    found = [until_it_changes(pace, speculating_ms=100.0, plain_ms=50.0) for _ in range(16)]
    assert [speculates for speculates, _ in found] == [True, False] * 8
    assert all(tokens < 60 for _, tokens in found[::2])
    plain = [tokens for _, tokens in found[1::2]]
    assert plain[0] < 600
    assert plain == sorted(plain)
    assert 16_000 < plain[-1] < 17_000


def test_what_has_become_faster_is_found_out() -> None:
    pace = Pace()
    for _ in range(7):
        until_it_changes(pace, speculating_ms=100.0, plain_ms=50.0)
    assert not pays(pace)
    until_it_changes(pace, speculating_ms=25.0, plain_ms=50.0)
    assert until_it_changes(pace, speculating_ms=25.0, plain_ms=50.0) == (True, _LONG)
    until_it_changes(pace, speculating_ms=100.0, plain_ms=50.0)
    assert until_it_changes(pace, speculating_ms=25.0, plain_ms=50.0)[1] < 600, "impatient again"


def test_plain_decoding_slower_than_promised_is_tried_again_as_seldom() -> None:
    pace = Pace()
    found = [until_it_changes(pace, speculating_ms=60.0, plain_ms=80.0) for _ in range(16)]
    assert all(tokens < 60 for speculates, tokens in found[1:] if not speculates)
    assert max(tokens for _, tokens in found) > 16_000


def test_what_counts_is_time_over_tokens_of_the_last_ones() -> None:
    pace = Pace()
    commit(pace, 1000, 500.0, speculating=True)
    for _ in range(100):
        pace.committed(4, 160.0, drafter=DRAFTER, promised_ms=50.0, position=0)
        pace.committed(1, 60.0, drafter=DRAFTER, promised_ms=50.0, position=0)
    assert pays(pace)


@pytest.mark.parametrize("promised_ms", [0.0, 50.0])
def test_no_wait_counts_without_end(promised_ms: float) -> None:
    pace = Pace()
    commit(pace, 64, 40.0, speculating=True)
    pace.committed(1, 1e12, drafter=DRAFTER, promised_ms=promised_ms, position=0)
    commit(pace, 200, 40.0, speculating=True)
    assert pays(pace)

"""Prompt lookup for a drafter: it drafts what it would have drafted, in fewer forwards where text repeats."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsi_protocol import SamplingParameters
from dsi_workers.backend import Run
from dsi_workers.decoding.forward import Forward
from dsi_workers.drafting.lookup import Lookup
from dsi_workers.drafting.suffix_index import SuffixIndex, Text, Texts
from dsi_workers.engines import Engine, Interrupted, Task, load_engine
from dsi_workers.session import Session
from support.engines import InterruptAfter, NoInterrupt, make_tiny_model, session_of

FLAT = {1: 10.0, 8: 11.0}


def become(text: Text, tokens: Sequence[int]) -> bool:
    """Give the text's session these tokens, and have the text read them."""
    text.session.write(0, tokens)
    text.session.truncate(len(tokens))
    return text.read()


def text_in(index: SuffixIndex) -> Text:
    return Text(index, session_of([]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def drafter(model: Path, **options: bool) -> Engine:
    return load_engine(
        "transformers", role="drafter", model=str(model), device="cpu:0", options={"quantization": "none", **options}
    )


def draft(engine: Engine, session: Session, count: int) -> list[int]:
    """As the loop does it: what a step gives is written before the next."""
    begin = len(session.tokens)
    while (left := begin + count - len(session.tokens)) > 0:
        session.write(len(session.tokens), engine.draft(session, left, NoInterrupt()))
    return session.tokens[begin:]


@pytest.mark.parametrize("sampling", [SamplingParameters(), SamplingParameters(1.5, repetition_penalty=1.2, seed=3)])
def test_it_drafts_what_it_would_have_drafted(model: Path, sampling: SamplingParameters) -> None:
    """Whatever was rejected, written otherwise or interrupted before."""
    plain, guessing = drafter(model), drafter(model, lookup=True)
    cast("Any", guessing)._lookup = Lookup(
        FLAT, remember=True, copy_rate=2.0
    )  # many guesses are worth it, none is copied
    chance = random.Random(1)
    for generation in range(8):
        sessions = [Session(generation, 5, "test", sampling) for _ in range(2)]
        prompt = [chance.randrange(6) for _ in range(30)]
        for session in sessions:
            session.write(0, prompt)
        for _ in range(25):
            count = chance.randrange(1, 9)
            begin = len(sessions[0].tokens)
            if chance.random() < 0.2:
                with pytest.raises(Interrupted):
                    guessing.draft(sessions[1], count, InterruptAfter(chance.randrange(3)))
            expected, found = (
                draft(engine, each, count) for engine, each in zip((plain, guessing), sessions, strict=True)
            )
            assert found == expected
            at = begin + chance.randrange(count + 1)
            if chance.random() < 0.3:  # drafted, and thrown away before it was written
                guessing.draft(sessions[1], 5, NoInterrupt())
            correction = [chance.randrange(6)]
            for session in sessions:  # rejected from here on
                session.truncate(at)
                session.write(at, correction)
    assert guessing.forwards < plain.forwards


def test_text_that_repeats_takes_few_forwards(model: Path) -> None:
    plain, guessing = drafter(model), drafter(model, lookup=True)
    cast("Any", guessing)._lookup = Lookup(FLAT, remember=True, copy_rate=2.0)
    text = draft(plain, session_of([3, 14, 15]), 120)
    first = session_of([3, 14, 15], generation=1)
    assert draft(guessing, first, 120) == text
    guessing.forget(first)
    before = guessing.forwards
    assert draft(guessing, session_of([3, 14, 15], generation=2), 120) == text
    assert guessing.forwards - before < 45, "another generation said it before"


def test_guesses_that_are_wrong_are_left_and_tried_again() -> None:
    lookup = Lookup({1: 10.0, 8: 20.0}, remember=False)
    session = session_of([1, 2, 3, 4, 5, 6, 1, 2])
    tried = []
    for _ in range(400):
        guess = lookup.guess(session, 7)
        tried.append(bool(guess))
        if guess:
            lookup.checked(session, guess, right=0)
    assert 2 <= sum(tried[:50]) < 20
    assert 1 <= sum(tried[200:]) < 25
    assert lookup.guess(session, 0) == []


def surely(lookup: Lookup) -> Lookup:
    """It has been right for long."""
    for record in lookup._records.values():
        record.count(200, 200)
    return lookup


def test_what_was_always_right_is_copied_until_the_model_is_too_far_behind() -> None:
    lookup = Lookup(FLAT, remember=False)
    session = session_of(list(range(100)) * 2)
    session.computed = 200
    assert lookup.copy(session, 7) == [], "it was not right yet"
    surely(lookup)
    copied: list[int] = []
    while found := lookup.copy(session, 7):
        copied += found
        session.write(len(session.tokens), found)
    assert copied == list(range(len(copied)))
    assert 48 - 7 < len(copied) <= 48
    session.computed = len(session.tokens)
    assert len(lookup.copy(session, 3)) == 3
    assert lookup.copy(session_of([1, 2, 3] * 4, generation=2), 7) == [], "three are not worth it"


def lookup_rate(lookup: Lookup) -> float:
    return lookup._records[4].rate


@pytest.mark.parametrize("right", [0, 3, 6])
def test_a_copy_that_was_wrong_counts_as_a_guess_that_was_wrong(right: int) -> None:
    copying, checking = (surely(Lookup(FLAT, remember=False)) for _ in range(2))
    sessions = [session_of(list(range(20)) * 2) for _ in range(2)]
    for session in sessions:
        session.computed = 40
    copied, guess = copying.copy(sessions[0], 7), checking.guess(sessions[1], 7)
    assert copied == guess
    sessions[0].write(40, copied)
    later = copying.copy(sessions[0], 7)
    sessions[0].write(47, later)
    checking.checked(sessions[1], guess, right=right)
    sessions[0].truncate(40 + right)
    sessions[0].write(40 + right, [99])  # the target says something else, and what follows it is gone
    copying.copy(sessions[0], 7)
    found, expected = (lookup._records[4] for lookup in (copying, checking))
    assert found.rate == pytest.approx(expected.rate, abs=0.002)
    assert found.rate < lookup_rate(surely(Lookup(FLAT, remember=False))) - 0.003


def test_what_was_dropped_with_what_was_before_it_says_nothing() -> None:
    lookup = surely(Lookup(FLAT, remember=False))
    session = session_of(list(range(20)) * 2)
    session.computed = 40
    before = lookup_rate(lookup)
    session.write(40, lookup.copy(session, 7))
    session.truncate(30)
    session.write(30, [99])
    lookup.copy(session, 7)
    assert lookup_rate(lookup) == pytest.approx(before, abs=0.001)


def test_what_was_sure_for_long_is_not_so_for_long_after() -> None:
    """Texts differ, and all generations of a worker share what it knows."""
    lookup, line = surely(Lookup(FLAT, remember=False)), list(range(20))
    for generation in range(300):
        session = session_of(line * 2, generation=generation)
        session.computed = 40
        session.write(40, lookup.copy(session, 7))
        lookup.forget(session)
    copies = 0
    for generation in range(1000, 1100):
        session = session_of(line * 2, generation=generation)
        session.computed = 40
        if not (copied := lookup.copy(session, 7)):
            break
        copies += 1
        session.write(40, copied)
        session.truncate(40)
        session.write(40, [99])
        lookup.forget(session)  # the generation ends, and what it has found out counts
    assert 3 < copies < 15


def test_copying_takes_no_forwards(model: Path) -> None:
    copying = drafter(model, lookup=True)
    line = list(range(20, 32))
    found = session_of(line * 4)
    copying.draft(found, 1, NoInterrupt())  # it reads the text
    cast("Any", copying)._lookup = surely(Lookup(FLAT, remember=True))
    before = copying.forwards
    assert draft(copying, found, 36) == line * 3
    assert copying.forwards == before
    assert draft(copying, found, 14)[:7] == line[:7]
    assert copying.forwards > before, "it read what it was behind, and said a token of its own"
    assert found.computed > 48 + 36
    pair = session_of(line * 2, generation=2), session_of([7, 7, 3], generation=3)  # in one step, of which one copies
    tasks = [Task(session, len(session.tokens), 4) for session in pair]
    copying.step(tasks, NoInterrupt())
    assert [task.done for task in tasks] == [True, True]
    assert tasks[0].answer.tokens == line[:4]
    assert len(tasks[1].answer.tokens) == 1


def test_a_machine_that_is_disturbed_for_a_moment_does_not_make_guesses_dear(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def timed_s(self: Forward, runs: Sequence[Run], *, rows: int, logit_rows: int) -> float:
        nonlocal calls
        calls += 1
        return (0.010 + 0.0005 * rows) * (4.0 if 3 <= calls <= 10 else 1.0)

    monkeypatch.setattr(Forward, "timed_s", timed_s)
    lookup = cast("Any", drafter(model, lookup=True))._lookup
    assert lookup._costs_us == pytest.approx({1: 10_500, 2: 11_000, 4: 12_000, 8: 14_000})


def test_what_is_dear_is_not_done() -> None:
    session = session_of([1, 2, 3, 4, 5, 6, 1, 2])
    assert Lookup({1: 10.0, 8: 150.0}, remember=False).guess(session, 7) == []
    assert Lookup(FLAT, remember=False).guess(session, 7)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 5))
def test_what_is_found_did_follow(text: list[int], most: int) -> None:
    index = SuffixIndex()
    grown = text_in(index)
    for end in range(len(text) + 1):
        become(grown, text[:end])
    found, match = index.find(text, most)
    assert len(found) <= most
    if found:
        needle = [*text[-match:], *found]
        assert any(text[at : at + len(needle)] == needle for at in range(len(text)))
    else:
        assert all(text[at : at + 2] != text[-2:] for at in range(len(text) - 2))


def test_an_index_forgets_the_oldest() -> None:
    index = SuffixIndex(most_places=200)
    become(text_in(index), [1, 2, 3])
    assert index.find([1, 2], 1) == ([3], 2)
    become(text_in(index), list(range(1000, 1400)))
    assert index.find([1398, 1399], 1) == ([], 0)
    assert index.find([1396, 1397], 1) == ([1398], 2)
    become(text_in(index), list(range(2000, 2400)))
    assert index.find([1, 2], 1) == ([], 0)
    assert len(index._young) + len(index._old) < 2000


def test_generations_learn_from_one_another_only_if_they_may() -> None:
    for remember, expected in ((True, [3, 4]), (False, [])):
        texts = Texts(remember=remember)
        old, new = session_of([1, 2, 3, 4], generation=1), session_of([9, 1, 2], generation=2)
        texts.find(old, 2)
        texts.forget(old)
        assert texts.find(new, 2)[0] == expected


def test_what_was_right_counts_only_where_it_stood_and_if_nothing_before_it_changed() -> None:
    lookup = Lookup(FLAT, remember=False)
    session = session_of([1, 2, 3, 4, 1, 2])
    session.computed = 6
    assert lookup.guess(session, 2) == [3, 4]
    lookup.checked(session, [3, 4], right=2)
    session.write(6, [3, 4, 5])
    lookup.recognize(session)
    assert session.computed == 8

    lookup.guess(session, 2)
    session.computed = 9
    lookup.checked(session, [7, 8], right=2)
    session.truncate(5)
    session.write(5, [0, 0, 0, 0, 7, 8, 9])  # the guess stands where it stood, on another text
    lookup.recognize(session)
    assert session.computed == 5


_Tokens = st.lists(st.integers(0, 3), max_size=40)


@given(st.lists(_Tokens, min_size=1, max_size=8), _Tokens)
def test_what_was_rejected_leaves_no_trace(versions: list[list[int]], text: list[int]) -> None:
    """A text that was guessed wrongly, again and again, answers as one that always was what it is."""
    index, straight = SuffixIndex(), SuffixIndex()
    changing = text_in(index)
    for version in [*versions, text]:
        become(changing, version)
    become(text_in(straight), text)
    assert index.find(text, 3) == straight.find(text, 3)
    assert index._young.keys() == straight._young.keys()


def test_a_text_that_loses_more_than_is_remembered_is_not_found_where_it_was() -> None:
    index = SuffixIndex()
    text = text_in(index)
    become(text, list(range(5000)))
    become(text, [7])
    assert index.find([8, 9], 2) == ([], 0)
    become(text, [7, 8, 9, 1])
    assert index.find([8, 9], 2) == ([1], 2)


def test_all_tokens_that_followed_are_found_the_latest_first() -> None:
    index = SuffixIndex()
    text = text_in(index)
    become(text, [1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 3, 9, 1, 2])
    assert index.find_next([1, 2]) == [3, 4]
    assert index.find_next([9, 1, 2]) == [3, 4]
    assert index.find([1, 2], 3) == ([3, 9, 1], 2)
    assert index.find_next([7, 7]) == []
    become(text, [1, 2, 3, 9, 1, 2, 4, 9, 1, 2])
    assert index.find_next([1, 2]) == [4, 3], "what was taken back leaves no trace"


def test_the_tree_of_prompt_lookup_has_the_other_matches() -> None:
    engine = load_engine("ngram", role="drafter", model="", device="cpu:0", options={"remember": False, "block": 3})
    assert engine.info.rows > 1
    drafted = session_of([1, 2, 5, 6, 7, 1, 2, 3, 4, 8, 1, 2])
    task = Task(drafted, 12, 8, alternatives=True)
    engine.step([task], NoInterrupt())
    assert task.answer.tokens == engine.draft(drafted, 8, NoInterrupt()) == [3, 4, 8]
    assert task.answer.alternatives == [5, None, None]
    drafted.drafts.restart(drafted.tokens, 12)
    drafted.drafts.add(12, task.answer.tokens, task.answer.alternatives, (), ())
    drafted.write(12, task.answer.tokens)
    [branch] = drafted.drafts.branches
    assert (branch.fork, branch.tokens) == (12, [5])
    for expected in (6, 7, 1):
        task = Task(drafted, len(drafted.tokens), 8, [branch], alternatives=True)
        engine.step([task], NoInterrupt())
        drafted.drafts.add(
            len(drafted.tokens), task.answer.tokens, task.answer.alternatives, [branch], task.answer.continued
        )
        drafted.write(len(drafted.tokens), task.answer.tokens)
        assert branch.tokens[-1] == expected

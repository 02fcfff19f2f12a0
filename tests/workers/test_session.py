"""A session against a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsi_protocol import prefix_checksum
from dsi_workers.session import Session

tokens = st.lists(st.integers(0, 3), max_size=12)


@given(st.data())
def test_who_asks_what_is_unchanged_is_told_all_that_surely_is(data: st.DataObject) -> None:
    """At each revision: the tokens then, and the fewest that were left by any removal since."""
    session = Session(1, 3, "")
    seen: dict[int, tuple[list[int], int | None]] = {}
    for _ in range(data.draw(st.integers(1, 20))):
        revision, before = session.revision, list(session.tokens)
        if data.draw(st.booleans()):
            session.truncate(data.draw(st.integers(0, len(before))))
            left = len(session.tokens)
        else:
            base = data.draw(st.integers(0, len(before)))
            new = data.draw(tokens)
            session.write(base, new)
            written = [*before[:base], *new]
            left = next(
                (at for at, token in enumerate(before) if at < len(written) and token != written[at]), len(before)
            )
        assert session.revision == revision + (left < len(before))
        if left < len(before):
            seen = {
                number: (then, left if fewest is None else min(left, fewest)) for number, (then, fewest) in seen.items()
            }
        seen[session.revision] = list(session.tokens), None
        for number, (then, fewest) in seen.items():
            unchanged = session.unchanged_since(number)
            assert unchanged == (len(session.tokens) if fewest is None else fewest)
            common = min(unchanged, len(then))
            assert session.tokens[:common] == then[:common]


@given(st.data())
def test_writes_truncations_and_checksums(data: st.DataObject) -> None:
    session = Session(1, 3, "")
    model: list[int] = []
    for _ in range(data.draw(st.integers(1, 12))):
        base = data.draw(st.integers(0, len(model)))
        new = data.draw(tokens)
        computed = session.computed = data.draw(st.integers(0, len(model)))
        unchanged = base
        while unchanged < min(len(model), base + len(new)) and model[unchanged] == new[unchanged - base]:
            unchanged += 1
        if unchanged < base + len(new):
            model[unchanged:] = new[unchanged - base :]
            computed = min(computed, unchanged)
        session.write(base, new)
        assert session.tokens == model
        assert session.computed == computed
        if data.draw(st.booleans()):
            length = data.draw(st.integers(0, len(model)))
            session.truncate(length)
            del model[length:]
            assert session.computed == min(computed, length)
        for length in range(len(model) + 1):
            assert session.holds(length, prefix_checksum(model[:length]))
            assert not session.holds(length, prefix_checksum(model[:length]) ^ 1)
        assert not session.holds(len(model) + 1, 0)


def test_a_request_counts_once() -> None:
    session = Session(1, 1, "")
    assert [session.is_new(attempt) for attempt in (1, 2, 2, 1, 3)] == [True, True, False, False, True]

"""A session against a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsi_protocol import prefix_checksum
from dsi_workers.session import Session

tokens = st.lists(st.integers(0, 3), max_size=12)


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

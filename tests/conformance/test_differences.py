"""What an examination says about a message that is not as expected."""

from __future__ import annotations

import pytest

from dsi_actors.conformance.differences import (
    Difference,
    Nonconformance,
    at_least,
    items,
    one_of,
    require,
    require_kind,
    require_same,
)
from dsi_protocol import Failed, NeedPrefix, Verified

VERIFIED = Verified(1, 7, 10, (5, 6), (), 1, 20)


def test_every_field_that_differs_is_named_with_both_values() -> None:
    with pytest.raises(Nonconformance) as caught:
        require_same(Verified(1, 8, 10, (5, 7), (), 1, 20), VERIFIED, "it comes again")
    assert caught.value.differences == (
        Difference("Verified.attempt", "7", "8"),
        Difference("Verified.tokens", "(5, 6)", "(5, 7)"),
    )
    assert str(caught.value) == (
        "it comes again; Verified.attempt: expected 7, found 8; Verified.tokens: expected (5, 6), found (5, 7)"
    )


def test_what_is_as_expected_passes() -> None:
    require_same(VERIFIED, VERIFIED, "")
    require(VERIFIED, "", start=10, attempt=at_least(7), tokens=items(1, 2), forwards=one_of(0, 1))


def test_a_condition_is_told_in_words() -> None:
    with pytest.raises(Nonconformance, match=r"Verified\.attempt: expected at least 8, found 7") as caught:
        require(VERIFIED, "", attempt=at_least(8), tokens=items(1, 1), forwards=one_of(2, 3))
    assert [difference.expected for difference in caught.value.differences] == ["at least 8", "1 item", "one of 2, 3"]


def test_another_message_is_shown_with_its_fields() -> None:
    with pytest.raises(Nonconformance, match=r"expected NeedPrefix, found Failed\(generation=1, .*code='limit'"):
        require_kind(Failed(1, 2, "limit", "no"), NeedPrefix, "it holds nothing")

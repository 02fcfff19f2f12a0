"""The checksum of every beginning is right in whatever order it is asked for, and no token is summed many times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsi_actors.core import GenerationCore
from dsi_actors.core.events import DrafterJoined, DraftsArrived, ServerJoined, VerificationFinished
from dsi_actors.core.policy import Policy
from dsi_actors.generation import prefix_checksums
from dsi_actors.generation.prefix_checksums import PrefixChecksums
from dsi_protocol import prefix_checksum


def core_of(prompt: int) -> GenerationCore:
    tokens = [7 * n % 1000 for n in range(prompt)]
    return GenerationCore(tokens, policy=Policy.distributed(sp=1, lookahead=4), max_tokens=4000)


@given(st.integers(1, 1500), st.lists(st.tuples(st.integers(0, 1500), st.booleans()), max_size=30))
def test_every_beginning_has_the_checksum_of_all_its_tokens(prompt: int, asked: list[tuple[int, bool]]) -> None:
    core = core_of(prompt)
    checksums = PrefixChecksums(core)
    for length, commit in asked:
        if commit:  # a token more, the text before it stays
            core.tokens.append(length % 1000)
            core.committed += 1
        tokens = min(length, len(core.tokens))
        assert checksums.of_first(tokens) == prefix_checksum(core.tokens[:tokens])


def test_drafts_that_are_dropped_leave_no_trace() -> None:
    core = core_of(600)
    checksums = PrefixChecksums(core)
    core.handle(ServerJoined(1))
    core.handle(DrafterJoined())
    core.handle(DraftsArrived(2, 600, (1, 2, 3)))
    assert checksums.of_first(602) == prefix_checksum(core.tokens[:602])
    core.handle(VerificationFinished(1, 1, 600, (9,)))
    assert core.tokens[600:] == [9]
    assert checksums.of_first(601) == prefix_checksum(core.tokens[:601])


def test_a_long_prompt_is_summed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in pieces: a call for each token of 100,000 would hold up the event loop for 50 ms."""
    sizes = []

    def counted(tokens: list[int], previous: int = 0) -> int:
        sizes.append(len(tokens))
        return prefix_checksum(tokens, previous)

    monkeypatch.setattr(prefix_checksums, "prefix_checksum", counted)
    core = core_of(100_000)
    checksums = PrefixChecksums(core)
    checksums.of_first(100_000)
    assert len(sizes) < 250
    for _ in range(100):
        core.tokens.append(5)
        core.committed += 1
        checksums.of_first(len(core.tokens))
    assert sum(sizes) < 101_000

"""Alternatives beside the main path: what a hit keeps, what it cancels, and how it is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsi_actors.core import GenerationCore, Policy
from dsi_actors.core.actions import (
    Action,
    CancelDrafts,
    CancelVerify,
    EmitTokens,
    Judged,
    StartDraft,
    StartVerify,
)
from dsi_actors.core.events import DrafterJoined, DraftsArrived, ServerJoined, VerificationFinished
from dsi_actors.core.policy import UNLIMITED


def joined(servers: int, lookahead: int = 1) -> GenerationCore:
    """One prompt token at position 0. Attempt 1 is the draft, attempt 2 the verification without drafts."""
    policy = replace(Policy.distributed(lookahead, sp=servers), rows=4, branches=UNLIMITED)
    core = GenerationCore([1], policy=policy, max_tokens=20)
    core.handle(DrafterJoined())
    for number in range(servers):
        core.handle(ServerJoined(number))
    return core


def of_kind(actions: list[Action], kind: type[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


def test_a_tree_is_verified_with_its_branches_the_main_path_first() -> None:
    core = joined(3, lookahead=2)
    # 7 and its alternative 8 behind the prompt, then 5 behind 7 and 6 behind 8
    [verify] = core.handle(DraftsArrived(1, 1, (7, 8, 5, 6), (0, 0, 1, 2)))
    assert isinstance(verify, StartVerify)
    assert (verify.base, verify.tokens, verify.parents) == (0, (1, 7, 5, 8, 6), (0, 1, 2, 1, 4))
    assert core.tokens == [1, 7, 5]
    core.check()


def test_a_hit_keeps_what_stands_behind_the_alternative_and_the_drafter_goes_on_from_there() -> None:
    core = joined(3)
    core.handle(DraftsArrived(1, 1, (7, 8), (0, 0)))  # attempt 3 verifies 7 and 8
    core.handle(DraftsArrived(1, 3, (5, 6), (1, 2)))  # attempt 4 verifies what follows, too
    actions = core.handle(VerificationFinished(2, 0, 1, (8,)))  # the first verification had no drafts
    assert core.tokens == [1, 8, 6], "the branch is the main path"
    assert of_kind(actions, EmitTokens) == [EmitTokens(1, (8,), (True,), (1,))]
    assert of_kind(actions, CancelVerify) == [], "both others hold the alternative"
    assert of_kind(actions, CancelDrafts) == [], "the drafter is redirected, not stopped"
    [draft] = of_kind(actions, StartDraft)
    assert isinstance(draft, StartDraft)
    assert (draft.base, draft.tokens, draft.start, draft.committed) == (1, (8, 6), 3, 2)
    assert of_kind(actions, Judged) == [Judged(2, judged=1, accepted=0, offered=1, alternatives=1)]
    counters = core.counters
    assert (counters.judged, counters.accepted, counters.offered, counters.alternatives) == (1, 0, 1, 1)
    assert counters.rejections == 0
    core.check()
    stale = core.counters.stale_events
    core.handle(DraftsArrived(1, 5, (9,), (3,)))  # of the request that the new one ended
    assert core.counters.stale_events == stale + 1


def test_a_token_that_no_branch_has_is_a_correction() -> None:
    core = joined(2)
    core.handle(DraftsArrived(1, 1, (7, 8), (0, 0)))
    actions = core.handle(VerificationFinished(2, 0, 1, (9,)))
    assert core.tokens == [1, 9]
    assert len(of_kind(actions, CancelVerify)) == len(of_kind(actions, CancelDrafts)) == 1
    assert of_kind(actions, Judged) == [Judged(2, judged=1, offered=1)]
    assert (core.counters.rejections, core.counters.alternatives) == (1, 0)
    core.check()


def test_an_answer_goes_along_a_branch() -> None:
    core = joined(2, lookahead=2)
    [verify] = core.handle(DraftsArrived(1, 1, (7, 8, 5, 6), (0, 0, 1, 2)))
    assert isinstance(verify, StartVerify)
    [emitted] = of_kind(core.handle(VerificationFinished(verify.attempt, verify.server, 1, (8, 6, 4))), EmitTokens)
    assert emitted == EmitTokens(1, (8, 6, 4), (True, True, False), (1,))
    core.check()


def test_what_an_answer_says_beyond_its_own_tree_is_not_taken() -> None:
    """It verified no drafts, and 8 came afterwards: what it says behind 8 was computed for another text."""
    core = joined(1, lookahead=9)
    core.handle(DraftsArrived(1, 1, (7, 8), (0, 0)))
    core.handle(VerificationFinished(2, 0, 1, (8, 3)))
    assert core.committed == 1, "more tokens than were asked for"
    assert core.counters.disagreements == 1


@pytest.mark.parametrize("parents", [(5,), (0, 9), (-1,)])
def test_parents_that_point_nowhere_are_a_gap(parents: tuple[int, ...]) -> None:
    core = joined(1)
    actions = core.handle(DraftsArrived(1, 1, (7,) * len(parents), parents))
    assert of_kind(actions, CancelDrafts) == [CancelDrafts(1)]
    core.check()


def test_a_late_alternative_goes_on_where_the_target_is() -> None:
    core = joined(1)
    core.handle(VerificationFinished(2, 0, 1, (8,)))  # before any draft came
    actions = core.handle(DraftsArrived(1, 1, (7, 8, 5, 6), (0, 0, 1, 2)))
    assert core.tokens == [1, 8, 6], "what was drafted behind 8 is of use"
    assert core.counters.judged == 1
    [draft] = of_kind(actions, StartDraft)
    assert isinstance(draft, StartDraft)
    assert (draft.tokens[-1], draft.start) == (6, 3)
    core.check()


def test_branches_that_are_too_many_are_left_out_the_latest_first() -> None:
    core = joined(2, lookahead=2)
    core.handle(DraftsArrived(1, 1, (7, 8, 5, 4), (0, 0, 1, 1)))
    core = joined(2, lookahead=2)
    core.policy = replace(core.policy, branches=1)
    [verify] = core.handle(DraftsArrived(1, 1, (7, 8, 5, 4), (0, 0, 1, 1)))
    assert isinstance(verify, StartVerify)
    assert (verify.tokens, verify.parents) == ((1, 7, 5, 8), (0, 1, 2, 1))

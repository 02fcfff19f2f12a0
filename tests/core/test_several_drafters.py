"""Several drafters of one generation: whose drafts are the main path, where each goes on, and what the end of one changes."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from dsi_actors.core import GenerationCore, Policy
from dsi_actors.core.actions import Action, CancelDrafts, CancelVerify, EmitTokens, StartDraft, StartVerify
from dsi_actors.core.events import (
    DraftEnded,
    DrafterJoined,
    DrafterLost,
    DraftsArrived,
    DraftsLate,
    ServerJoined,
    VerificationFinished,
)
from dsi_actors.core.policy import UNLIMITED

AnyAction = TypeVar("AnyAction", bound=Action)

#: The one that leads, and the other one.
LEADER, OTHER = 7, 8


def joined(
    policy: Policy, servers: int, *, rows: int = UNLIMITED, drafters: tuple[int, ...] = (OTHER, LEADER)
) -> GenerationCore:
    """One prompt token at position 0. Attempt 1 is of the other drafter, 2 of the leader, 3 the first verification."""
    core = GenerationCore([1], policy=policy, max_tokens=40)
    for drafter in drafters:
        core.handle(DrafterJoined(drafter, rank=drafter))
    for number in range(servers):
        core.handle(ServerJoined(number, rows))
    return core


def trees(servers: int, lookahead: int = 1, rows: int = 4, wait: int = 0) -> Policy:
    return replace(Policy.distributed(lookahead, servers, wait), rows=rows, branches=UNLIMITED)


def of_kind(actions: list[Action], kind: type[AnyAction]) -> list[AnyAction]:
    return [action for action in actions if isinstance(action, kind)]


def test_each_drafter_is_asked_for_the_same_positions() -> None:
    core = GenerationCore([1], policy=trees(1), max_tokens=40)
    [first] = of_kind(core.handle(DrafterJoined(OTHER, rank=OTHER)), StartDraft)
    [second] = of_kind(core.handle(DrafterJoined(LEADER, rank=LEADER, rows=1)), StartDraft)
    assert (first.drafter, second.drafter) == (OTHER, LEADER)
    assert (first.base, first.tokens, first.start) == (second.base, second.tokens, second.start) == (0, (1,), 1)
    assert (first.rows, second.rows) == (4, 1), "as many as it can"


def test_equal_drafts_are_verified_once_and_count_for_both() -> None:
    core = joined(trees(3), 3)
    assert core.handle(DraftsArrived(1, 1, (5,), drafter=OTHER)) == [], "the leader sets the pace"
    [verify] = of_kind(core.handle(DraftsArrived(2, 1, (5,), drafter=LEADER)), StartVerify)
    assert (verify.tokens, verify.parents) == ((1, 5), ())
    core.handle(VerificationFinished(verify.attempt, verify.server, 1, (5, 6)))
    assert core.acceptance_of(OTHER) == core.acceptance_of(LEADER) == (1, 1)
    assert core.counters.judged == 1
    core.check()


def test_what_the_other_says_stands_beside_and_goes_on_if_it_was_right() -> None:
    core = joined(trees(4), 4)
    core.handle(DraftsArrived(1, 1, (8, 9), drafter=OTHER))
    [verify] = of_kind(core.handle(DraftsArrived(2, 1, (5, 6), drafter=LEADER)), StartVerify)
    assert (verify.tokens, verify.parents) == ((1, 5, 6, 8, 9), (0, 1, 2, 1, 4))
    actions = core.handle(VerificationFinished(3, 0, 1, (8,)))
    assert of_kind(actions, EmitTokens) == [EmitTokens(1, (8,), (True,), (1,))]
    assert core.tokens == [1, 8, 9]
    assert of_kind(actions, CancelVerify) == [], "the one that holds the branch goes on"
    [draft] = [draft for draft in of_kind(actions, StartDraft) if draft.drafter == LEADER]
    assert (draft.drafter, draft.base, draft.tokens, draft.start) == (LEADER, 1, (8,), 2), "it goes on by itself"
    assert core.acceptance_of(OTHER) == (1, 1)
    assert core.acceptance_of(LEADER) == (1, 0)
    assert core.counters.alternatives == 1
    core.check()


def test_a_drafter_that_leads_takes_the_main_path_over_when_its_drafts_come() -> None:
    core = joined(trees(4), 4)
    core.handle(DraftsArrived(1, 1, (8, 9), drafter=OTHER))
    assert core.tokens == [1, 8, 9], "it was faster"
    [verify] = of_kind(core.handle(DraftsArrived(2, 1, (5,), drafter=LEADER)), StartVerify)
    assert core.tokens == [1, 5]
    assert (verify.tokens, verify.parents) == ((1, 5, 8, 9), (0, 1, 1, 3))
    core.check()
    actions = core.handle(VerificationFinished(4, 1, 1, (8, 9, 2)))  # it was asked when 8 and 9 were the main path
    assert of_kind(actions, EmitTokens) == [EmitTokens(1, (8, 9, 2), (True, True, False), (1,))]
    core.check()


def test_the_first_verification_waits_for_the_leader() -> None:
    core = joined(trees(1, lookahead=2, wait=2), 1)
    assert core.handle(DraftsArrived(1, 1, (8, 9), drafter=OTHER)) == []
    assert core.waits_for_drafts
    [verify] = of_kind(core.handle(DraftsArrived(2, 1, (5, 6), drafter=LEADER)), StartVerify)
    assert verify.tokens == (1, 5, 6, 8, 9)


def test_it_does_not_wait_for_a_leader_that_has_no_idea() -> None:
    core = joined(trees(1, lookahead=2, wait=2), 1)
    assert core.handle(DraftEnded(2, complete=False, drafter=LEADER)) == []
    assert core.waits_for_drafts, "for those of the other one"
    [verify] = of_kind(core.handle(DraftsArrived(1, 1, (8, 9), drafter=OTHER)), StartVerify)
    assert verify.tokens == (1, 8, 9)


def test_it_does_not_wait_for_a_slow_one_when_the_leader_has_drafted_all_it_may() -> None:
    core = joined(Policy("any", 1, 2, 3, 3, rows=4, branches=UNLIMITED), 1)
    [verify] = of_kind(core.handle(DraftsArrived(2, 1, (5, 6, 7), drafter=LEADER)), StartVerify)
    core.handle(DraftEnded(2, complete=True, drafter=LEADER))
    actions = core.handle(VerificationFinished(verify.attempt, 0, 1, (5, 6)))
    assert of_kind(actions, StartVerify) == [], "of 7, and what the leader drafts next"
    [draft] = [draft for draft in of_kind(actions, StartDraft) if draft.drafter == LEADER]
    assert of_kind(core.handle(DraftEnded(draft.attempt, complete=False, drafter=LEADER)), StartVerify) != []


def test_a_drafter_that_is_lost_changes_nothing_for_the_other() -> None:
    core = joined(trees(2), 2)
    core.handle(DraftsArrived(2, 1, (5,), drafter=LEADER))
    core.handle(DraftsArrived(1, 1, (8,), drafter=OTHER))
    assert of_kind(core.handle(DrafterLost(LEADER)), StartDraft) == []
    assert core.tokens == [1, 5], "what it drafted stays"
    stale = core.counters.stale_events
    core.handle(DraftsArrived(2, 2, (6,), drafter=LEADER))
    assert core.counters.stale_events == stale + 1
    core.handle(DraftsArrived(1, 2, (9,), drafter=OTHER))
    [draft] = of_kind(core.handle(DrafterJoined(9, rank=LEADER)), StartDraft)
    assert (draft.base, draft.tokens, draft.start) == (0, (1,), 1), (
        "one that comes back begins behind what is committed"
    )
    actions = core.handle(VerificationFinished(3, 0, 1, (8,)))
    assert core.tokens == [1, 8, 9]
    assert of_kind(actions, CancelDrafts) == []
    core.check()


def test_the_next_one_sets_the_pace_while_the_leader_has_no_idea() -> None:
    core = joined(trees(2), 2)
    core.handle(DraftEnded(2, complete=False, drafter=LEADER))
    [verify] = of_kind(core.handle(DraftsArrived(1, 1, (8,), drafter=OTHER)), StartVerify)
    assert verify.tokens == (1, 8)


def test_a_leader_that_hangs_is_not_waited_for_again_and_again() -> None:
    core = joined(trees(2, lookahead=2, wait=2), 2)
    [verify] = of_kind(core.handle(DraftsLate()), StartVerify)
    core.handle(DraftsArrived(1, 1, (8, 9), drafter=OTHER))
    assert core.counters.verifications == 2, "the other one sets the pace"
    actions = core.handle(VerificationFinished(verify.attempt, 0, 1, (3,)))
    assert not core.waits_for_drafts
    [draft] = [draft for draft in of_kind(actions, StartDraft) if draft.drafter == LEADER]
    core.handle(DraftsArrived(draft.attempt, draft.start, (5,), drafter=LEADER))
    again = of_kind(actions, StartVerify)[0]
    core.handle(VerificationFinished(again.attempt, again.server, 2, (4,)))
    assert core.waits_for_drafts, "until its drafts come"
    core.check()


def test_drafts_that_fit_nowhere_stop_only_who_sent_them() -> None:
    core = joined(trees(1), 1)
    actions = core.handle(DraftsArrived(1, 5, (8,), drafter=OTHER))
    assert actions == [CancelDrafts(1, OTHER)]
    assert core.handle(DraftsArrived(2, 1, (5,), drafter=LEADER)) == []
    assert core.tokens == [1, 5]
    asked = of_kind(core.handle(VerificationFinished(3, 0, 1, (5,))), StartDraft)
    assert OTHER in {draft.drafter for draft in asked}, "and it is asked again after the next commit"


def test_a_drafter_of_chains_that_is_astray_is_cancelled() -> None:
    """A request of one row does not end those before it."""
    core = joined(replace(Policy.distributed(1, 2), branches=UNLIMITED), 2)
    core.handle(DraftsArrived(2, 1, (5,), drafter=LEADER))
    core.handle(DraftsArrived(1, 1, (8,), drafter=OTHER))
    actions = core.handle(VerificationFinished(3, 0, 1, (8,)))
    assert of_kind(actions, CancelDrafts) == [CancelDrafts(2, LEADER)]
    [draft] = of_kind(actions, StartDraft)
    assert (draft.drafter, draft.rows, draft.tokens) == (LEADER, 1, (8,))


def test_a_request_that_goes_on_beside_the_main_path_builds_on_what_both_share() -> None:
    core = joined(trees(1, lookahead=4), 1)
    core.handle(DraftsArrived(2, 1, (5, 6), drafter=LEADER))
    core.handle(DraftsArrived(1, 1, (5, 8, 9, 2, 3, 4, 1, 1), drafter=OTHER))
    actions = core.handle(VerificationFinished(3, 0, 1, (5,)))
    [draft] = [draft for draft in of_kind(actions, StartDraft) if draft.drafter == OTHER]
    assert (draft.base, draft.tokens) == (2, ()), "its own 8 is not in the text"
    assert draft.start > 2
    core.check()


def test_a_tree_is_no_larger_than_its_server_takes() -> None:
    core = joined(trees(3), 3, rows=4)
    core.handle(DraftsArrived(1, 1, (8, 9), drafter=OTHER))
    [verify] = of_kind(core.handle(DraftsArrived(2, 1, (5, 6), drafter=LEADER)), StartVerify)
    assert (verify.tokens, verify.parents) == ((1, 5, 6, 8), (0, 1, 2, 1))
    core = joined(trees(3), 3, rows=1)
    core.handle(DraftsArrived(2, 1, (5, 6), drafter=LEADER))
    core.handle(DraftEnded(2, complete=False, drafter=LEADER))
    assert core.handle(DraftsArrived(1, 1, (8, 9), drafter=OTHER)) == [], "nor is a chain verified twice"
    core.check()


def test_a_leader_takes_over_from_one_that_is_lost_already() -> None:
    core = joined(trees(1), 1)
    core.handle(DraftsArrived(1, 1, (8, 9), drafter=OTHER))
    core.handle(DrafterLost(OTHER))
    core.handle(DraftsArrived(2, 1, (5,), drafter=LEADER))
    assert core.tokens == [1, 5]
    core.check()

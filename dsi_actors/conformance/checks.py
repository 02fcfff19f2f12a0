"""The checks in the order in which they are made. The first line of a check's docstring is its name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from dsi_actors.conformance.drafting import (
    drafts_again_what_was_lost,
    drafts_from_the_tokens_it_holds,
    drafts_in_blocks,
    drafts_on,
    has_something_to_continue,
)
from dsi_actors.conformance.going_on import (
    ends_going_on_when_asked_again,
    goes_on_as_far_as_it_may,
    goes_on_behind_a_wrong_guess_only,
)
from dsi_actors.conformance.membership import (
    beats,
    becomes_ready,
    ends_when_dismissed,
    is_ready_again,
    refuses_a_foreign_engine,
    repeats_hello,
)
from dsi_actors.conformance.peer import Peer
from dsi_actors.conformance.requests import (
    answers_what_comes_twice_once,
    drops_bad_frames,
    ends_what_is_cancelled,
    ends_what_is_closed,
    forgets_idle_generations_only,
    ignores_unknown_fields,
    knows_no_closed_generation,
    needs_a_prefix_it_does_not_hold,
    refuses_requests_of_the_other_role,
    refuses_what_is_out_of_range,
    takes_a_cancel_before_its_request,
)
from dsi_actors.conformance.trees import (
    answers_along_a_tree,
    drafts_on_from_a_branch,
    drafts_trees,
    keeps_the_main_path_of_a_tree,
    refuses_what_is_no_tree,
)
from dsi_actors.conformance.verifying import (
    gives_logprobs_when_asked,
    samples_by_the_seed,
    tells_how_probable_a_text_is,
    tells_the_most_probable_tokens,
    verifies_the_same_however_it_is_asked,
    verifies_what_is_asked_only,
)

#: Raises Nonconformance if the worker does not keep the rule, NotApplicable if the rule is not about this worker.
Check = Callable[[Peer], Awaitable[None]]

JOINING: tuple[Check, ...] = (repeats_hello, becomes_ready)
#: These replace all other checks, since the worker ends with the last one.
FOREIGN_ENGINE: tuple[Check, ...] = (repeats_hello, refuses_a_foreign_engine)
COMMON: tuple[Check, ...] = (
    beats, is_ready_again, drops_bad_frames, ignores_unknown_fields, knows_no_closed_generation, ends_what_is_closed,
    needs_a_prefix_it_does_not_hold, answers_what_comes_twice_once, takes_a_cancel_before_its_request,
    ends_what_is_cancelled, refuses_what_is_out_of_range, refuses_requests_of_the_other_role, forgets_idle_generations_only,
)  # fmt: skip
DRAFTER: tuple[Check, ...] = (
    drafts_in_blocks, drafts_on, drafts_from_the_tokens_it_holds, drafts_again_what_was_lost, has_something_to_continue,
    drafts_trees, drafts_on_from_a_branch,
)  # fmt: skip
TARGET: tuple[Check, ...] = (
    verifies_the_same_however_it_is_asked, verifies_what_is_asked_only, gives_logprobs_when_asked,
    tells_the_most_probable_tokens, tells_how_probable_a_text_is, samples_by_the_seed, answers_along_a_tree,
    keeps_the_main_path_of_a_tree, refuses_what_is_no_tree, goes_on_as_far_as_it_may,
    goes_on_behind_a_wrong_guess_only, ends_going_on_when_asked_again,
)  # fmt: skip
LEAVING: tuple[Check, ...] = (ends_when_dismissed,)

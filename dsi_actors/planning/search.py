"""The policy that should be fastest, of all that SI and DSI allow: a search over what expectation.py says of each. Pure.

A search for DSI takes up to ten milliseconds and more. So it can be made in steps, between which other work is done."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import ParamSpec, TypeAlias, TypeVar

from dsi_actors.core import Policy
from dsi_actors.core.policy import UNLIMITED
from dsi_actors.planning.expectation import CHAIN, MAX_LOOKAHEAD, Branching, CostMs, Expectation, expect

#: Of policies that are equally fast to within this share, the one that keeps the target servers least busy is taken.
TIE = 0.002
_MOST_ROUNDS = 4
#: Blocks of drafts in the time of one target forward, if it has not more servers than half as many.
_MOST_BLOCKS = 32
#: Drafts in a block where drafter and target slow one another down.
_COARSEST_BESIDE = 8
_CANDIDATES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
#: Rows of a drafting step that are considered. Of trees that are equally fast to within the tie, the one with the fewest wins.
_ROWS = (2, 4, 8, 16)
_ROWS_TIE = 0.01
#: A tree must be this much faster than a chain: what it costs is known less well.
_TREE_MARGIN = 0.96

T = TypeVar("T")
P = ParamSpec("P")
#: Something that is found in steps: each `next` is one of them, and the result is what the generator returns.
Steps: TypeAlias = Generator[None, None, T]
Search: TypeAlias = Steps[Policy]


def in_one_go(steps: Steps[T]) -> T:
    """Make all steps, and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def _in_one_go(search: Callable[P, Search]) -> Callable[P, Policy]:
    @functools.wraps(search)
    def find(*args: P.args, **kwargs: P.kwargs) -> Policy:
        return in_one_go(search(*args, **kwargs))

    return find


def search_si(
    cost_ms: CostMs, drafter_ms: float, acceptance: float, branching: Branching = CHAIN, *, most: int = MAX_LOOKAHEAD
) -> Search:
    """The lookahead, and the rows of a tree, that make SI fastest."""
    expected = functools.cache(lambda policy: expect(policy, cost_ms, drafter_ms, acceptance, branching))
    policies = [Policy.speculative(lookahead) for lookahead in range(1, most + 1)]
    best = yield from _best(policies, expected)
    trees = [with_rows(Policy.speculative(k), rows) for rows in _rows(branching) for k in _CANDIDATES if 1 < k <= most]
    return (yield from _better_tree(best, trees, expected))


def search_dsi(
    cost_ms: CostMs,
    drafter_ms: float,
    acceptance: float,
    sp: int,
    branching: Branching = CHAIN,
    *,
    most: int = MAX_LOOKAHEAD,
    queued: int | None = None,
    alone: float = 1.0,
) -> Search:
    """The wait after a rejection, the stagger between verifications and the rows of a tree that make DSI fastest.

    The family contains AR (span 0), SI itself (`search_in_turns`), and SI that drafts on while it verifies (wait and span of k).
    Where servers are shared, a verification waits for the forward of others to end, in which time `queued` tokens are drafted:
    so many are waited for, since that costs nothing, and no more, since who is not in the next forward waits for the one after.

    Where drafter and target slow one another down (`alone` below 1: see expectation.py) it may pay to verify less often.
    """
    target_ms = cost_ms(1)
    if (
        drafter_ms >= target_ms
    ):  # a draft comes when the target has said it already: plain decoding, and drafts to judge
        return Policy.distributed(1, 1, span=0)
    in_time = math.ceil(target_ms / max(drafter_ms, 1e-6))
    waits = [wait for wait in _CANDIDATES if wait <= min(most, in_time)]
    if queued is not None:
        waits = [max(wait for wait in waits if wait <= queued)]
    coarsest = max(in_time if sp > 1 else in_time // 4, 1 if alone == 1 else _COARSEST_BESIDE)
    lookaheads = [k for k in _CANDIDATES[1:] if k <= min(most, coarsest)]
    if (
        queued is not None
    ):  # four messages of drafts in each forward are enough: more would keep the orchestrator busy for nothing
        lookaheads = [max(k for k in lookaheads if k <= max(1, in_time // 4))]
    # A block of drafts is a message, and a drafter that takes next to no time would send hundreds of them: blocks as large as
    # needed, or as large as there are.
    finest = target_ms / (max(_MOST_BLOCKS, 2 * sp) * max(drafter_ms, 1e-6))
    lookaheads = [k for k in lookaheads if k >= finest] or lookaheads[-1:]
    # Where a long verification takes no longer than a short one there is no reason to check less than there is.
    # The longest of equals: drafts that come in bursts, as those of prompt lookup, may be more than are expected.
    spans = sorted({span for span in _CANDIDATES[1:] if span < most} | {most}, reverse=True)
    if cost_ms(most + 1) <= target_ms:
        spans = [UNLIMITED] if cost_ms(8 * most) <= target_ms else [most]

    def policy(wait: int, k: int, span: int, rows: int) -> Policy:
        ahead = drafts_ahead(target_ms, drafter_ms, k, wait)
        return with_rows(Policy.distributed(k, sp, min(wait, span), max_ahead=ahead, span=span), rows)

    expected = functools.cache(lambda policy: expect(policy, cost_ms, drafter_ms, acceptance, branching, alone=alone))

    def fastest(best: Policy, rows: int, among: Callable[[list[int], int], list[int]]) -> Search:
        """One setting at a time, until nothing gets better: they hardly depend on one another. `among`: those of all values that
        are tried beside the present one."""
        for _ in range(_MOST_ROUNDS):
            before, wait, span = best, best.first_wait, best.span
            best = yield from _best([policy(wait, k, span, rows) for k in among(lookaheads, best.lookahead)], expected)
            best = yield from _best([policy(w, best.lookahead, span, rows) for w in among(waits, wait)], expected)
            best = yield from _best(
                [policy(best.first_wait, best.lookahead, s, rows) for s in among(spans, span)], expected
            )
            if best == before:
                break
        return best

    start = policy(0, lookaheads[0], spans[0], 1)
    if spans != [UNLIMITED]:
        si = yield from search_si(cost_ms, drafter_ms, acceptance, most=most)
        start = policy(min(si.lookahead, waits[-1]), lookaheads[0], si.lookahead, 1)
    best = yield from fastest(start, 1, _all)
    plain = Policy.distributed(best.lookahead, sp, max_ahead=best.max_ahead, span=0)
    others = [plain]
    if queued is None:
        others.append((yield from search_in_turns(cost_ms, drafter_ms, acceptance, sp, branching, most=most)))
    trees = [with_rows(best, rows) for rows in _rows(branching)]
    if trees:  # what is best for a chain is nearly so for a tree
        fastest_tree = yield from _best(trees, expected)
        least_ms = expected(fastest_tree).ms_per_token
        rows = next(tree.rows for tree in trees if expected(tree).ms_per_token <= least_ms * (1 + _ROWS_TIE))
        trees = [(yield from fastest(with_rows(best, rows), rows, _near))]
    chain = yield from _best([best, *others], expected)
    return (yield from _better_tree(chain, trees, expected))


def _all(values: list[int], value: int) -> list[int]:
    return values


def _near(values: list[int], value: int) -> list[int]:
    """The value and those beside it; `values` are sorted, either way."""
    place = min(range(len(values)), key=lambda place: abs(values[place] - value))
    return values[max(0, place - 1) : place + 2]


def with_rows(policy: Policy, rows: int) -> Policy:
    """The policy with trees of which a step of the drafter has so many rows, and every branch of which is verified."""
    return replace(policy, rows=rows, branches=UNLIMITED if rows > 1 else 0)


def _rows(branching: Branching) -> list[int]:
    return [rows for rows in _ROWS if rows <= branching.rows] if branching.alternatives > 0 else []


def _better_tree(chain: Policy, trees: list[Policy], expected: Callable[[Policy], Expectation]) -> Search:
    """The best tree, if it is clearly better than the best chain."""
    if not trees:
        return chain
    tree = yield from _best(trees, expected)
    faster = expected(tree).ms_per_token <= _TREE_MARGIN * expected(chain).ms_per_token
    return tree if faster else chain


def search_in_turns(
    cost_ms: CostMs, drafter_ms: float, acceptance: float, sp: int, branching: Branching = CHAIN,
    *, most: int = MAX_LOOKAHEAD,
) -> Search:  # fmt: skip
    """Where drafter and targets cannot compute at the same time: SI as a policy of DSI, or plain decoding."""
    si = yield from search_si(cost_ms, drafter_ms, acceptance, branching, most=most)
    if expect(si, cost_ms, drafter_ms, acceptance, branching).ms_per_token >= cost_ms(1):
        return Policy.undrafted(sp)
    return replace(si, algorithm="dsi", sp=sp)


#: The same in one go.
best_si = _in_one_go(search_si)
best_dsi = _in_one_go(search_dsi)
best_in_turns = _in_one_go(search_in_turns)


def drafts_ahead(target_ms: float, drafter_ms: float, lookahead: int, wait: int) -> int:
    """How far the drafter may run ahead so that it never waits: what it drafts while two verifications run, and a block."""
    return min(512, math.ceil(2 * target_ms / max(drafter_ms, target_ms / 128)) + wait + 2 * lookahead)


def _best(policies: Iterable[Policy], expected: Callable[[Policy], Expectation]) -> Search:
    pairs: list[tuple[Policy, Expectation]] = []
    for policy in policies:
        pairs.append((policy, expected(policy)))
        yield
    fastest_ms = min(expectation.ms_per_token for _, expectation in pairs)
    ties = [pair for pair in pairs if pair[1].ms_per_token <= fastest_ms * (1 + TIE)]
    return min(ties, key=lambda pair: (pair[1].target_busy_ms, pair[1].ms_per_token))[0]

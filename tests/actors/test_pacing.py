"""What a generation learns while it runs, of several drafters, beside the knowledge that all generations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from dsi_actors.actors.pacing import Pacing
from dsi_actors.actors.worker_handle import WorkerHandle
from dsi_actors.config import NGRAM
from dsi_actors.planning.drafters import DrafterChoice, Drafters
from dsi_actors.planning.pace import Pace
from dsi_actors.planning.tuner import Estimates, Tuner
from dsi_protocol import Hello, Ready

KINDS = ["a", "b"]
PLAIN_MS, SLOW_MS, FAST_MS = 10.0, 30.0, 4.0


def drafter(kind: str, device: str = "cpu:0") -> WorkerHandle:
    number = 1 + [*KINDS, NGRAM].index(kind)
    made = WorkerHandle(
        number, b"", Hello(1, number, "drafter", "auto", "", device, "host", 1), "drafter", lambda _: None, kind=kind
    )
    made.ready = Ready("", 100, 100, 1, 2000, 0, 1, 0, 1, 0)
    return made


def pacing_of(
    drafters: Drafters, pace: Pace, *, kinds: Sequence[str] = KINDS, lookahead: int | None = None, position: int = 0
) -> Pacing:
    known = Estimates(PLAIN_MS, PLAIN_MS, 8, drafter_ms=2.0, calibrated_ms=PLAIN_MS)
    kind = drafters.first(kinds, lambda kind: pace.pays(kind, position))
    pacing = Pacing(Tuner("dsi", 1, lookahead, known, pace), DrafterChoice(drafters, kind))
    pacing.tuner.position = position
    pacing.tuner.drafter_is(pacing.kind, computes=pacing.kind != NGRAM)
    pacing.tuner.choose()
    return pacing


def generate(pacing: Pacing, tokens: int, each_ms: dict[str, float], kinds: list[str]) -> int:
    """Returns for how many tokens something was drafted."""
    return run(pacing, tokens, each_ms, kinds)[0]


def run(
    pacing: Pacing,
    tokens: int,
    each_ms: dict[str, float],
    kinds: list[str],
    *,
    granted: Callable[[int], bool] = lambda position: True,
) -> tuple[int, int, float]:
    """For how many tokens something was drafted, how often the drafter was exchanged, and the milliseconds of a token."""
    begin = pacing.tuner.position
    pacing.drafter_is(drafter(pacing.kind if pacing.kind in kinds else kinds[0]), [], begin)
    drafted, exchanges, total_ms = 0, 0, 0.0
    for position in range(begin + 1, begin + tokens):
        drafts = pacing.tuner.drafting
        drafted += drafts
        took_ms = each_ms[pacing.kind] if drafts else PLAIN_MS
        total_ms += took_ms
        kind = pacing.committed(1, took_ms, committed=position, drafts=True, kinds=kinds)
        if drafts:
            pacing.judged(1, 1, position)
        pacing.tuner.retune()
        if kind is not None and granted(position):
            exchanges += 1
            pacing.drafter_is(drafter(kind), [], position)
    pacing.ended()
    return drafted, exchanges, total_ms / tokens


def test_a_drafter_that_comes_when_speculation_was_left_is_tried_all_the_same() -> None:
    drafters, pace = Drafters(), Pace()
    generate(pacing_of(drafters, pace), 300, {"a": SLOW_MS}, ["a"])
    assert not pace.pays("a", 0)
    each_ms = {"a": SLOW_MS, "b": FAST_MS}
    drafted = sum(generate(pacing_of(drafters, pace), 1000, each_ms, KINDS) for _ in range(20))
    assert drafted > 10_000
    assert drafters.first(KINDS) == "b"


def test_what_the_drafter_before_has_left_is_not_the_new_ones() -> None:
    drafters = Drafters()
    pacing = pacing_of(drafters, Pace())
    pacing.drafter_is(drafter("a"), [], 0)
    pacing.drafter_is(drafter("b"), [], 100)
    for position in range(1, 100):
        assert pacing.committed(1, SLOW_MS, committed=position, drafts=True, kinds=KINDS) is None
    pacing.judged(0, 50, 100)
    assert drafters.ratio("b") == 0
    assert pacing.estimates.judged == Estimates().judged
    pacing.judged(0, 50, 101)
    assert pacing.estimates.acceptance < 0.3


def test_after_a_rejection_all_drafts_are_the_new_ones() -> None:
    """A drafter may have been far ahead when another one took its place."""
    pacing = pacing_of(Drafters(), Pace())
    pacing.drafter_is(drafter("a"), [], 0)
    pacing.drafter_is(drafter("b"), [], 270)
    pacing.judged(2, 3, 5)
    assert pacing.estimates.judged == Estimates().judged, "they were the other one's"
    pacing.judged(0, 50, 6)
    assert pacing.estimates.acceptance < 0.3


def test_while_nobody_drafts_nothing_is_held_against_speculation() -> None:
    pace = Pace()
    pacing = pacing_of(Drafters(), pace)
    pacing.drafter_is(drafter("a"), [], 0)
    for position in range(200):
        pacing.committed(1, SLOW_MS, committed=position, drafts=False, kinds=["a"])
    assert pace.pays("a", 0)
    assert pacing.tuner.drafting


@pytest.mark.parametrize("tokens", [20, 34, 40, 100])
def test_a_drafter_whose_turn_it_is_again_does_not_hold_generations_in_plain_decoding(tokens: int) -> None:
    """It was found not to pay, and is found so again."""
    drafters, pace = Drafters(), Pace()
    each_ms = {"a": FAST_MS, "b": SLOW_MS}
    for _ in range(40):
        generate(pacing_of(drafters, pace), 20, each_ms, KINDS)
    plain = sum(generate(pacing_of(drafters, pace), tokens, each_ms, KINDS) < tokens / 2 for _ in range(400))
    assert plain <= 2


def test_what_is_fast_elsewhere_only_is_not_tried_again_and_again() -> None:
    """One drafter is the fastest in short texts, and does not pay in long ones."""
    drafters, pace = Drafters(), Pace()
    for _ in range(20):
        run(pacing_of(drafters, pace), 200, {"a": 4.0, "b": 9.0}, KINDS)
    for _ in range(20):
        _, exchanges, each_ms = run(pacing_of(drafters, pace, position=3000), 1000, {"a": 30.0, "b": 9.0}, KINDS)
        assert exchanges <= 2
    assert each_ms < 9.5
    assert run(pacing_of(drafters, pace), 200, {"a": 4.0, "b": 9.0}, KINDS)[2] < 5


def test_one_that_was_left_alone_is_not_begun_with_when_others_come() -> None:
    drafters, pace = Drafters(), Pace()
    for _ in range(3):
        run(pacing_of(drafters, pace, kinds=["a"]), 300, {"a": 30.0}, ["a"])
    _, exchanges, each_ms = run(pacing_of(drafters, pace), 1000, {"a": 30.0, "b": FAST_MS}, KINDS)
    assert exchanges <= 2
    assert each_ms < 1.3 * FAST_MS


def test_a_fixed_lookahead_leaves_no_drafter_for_what_others_found() -> None:
    drafters, pace = Drafters(), Pace()
    for _ in range(3):
        run(pacing_of(drafters, pace, kinds=["a"]), 300, {"a": 30.0}, ["a"])
    _, exchanges, _ = run(pacing_of(drafters, pace, lookahead=2), 2000, {"a": 30.0, "b": 40.0}, KINDS)
    assert exchanges <= 2


@pytest.mark.parametrize("lookup_ms", [10.4, 13.5, 15.0])
def test_lookup_that_is_slower_than_plain_decoding_does_not_take_its_place(lookup_ms: float) -> None:
    """Nor does a model that is."""
    drafters, pace, kinds = Drafters(), Pace(), ["a", NGRAM]
    each_ms = {"a": 13.0, NGRAM: lookup_ms}
    found = [run(pacing_of(drafters, pace, kinds=kinds), 300, each_ms, kinds) for _ in range(20)]
    assert sum(exchanges for _, exchanges, _ in found) <= 4
    assert sum(ms for *_, ms in found[3:]) / len(found[3:]) < 10.6


def test_a_drafter_that_was_busy_is_asked_for_again() -> None:
    drafters, pace = Drafters(), Pace()
    pacing = pacing_of(drafters, pace)
    _, exchanges, each_ms = run(
        pacing, 1000, {"a": SLOW_MS, "b": FAST_MS}, KINDS, granted=lambda position: position > 200
    )
    assert exchanges == 1
    assert each_ms < 0.3 * PLAIN_MS + 0.7 * FAST_MS + 2


def test_it_plans_by_where_its_own_workers_compute() -> None:
    hello = Hello(1, 9, "target", "auto", "", "cuda:0", "host", 1)
    server = WorkerHandle(9, b"", hello, "target", lambda message: None)
    pacing = pacing_of(Drafters(), Pace())
    pacing.servers_are([server], None)
    assert pacing.tuner.overlaps
    pacing.drafter_is(drafter("a", "cuda:0"), [server], 0)
    assert not pacing.tuner.overlaps
    pacing.drafter_is(drafter("b", "cuda:1"), [server], 0)
    assert pacing.tuner.overlaps

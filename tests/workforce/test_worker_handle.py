"""What a request gets: one terminal reply, or None when the worker is lost; and a cancel that waits for nobody."""

from __future__ import annotations

import pytest

from dsi_actors.config import Sampling
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import (
    Cancel,
    Cancelled,
    CloseGeneration,
    Draft,
    Drafted,
    Failed,
    FromOrchestrator,
    Hello,
    Reply,
    Verified,
    Verify,
)

VERIFY = Verify(1, 7, 0, 0, (1, 2), 2)
DRAFT = Draft(1, 8, 0, 0, (1, 2), 2, 3, 1)


class Clock:
    """Stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def sent() -> list[FromOrchestrator]:
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def handle(sent: list[FromOrchestrator], clock: Clock) -> WorkerHandle:
    hello = Hello(1, 1, "target", "timed", "", "cpu:0", "host", 1)
    return WorkerHandle(1, b"id", hello, "target", sent.append, clock=clock)


def test_there_is_one_terminal_reply(handle: WorkerHandle, sent: list[FromOrchestrator]) -> None:
    answers: list[Reply | None] = []
    handle.verify(VERIFY, answers.append)
    assert sent == [VERIFY]
    reply = Verified(1, 7, 2, (5,), (), 1, 20)
    handle.on_reply(reply)
    assert answers == [reply]
    handle.on_reply(reply)
    assert (handle.repeated_replies, handle.unasked_replies) == (1, 0)
    handle.on_reply(Verified(1, 6, 2, (5,), (), 1, 20))
    assert (handle.repeated_replies, handle.unasked_replies) == (1, 1)
    assert answers == [reply]


def test_drafts_stream_until_done(handle: WorkerHandle) -> None:
    blocks: list[Drafted] = []
    answers: list[Reply | None] = []
    handle.draft(DRAFT, answers.append, blocks.append)
    replies = [Drafted(1, 8, 2, (4,), False, 1), Drafted(1, 8, 3, (5, 6), True, 1)]
    for reply in replies:
        handle.on_reply(reply)
    assert answers == replies[1:]
    assert blocks == replies


def test_a_cancel_waits_for_nothing(handle: WorkerHandle, sent: list[FromOrchestrator]) -> None:
    answers: list[Reply | None] = []
    handle.verify(VERIFY, answers.append)
    handle.cancel(1, 7)
    assert sent == [VERIFY, Cancel(1, 7)]
    assert answers == []
    handle.on_reply(Cancelled(1, 7, 0, 0))  # the terminal reply is still owed, and expected
    assert handle.unasked_replies == 0
    assert answers == [Cancelled(1, 7, 0, 0)]


def test_nobody_is_cancelled_unasked(handle: WorkerHandle) -> None:
    answers: list[Reply | None] = []
    handle.verify(VERIFY, answers.append)
    handle.on_reply(Cancelled(1, 7, 0, 0))
    assert isinstance(answers[0], Failed)


def test_a_lost_worker_answers_none_to_what_it_owes_and_all_that_comes(
    handle: WorkerHandle, sent: list[FromOrchestrator]
) -> None:
    answers: list[Reply | None] = []
    handle.verify(VERIFY, answers.append)
    handle.on_lost()
    assert answers == [None]
    handle.verify(Verify(1, 9, 0, 0, (1, 2), 2), answers.append)
    assert answers == [None, None]
    handle.cancel(1, 9)
    assert sent == [VERIFY], "told to nobody"


def test_what_is_not_answered_is_asked_again_ever_later(
    handle: WorkerHandle, sent: list[FromOrchestrator], clock: Clock
) -> None:
    handle.verify(VERIFY, lambda reply: None)
    now_s = clock()
    handle.ask_again(now_s + 0.5)
    assert sent == [VERIFY]
    for second in range(1, 9):
        handle.ask_again(now_s + second + 0.1)
    assert sent == [VERIFY] * 5, "after 1, 2, 4 and 8 seconds"
    handle.cancel(1, 7)
    del sent[:]
    handle.ask_again(now_s + 20)
    assert sent == [VERIFY, Cancel(1, 7)], "whichever of the two was lost"


def test_time_in_which_we_stood_still_counts_for_nobody(
    handle: WorkerHandle, sent: list[FromOrchestrator], clock: Clock
) -> None:
    handle.verify(VERIFY, lambda reply: None)
    handle.cancel(1, 7)
    now_s = clock()
    handle.forgive(60.0, now_s + 60.0)
    handle.ask_again(now_s + 60.5)
    assert sent == [VERIFY, Cancel(1, 7)]
    assert not handle.owes_since(now_s + 59)
    assert handle.owes_since(now_s + 61)
    handle.forgive(60.0, now_s + 60.0)
    assert handle.owes_since(now_s + 61), "what was cancelled lately was not cancelled in the future"
    handle.ask_again(now_s + 61.5)
    assert sent == [VERIFY, Cancel(1, 7)] * 2, "nor asked"


def test_a_generation_that_the_worker_does_not_know_is_opened_again(
    handle: WorkerHandle, sent: list[FromOrchestrator]
) -> None:
    answers: list[Reply | None] = []
    handle.open(1, 2, "test", Sampling())
    [opened] = sent
    handle.verify(VERIFY, answers.append)
    unknown = Failed(1, 7, "unknown_generation", "?")
    for times in (1, 2, 3):
        handle.on_reply(unknown)
        assert sent == [opened, VERIFY] * (times + 1)
    handle.on_reply(unknown)
    assert answers == [unknown], "and not for ever"


def test_what_was_cancelled_is_not_opened_again(handle: WorkerHandle, sent: list[FromOrchestrator]) -> None:
    answers: list[Reply | None] = []
    handle.open(1, 2, "test", Sampling())
    handle.verify(VERIFY, answers.append)
    handle.close(1)
    handle.on_reply(Failed(1, 7, "unknown_generation", "?"))
    assert answers == [Cancelled(1, 7, 0, 0)]


@pytest.mark.parametrize("last", [Verified(1, 7, 2, (5,), (), 1, 20), Cancelled(1, 7, 1, 20)])
def test_what_is_in_flight_when_its_generation_closes_has_one_terminal_reply(
    handle: WorkerHandle, sent: list[FromOrchestrator], clock: Clock, last: Reply
) -> None:
    answers: list[Reply | None] = []
    handle.open(1, 2, "test", Sampling())
    handle.verify(VERIFY, answers.append)
    handle.close(1)
    assert sent[-1] == CloseGeneration(1)
    handle.on_reply(last)
    assert answers == [last]
    handle.on_reply(Failed(1, 7, "unknown_generation", "?"))  # it was asked again meanwhile
    assert answers == [last]
    assert (handle.repeated_replies, handle.unasked_replies, handle.faults) == (1, 0, 0)


@pytest.mark.parametrize(
    "blocks",
    [
        [Drafted(1, 8, 3, (5,), False, 1), Drafted(1, 8, 4, (6,), True, 1)],  # the first block was lost
        [
            Drafted(1, 8, 1, (9, 4), False, 1),
            Drafted(1, 8, 3, (5, 6), True, 1),
        ],  # the drafter held less than was thought
    ],
)
def test_guesses_that_begin_elsewhere_are_no_fault(handle: WorkerHandle, blocks: list[Drafted]) -> None:
    """The core finds the gap (tests/core/test_generation.py). The network may be to blame."""
    came: list[Drafted] = []
    handle.draft(DRAFT, lambda reply: None, came.append)
    for block in blocks:
        handle.on_reply(block)
    assert came == blocks
    assert handle.faults == 0


def observed() -> tuple[WorkerHandle, list[str]]:
    """A handle, and the reasons for which it finds its worker useless."""
    reasons: list[str] = []
    hello = Hello(1, 1, "target", "timed", "", "cpu:0", "host", 1)
    made = WorkerHandle(1, b"id", hello, "target", lambda message: None, on_useless=reasons.append, clock=Clock())
    return made, reasons


def test_a_worker_that_says_what_nobody_asked_is_useless_after_a_while() -> None:
    handle, reasons = observed()
    for attempt in range(8):
        handle.on_reply(Verified(9, attempt, 2, (5,), (), 1, 20))
    assert reasons == []
    handle.on_reply(Verified(9, 99, 2, (5,), (), 1, 20))
    assert "what nobody asked for: 9 replies" in reasons[0]


def test_a_worker_that_repeats_itself_without_end_is_useless_too() -> None:
    handle, reasons = observed()
    handle.verify(VERIFY, lambda reply: None)
    for _ in range(1 + 1000):
        handle.on_reply(Verified(1, 7, 2, (5,), (), 1, 20))
    assert reasons == []
    handle.on_reply(Verified(1, 7, 2, (5,), (), 1, 20))
    assert "it repeats itself" in reasons[0]


def test_a_worker_that_is_faulty_three_times_is_useless() -> None:
    handle, reasons = observed()
    handle.fault("one")
    handle.fault("two")
    assert reasons == []
    handle.fault("three")
    assert reasons == ["it was faulty 3 times, the last time: three"]


def test_a_worker_cannot_have_worked_for_longer_than_it_had(handle: WorkerHandle, clock: Clock) -> None:
    answers: list[Reply | None] = []
    handle.verify(VERIFY, answers.append)
    clock.now_s += 0.25
    handle.on_reply(Verified(1, 7, 2, (5,), (), 1, 4_000_000_000))
    assert isinstance(answers[0], Verified)
    assert answers[0].busy_us == 250_000 + 1000, "and what two clocks may differ by"


def test_a_worker_that_is_lost_while_it_answers_answers_once() -> None:
    answers: list[Reply | None] = []
    hello = Hello(1, 1, "drafter", "timed", "", "cpu:0", "host", 1)
    handle = WorkerHandle(1, b"id", hello, "drafter", lambda message: None)
    handle.draft(DRAFT, answers.append, lambda block: handle.on_lost())
    handle.on_reply(Drafted(1, 8, 2, (4,), True, 1))
    assert answers == [None]


def test_drafts_that_were_not_asked_for_are_a_fault(handle: WorkerHandle) -> None:
    blocks: list[Drafted] = []
    handle.draft(DRAFT, lambda reply: None, blocks.append)
    handle.on_reply(Drafted(1, 8, 4, (5, 6), False, 1))
    handle.on_reply(Drafted(1, 8, 2, (4,) * 20_000, False, 1))
    assert (handle.faults, blocks) == (2, [])
    handle.on_reply(Drafted(1, 8, 2, (4,), False, 1))
    assert len(blocks) == 0, "it has said too much for this request"


def test_a_cancel_that_is_lost_is_sent_again_soon(
    handle: WorkerHandle, sent: list[FromOrchestrator], clock: Clock
) -> None:
    handle.verify(VERIFY, lambda reply: None)
    now_s = clock()
    for second in (1.1, 2.1, 4.1):
        handle.ask_again(now_s + second)
    clock.now_s += 4.5
    handle.cancel(1, 7)
    del sent[:]
    handle.ask_again(clock() + 1.1)
    assert sent == [VERIFY, Cancel(1, 7)]


def test_a_drafter_may_take_as_long_as_its_steps_take(clock: Clock) -> None:
    """It looks for cancels between two steps, and a step of a slow one takes seconds: it was taken for dead, and quarantined."""
    handle = WorkerHandle(
        1, b"id", Hello(1, 1, "drafter", "auto", "", "cpu:0", "host", 1), "drafter", lambda _: None, clock=clock
    )
    assert handle.may_take_s(2.0, 120.0) == 120.0, "nothing is known of it yet"
    handle.draft(Draft(1, 8, 0, 0, (1, 2), 2, 9, 1), lambda _: None, lambda _: None)
    clock.now_s += 3.0
    handle.on_reply(Drafted(1, 8, 2, (4,), False, 1))
    assert handle.may_take_s(2.0, 120.0) == 12.0
    clock.now_s += 0.1
    handle.on_reply(Drafted(1, 8, 3, (4,), False, 1))
    assert handle.may_take_s(2.0, 120.0) == 12.0
    clock.now_s += 400.0
    handle.on_reply(Drafted(1, 8, 4, (4, 5), False, 1))
    assert handle.may_take_s(2.0, 120.0) == 120.0
    assert handle.faults == 0


def test_a_target_that_does_not_answer_is_found_out_soon(handle: WorkerHandle, clock: Clock) -> None:
    assert handle.may_take_s(2.0, 120.0) == 2.0
    handle.verify(VERIFY, lambda _: None)
    clock.now_s += 0.1
    handle.on_reply(Verified(1, 7, 2, (5,), (), 1, 20))
    assert handle.may_take_s(2.0, 120.0) == 2.0


AHEAD = Verify(1, 7, 0, 0, (1, 2), 2, (), 2)
GOING_ON = [
    Verified(1, 7, 2, (5,), (), 1, 20, True),
    Verified(1, 7, 3, (6,), (), 1, 20, True),
    Verified(1, 7, 4, (8,), (), 1, 20),
]


def test_a_server_that_goes_on_answers_several_times(handle: WorkerHandle, clock: Clock) -> None:
    answers: list[Reply | None] = []
    handle.verify(AHEAD, answers.append)
    for reply in GOING_ON:
        clock.now_s += 0.9  # the time without a reply counts from the last one
        handle.cancel_overdue(clock.now_s - 1.0)
        handle.on_reply(reply)
    assert answers == GOING_ON
    assert (handle.repeated_replies, handle.unasked_replies, handle.faults) == (0, 0, 0)
    handle.on_lost()
    assert answers == GOING_ON


def test_an_answer_that_comes_again_is_dropped_while_the_server_goes_on(handle: WorkerHandle) -> None:
    answers: list[Reply | None] = []
    handle.verify(AHEAD, answers.append)
    for reply in (GOING_ON[0], GOING_ON[0], GOING_ON[1], GOING_ON[0]):
        handle.on_reply(reply)
    assert answers == GOING_ON[:2]
    assert handle.repeated_replies == 2


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_server_that_goes_on_further_than_it_may_is_found_out(handle: WorkerHandle, allowed: int) -> None:
    answers: list[Reply | None] = []
    handle.verify(Verify(1, 7, 0, 0, (1, 2), 2, (), allowed), answers.append)
    for reply in GOING_ON[: allowed + 1]:
        handle.on_reply(reply)
    assert answers == [*GOING_ON[:allowed], Failed(1, 7, "protocol", "it goes on further than it may")]


def test_a_further_verify_ends_what_a_server_does_by_itself(handle: WorkerHandle, sent: list[FromOrchestrator]) -> None:
    first: list[Reply | None] = []
    handle.verify(AHEAD, first.append)
    handle.on_reply(GOING_ON[0])
    following = Verify(1, 9, 3, 0, (6,), 3)
    handle.verify(following, first.append)
    assert sent == [AHEAD, following], "no cancel"
    handle.on_reply(Cancelled(1, 7, 0, 0))
    assert first == [GOING_ON[0], Cancelled(1, 7, 0, 0)]


def test_a_cancel_that_a_server_does_not_hear_is_told_again_while_it_goes_on(
    handle: WorkerHandle, sent: list[FromOrchestrator], clock: Clock
) -> None:
    handle.verify(AHEAD, lambda reply: None)
    handle.cancel(1, 7)
    for reply in GOING_ON[:2]:
        clock.now_s += 0.6
        handle.on_reply(reply)
    handle.ask_again(clock.now_s)
    assert sent[-1] == Cancel(1, 7)
    assert handle.owes_since(clock.now_s)

"""The worker's loop over a scripted socket: one terminal reply for each request, prefixes checked, cancels obeyed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsi_protocol import (
    Cancel,
    Cancelled,
    CloseGeneration,
    Draft,
    Drafted,
    Failed,
    FromWorker,
    Goodbye,
    Heartbeat,
    Message,
    NeedPrefix,
    OpenGeneration,
    Ready,
    Reply,
    Verified,
    Verify,
    Welcome,
    prefix_checksum,
)
from dsi_workers.connection import WorkSocket
from dsi_workers.engine import Interrupt, Task
from dsi_workers.loop import WorkerLoop
from dsi_workers.sessions import MAX_SESSIONS
from support.engines import CountingEngine, ScriptedSocket, role_for

OPEN = OpenGeneration(1, 3, "test")
PROMPT = (10, 11, 12)


def loop_of(socket: ScriptedSocket, engine: CountingEngine, role: str = "target") -> WorkerLoop:
    return WorkerLoop(cast(WorkSocket, socket), engine, still_needed=lambda: True, role=role)


def serve(*messages: Message, during: list[list[Message]] | None = None, role: str = "") -> list[FromWorker]:
    """Everything the worker says to `messages` (and to `during`, which arrive inside the engine's calls).

    Its role is the one to which one would send these messages, unless `role` says which."""
    socket, engine = ScriptedSocket(), CountingEngine()
    engine.socket = socket
    engine.during.extend(during or [])
    socket.inbox.extend(messages)
    loop_of(socket, engine, role or role_for([*messages, *itertools.chain(*(during or []))])).run()
    return socket.sent


def verify(
    attempt: int, tokens: tuple[int, ...], *, base: int = 0, prefix: tuple[int, ...] = (), start: int = 3
) -> Verify:
    return Verify(1, attempt, base, prefix_checksum(prefix), tokens, start)


def without_time(reply: FromWorker) -> FromWorker:
    match reply:
        case Verified():
            return replace(reply, busy_us=0)
        case Drafted(generation, attempt, start, tokens, done, _):
            return Drafted(generation, attempt, start, tokens, done, 0)
        case Cancelled(generation, attempt, forwards, _):
            return Cancelled(generation, attempt, forwards, 0)
    return reply


def served(*messages: Message, during: list[list[Message]] | None = None, role: str = "") -> list[FromWorker]:
    return [without_time(reply) for reply in serve(*messages, during=during, role=role)]


def test_verify_gives_the_own_tokens_up_to_the_first_difference() -> None:
    assert served(OPEN, verify(1, PROMPT)) == [Verified(1, 1, 3, (13,), (), 1, 0)]
    assert served(OPEN, verify(1, (*PROMPT, 13, 14))) == [Verified(1, 1, 3, (13, 14, 15), (), 1, 0)]
    assert served(OPEN, verify(1, (*PROMPT, 13, 99, 15))) == [Verified(1, 1, 3, (13, 14), (), 1, 0)]


def test_a_request_builds_on_what_an_earlier_one_left() -> None:
    replies = served(OPEN, verify(1, (*PROMPT, 13, 99)), verify(2, (14,), base=4, prefix=(*PROMPT, 13), start=5))
    assert replies == [Verified(1, 1, 3, (13, 14), (), 1, 0), Verified(1, 2, 5, (15,), (), 1, 0)]


def test_a_prefix_that_is_not_there_is_asked_for() -> None:
    assert served(OPEN, verify(1, (5,), base=3, prefix=PROMPT)) == [NeedPrefix(1, 1, 0)]
    assert served(OPEN, verify(1, PROMPT), verify(2, (5,), base=9, prefix=(0,) * 9)) == [
        Verified(1, 1, 3, (13,), (), 1, 0), NeedPrefix(1, 2, 3),
    ]  # fmt: skip
    wrong_text = verify(2, (5,), base=3, prefix=(10, 11, 99))
    assert served(OPEN, verify(1, PROMPT), wrong_text) == [Verified(1, 1, 3, (13,), (), 1, 0), NeedPrefix(1, 2, 0)]


def test_draft_in_blocks_and_continue() -> None:
    first = Draft(1, 1, 0, 0, PROMPT, 3, 5, 2)
    more = Draft(1, 2, 3, prefix_checksum(PROMPT), (), 8, 2, 2)
    assert served(OPEN, first, more) == [
        Drafted(1, 1, 3, (13, 14), False, 0),
        Drafted(1, 1, 5, (15, 16), False, 0),
        Drafted(1, 1, 7, (17,), True, 0),
        Drafted(1, 2, 8, (18, 19), True, 0),
    ]


def test_a_draft_from_a_correction_drops_what_was_drafted_beyond() -> None:
    first = Draft(1, 1, 0, 0, PROMPT, 3, 4, 4)
    corrected = Draft(1, 2, 4, prefix_checksum((*PROMPT, 13)), (50,), 5, 2, 1)
    assert served(OPEN, first, corrected)[1:] == [Drafted(1, 2, 5, (51,), False, 0), Drafted(1, 2, 6, (52,), True, 0)]


@pytest.mark.parametrize("attempt", [1, 5])
def test_a_cancel_reaches_into_the_work(attempt: int) -> None:
    assert served(OPEN, verify(1, PROMPT), during=[[Cancel(1, attempt)]]) == [Cancelled(1, 1, 1, 0)]


def test_a_cancel_is_a_cut_and_may_overtake() -> None:
    replies = served(OPEN, Cancel(1, 2), verify(1, PROMPT), verify(2, PROMPT), verify(3, PROMPT))
    assert replies == [Cancelled(1, 1, 0, 0), Cancelled(1, 2, 0, 0), Verified(1, 3, 3, (13,), (), 1, 0)]


def test_a_cancelled_request_still_leaves_its_tokens() -> None:
    replies = served(OPEN, Cancel(1, 1), verify(1, PROMPT), verify(2, (13,), base=3, prefix=PROMPT))
    assert replies == [Cancelled(1, 1, 0, 0), Verified(1, 2, 3, (13, 14), (), 1, 0)]


def test_a_draft_is_cancelled_between_tokens_and_the_next_one_is_taken() -> None:
    first = Draft(1, 1, 0, 0, PROMPT, 3, 30, 30)
    corrected = Draft(1, 2, 3, prefix_checksum(PROMPT), (70,), 4, 1, 1)
    replies = served(OPEN, first, during=[[], [], [Cancel(1, 1), corrected]])
    assert replies == [Cancelled(1, 1, 3, 0), Drafted(1, 2, 4, (71,), True, 0)]


def test_a_request_that_comes_twice_is_computed_once() -> None:
    assert served(OPEN, verify(1, PROMPT), verify(1, PROMPT)) == [Verified(1, 1, 3, (13,), (), 1, 0)]


def test_a_verification_that_comes_again_after_its_reply_gets_that_again() -> None:
    socket, engine = ScriptedSocket(), CountingEngine()
    loop = loop_of(socket, engine)
    socket.inbox.extend([OPEN, verify(1, PROMPT)])
    loop.run()
    [verified] = socket.sent
    loop._on_message(verify(1, PROMPT))
    assert socket.sent == [verified, verified]
    assert engine.forwards == 1


def test_a_draft_that_comes_again_after_its_last_block_gets_that_block_again_and_no_other() -> None:
    socket, engine = ScriptedSocket(), CountingEngine()
    loop = loop_of(socket, engine, "drafter")
    draft = Draft(1, 2, 0, 0, PROMPT, 3, 2, 1)
    socket.inbox.extend([OPEN, draft])
    loop.run()
    first, last = socket.sent
    assert [isinstance(reply, Drafted) and reply.done for reply in socket.sent] == [False, True]
    loop._on_message(draft)
    assert socket.sent == [first, last, last]
    assert engine.forwards == 2


def test_a_worker_that_is_greeted_again_says_again_that_it_is_ready() -> None:
    socket = ScriptedSocket()
    ready = Ready("count", 1000, 64, 8, 1, 1, 8, 1, 5, 0)
    socket.inbox.extend([Welcome(1, "target", "timed", "", {}, 500, 2000)])
    WorkerLoop(cast(WorkSocket, socket), CountingEngine(), lambda: True, ready, role="target").run()
    assert socket.sent == [ready]


def test_a_worker_that_drains_says_so() -> None:
    """What came before is answered, what comes after is told, and the loop ends by itself."""

    class AskedToEnd(CountingEngine):
        def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
            loop.drain()
            socket.inbox.append(verify(2, PROMPT))
            super().step(tasks, interrupt)

    socket = ScriptedSocket()
    socket.inbox.extend([OPEN, verify(1, PROMPT)])
    loop = WorkerLoop(cast(WorkSocket, socket), AskedToEnd(), still_needed=lambda: True, role="target")
    loop.run()
    assert [without_time(reply) for reply in socket.sent] == [
        Failed(1, 2, "draining", "this worker takes no more work"), Verified(1, 1, 3, (13,), (), 1, 0),
    ]  # fmt: skip
    assert loop.draining
    assert loop.farewell is None


def test_the_generation_that_was_idle_longest_makes_room() -> None:
    socket, engine = ScriptedSocket(), CountingEngine()
    opened = [replace(OPEN, generation=number) for number in range(1, MAX_SESSIONS + 1)]
    socket.inbox.extend(opened)
    socket.inbox.extend([replace(verify(1, PROMPT), generation=1), replace(OPEN, generation=1000)])
    socket.inbox.extend([replace(verify(1, PROMPT), generation=number) for number in (2, 1000)])
    loop_of(socket, engine).run()
    assert engine.forgotten == [2]
    assert [type(reply) for reply in socket.sent] == [Failed, Verified, Verified]


def test_a_generation_that_waits_for_its_turn_is_not_idle() -> None:
    """It was used before all others, which are idle."""
    socket, engine = ScriptedSocket(), CountingEngine()
    socket.inbox.extend([OPEN, verify(1, PROMPT)])
    socket.inbox.extend(replace(OPEN, generation=number) for number in range(2, MAX_SESSIONS + 1))
    socket.inbox.append(replace(OPEN, generation=1000))
    loop_of(socket, engine).run()
    assert engine.forgotten == [2]
    assert [type(reply) for reply in socket.sent] == [Verified]


def test_closing_cancels_and_forgets() -> None:
    replies = served(OPEN, verify(1, PROMPT), during=[[CloseGeneration(1), verify(2, PROMPT)]])
    assert replies == [
        Failed(1, 2, "unknown_generation", "the generation is not open on this worker"), Cancelled(1, 1, 1, 0),
    ]  # fmt: skip


def ahead(request: Verify, answers: int) -> Verify:
    return replace(request, ahead=answers)


def answer(attempt: int, start: int, *own: int, more: bool = False, forwards: int = 1) -> Verified:
    return Verified(1, attempt, start, own, (), forwards, 0, more)


def test_a_server_goes_on_by_itself_as_far_as_it_may() -> None:
    assert served(OPEN, ahead(verify(1, PROMPT), 2)) == [
        answer(1, 3, 13, more=True), answer(1, 4, 14, more=True), answer(1, 5, 15),
    ]  # fmt: skip


def test_a_server_goes_on_behind_a_wrong_guess_and_not_behind_right_ones() -> None:
    assert served(OPEN, ahead(verify(1, (*PROMPT, 13, 99, 15)), 1)) == [
        answer(1, 3, 13, 14, more=True), answer(1, 5, 15),
    ]  # fmt: skip
    assert served(OPEN, ahead(verify(1, (*PROMPT, 13, 14)), 1)) == [answer(1, 3, 13, 14, 15)]


@pytest.mark.parametrize(
    ("branch", "more"), [((13, 14), False), ((13,), False), ((50,), True)], ids=["to its end", "to its end", "beside"]
)
def test_in_a_tree_a_server_goes_on_if_no_guess_is_right(branch: tuple[int, ...], more: bool) -> None:
    tree = Verify(1, 1, 0, 0, (*PROMPT, 99, 15, *branch), 3, (0, 1, 2, 3, 4, 3, *range(6, 5 + len(branch))), 1)
    first = answer(1, 3, *range(13, 14 + (0 if more else len(branch))), more=more)
    assert served(OPEN, tree) == [first, *[answer(1, 4, 14)] * more]


def test_a_server_that_goes_on_holds_its_own_tokens() -> None:
    following = verify(2, (16, 17), base=6, prefix=(*PROMPT, 13, 14, 15), start=6)
    replies = served(OPEN, ahead(verify(1, PROMPT), 9), during=[[], [], [], [following]])
    assert replies == [
        answer(1, 3, 13, more=True), answer(1, 4, 14, more=True), answer(1, 5, 15, more=True),
        Cancelled(1, 1, 1, 0), answer(2, 6, 16, 17, 18),
    ]  # fmt: skip


def test_a_further_verify_ends_the_forward_that_a_server_began_by_itself() -> None:
    replies = served(OPEN, ahead(verify(1, PROMPT), 9), during=[[], [verify(2, (13, 14), base=3, prefix=PROMPT)]])
    assert replies == [answer(1, 3, 13, more=True), Cancelled(1, 1, 1, 0), answer(2, 3, 13, 14, 15)]


def test_a_server_with_a_further_verify_does_not_go_on() -> None:
    replies = served(OPEN, ahead(verify(1, PROMPT), 9), during=[[verify(2, (13,), base=3, prefix=PROMPT)]])
    assert replies == [answer(1, 3, 13), answer(2, 3, 13, 14)]


@pytest.mark.parametrize("end", [Cancel(1, 1), CloseGeneration(1)])
def test_what_ends_a_request_ends_its_going_on(end: Message) -> None:
    replies = served(OPEN, ahead(verify(1, PROMPT), 9), during=[[], [end]])
    assert replies == [answer(1, 3, 13, more=True), Cancelled(1, 1, 1, 0)]


def test_a_server_does_not_go_on_beyond_its_longest_text() -> None:
    text = tuple(range(10, 73))
    assert served(OPEN, ahead(verify(1, text, start=63), 9)) == [
        answer(1, 63, 73, more=True), answer(1, 64, 74),
    ]  # fmt: skip


def test_a_verify_that_comes_again_while_the_server_goes_on_gets_the_last_answer_again() -> None:
    request = ahead(verify(1, PROMPT), 2)
    assert served(OPEN, request, during=[[], [request]]) == [
        answer(1, 3, 13, more=True), answer(1, 3, 13, more=True), answer(1, 4, 14, more=True), answer(1, 5, 15),
    ]  # fmt: skip


def test_generations_that_go_on_share_their_forwards_without_a_word() -> None:
    socket, engine = ScriptedSocket(), CountingEngine()
    socket.inbox.extend([OPEN, replace(OPEN, generation=2)])
    socket.inbox.extend([replace(ahead(verify(1, PROMPT), 4), generation=number) for number in (1, 2)])
    loop_of(socket, engine).run()
    assert engine.batches == [[1, 2]] * 5


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (verify(1, PROMPT, start=0), "start 0 lies outside"),
        (verify(1, PROMPT, start=4), "start 4 lies outside"),
        (verify(1, (1000,)), "token 1000 is outside the vocabulary of 1000"),
        (verify(1, (1,) * 65), "position 65 is beyond this worker's limit of 64"),
        (Draft(1, 1, 0, 0, PROMPT, 3, 62, 1), "position 65 is beyond"),
        (Draft(1, 1, 0, 0, PROMPT, 2, 2, 1), "a draft starts at position 3 or later, not at 2"),
        (Draft(1, 1, 0, 0, (), 0, 2, 1), "a draft starts at position 1 or later, not at 0"),
        (Draft(1, 1, 0, 0, (), 1, 2, 1), "there is nothing to continue"),
        (Draft(1, 1, 0, 0, PROMPT, 3, 0, 1), "count, block and rows must be at least 1, not 0, 1 and 1"),
        (Draft(1, 1, 0, 0, PROMPT, 3, 1, 0), "count, block and rows must be at least 1, not 1, 0 and 1"),
    ],
)
def test_impossible_requests_fail_with_a_reason(request_: Verify | Draft, problem: str) -> None:
    [reply] = served(OPEN, request_)
    assert isinstance(reply, Failed)
    assert reply.code == "limit"
    assert problem in reply.message


def test_an_engine_that_breaks_fails_one_request() -> None:
    socket, engine = ScriptedSocket(), CountingEngine()
    engine.step = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))  # type: ignore[method-assign]
    socket.inbox.extend([OPEN, verify(1, PROMPT), verify(2, PROMPT)])
    loop_of(socket, engine).run()
    assert socket.sent == [Failed(1, attempt, "engine", "RuntimeError: out of memory") for attempt in (1, 2)]


small = st.integers(0, 6)
tokens = st.lists(st.sampled_from([10, 11, 12, 13, 14, 99, 1000, 5000]), max_size=5).map(tuple)
checksums = st.one_of(
    st.just(0), st.lists(st.sampled_from([10, 11, 12, 13]), max_size=4).map(prefix_checksum), st.integers(0, 2**32 - 1)
)
anything: st.SearchStrategy[Message] = st.one_of(
    st.builds(replace, st.just(OPEN), generation=small),
    st.builds(Verify, small, small, small, checksums, tokens, st.integers(0, 70)),
    st.builds(
        Verify,
        st.just(1),
        small,
        st.just(0),
        st.just(0),
        st.sampled_from([PROMPT, (*PROMPT, 13), (*PROMPT, 99)]),
        st.just(3),
        st.just(()),
        st.sampled_from([0, 1, 3, 2**32 - 1]),
    ),
    st.builds(
        Draft, small, small, small, checksums, tokens, st.integers(0, 70), st.sampled_from([0, 1, 3, 2**32 - 1]), small
    ),
    st.builds(Draft, st.just(1), small, st.just(0), st.just(0), st.just(PROMPT), st.integers(3, 6), small, small),
    st.builds(Cancel, small, small),
    st.builds(CloseGeneration, small),
    st.sampled_from(
        [
            Goodbye("go"),
            Welcome(1, "target", "timed", "", {}, 500, 2000),
            Heartbeat(1, 1),
            Cancelled(1, 1, 1, 1),
        ]
    ),
)


@settings(max_examples=600)
@given(
    st.lists(anything, max_size=30),
    st.lists(st.lists(anything, max_size=3), max_size=8),
    st.sampled_from(["target", "drafter"]),
)
def test_whatever_comes_every_request_has_its_reply(
    messages: list[Message], during: list[list[Message]], role: str
) -> None:
    """The fuzzer of the worker's loop: any messages in any order, before and in the middle of its work."""
    socket, engine = ScriptedSocket(), CountingEngine()
    engine.socket = socket
    engine.during.extend(during)
    socket.inbox.extend([OPEN, *messages])
    loop_of(socket, engine, role).run()
    asked: Counter[tuple[int, int]] = Counter()
    arrived = [OPEN, *messages, *(message for each in during[: len(during) - len(engine.during)] for message in each)]
    for message in arrived:
        if isinstance(message, Verify | Draft):
            asked[message.generation, message.attempt] += 1
    terminal = Counter(
        (reply.generation, reply.attempt)
        for reply in socket.sent
        if isinstance(reply, Reply)
        and not (isinstance(reply, Drafted) and not reply.done)
        and not (isinstance(reply, Verified) and reply.more)
    )
    assert set(terminal) <= set(asked)
    assert all(terminal[key] <= asked[key] for key in terminal)
    if not any(isinstance(message, Goodbye) for message in arrived):
        assert set(terminal) == set(asked), "each has one"

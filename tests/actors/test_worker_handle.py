"""What a request gets: one terminal reply, or None when the worker is lost; and a cancel that waits for nobody."""

from __future__ import annotations

import pytest

from dsi_actors.actors.worker_handle import WorkerHandle
from dsi_protocol import Cancel, Cancelled, Draft, Drafted, Failed, FromOrchestrator, Hello, Reply, Verified, Verify

VERIFY = Verify(1, 7, 0, 0, (1, 2), 2)
DRAFT = Draft(1, 8, 0, 0, (1, 2), 2, 3, 1)


@pytest.fixture
def sent() -> list[FromOrchestrator]:
    return []


@pytest.fixture
def handle(sent: list[FromOrchestrator]) -> WorkerHandle:
    hello = Hello(1, 1, "target", "timed", "", "cpu:0", "host", 1)
    return WorkerHandle(1, b"id", hello, "target", sent.append)


def test_there_is_one_terminal_reply(handle: WorkerHandle, sent: list[FromOrchestrator]) -> None:
    answers: list[Reply | None] = []
    handle.verify(VERIFY, answers.append)
    assert sent == [VERIFY]
    reply = Verified(1, 7, 2, (5,), (), 1, 20)
    handle.on_reply(reply)
    assert answers == [reply]
    handle.on_reply(reply)
    assert handle.unasked_replies == 1
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

"""What a request's awaiter gets: one terminal reply, WorkerLost, or a cancel that waits for nobody."""

from __future__ import annotations

import asyncio

import pytest

from dsi_actors.actors.worker_handle import WorkerHandle
from dsi_actors.errors import WorkerLost
from dsi_protocol import Cancel, Cancelled, Draft, Drafted, FromOrchestrator, Hello, Verified, Verify

VERIFY = Verify(1, 7, 0, 0, (1, 2), 2)
DRAFT = Draft(1, 8, 0, 0, (1, 2), 2, 3, 1)


@pytest.fixture
def sent() -> list[FromOrchestrator]:
    return []


@pytest.fixture
def handle(sent: list[FromOrchestrator]) -> WorkerHandle:
    hello = Hello(1, 1, "target", "timed", "", "cpu:0", "host", 1)
    return WorkerHandle(1, b"id", hello, "target", sent.append)


async def test_a_terminal_reply_is_what_the_awaiter_gets(handle: WorkerHandle, sent: list[FromOrchestrator]) -> None:
    running = asyncio.ensure_future(handle.verify(VERIFY))
    await asyncio.sleep(0)
    assert sent == [VERIFY]
    reply = Verified(1, 7, 2, (5,), (), 1, 20)
    handle.on_reply(reply)
    assert await running == reply
    handle.on_reply(reply)
    assert handle.unasked_replies == 1


async def test_drafts_stream_until_done(handle: WorkerHandle) -> None:
    blocks: list[Drafted] = []
    running = asyncio.ensure_future(handle.draft(DRAFT, blocks.append))
    await asyncio.sleep(0)
    replies = [Drafted(1, 8, 2, (4,), False, 1), Drafted(1, 8, 3, (5, 6), True, 1)]
    for reply in replies:
        handle.on_reply(reply)
    assert await running == replies[-1]
    assert blocks == replies


async def test_cancelling_the_awaiter_sends_a_cancel_and_waits_for_nothing(
    handle: WorkerHandle, sent: list[FromOrchestrator]
) -> None:
    running = asyncio.ensure_future(handle.verify(VERIFY))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sent == [VERIFY, Cancel(1, 7)]
    handle.on_reply(Cancelled(1, 7, 0, 0))  # the terminal reply is still owed, and expected
    assert handle.unasked_replies == 0


async def test_a_lost_worker_fails_what_it_owes_and_all_that_comes(handle: WorkerHandle) -> None:
    running = asyncio.ensure_future(handle.verify(VERIFY))
    await asyncio.sleep(0)
    handle.on_lost()
    with pytest.raises(WorkerLost, match="target 1"):
        await running
    with pytest.raises(WorkerLost):
        await handle.verify(Verify(1, 9, 0, 0, (1, 2), 2))
    handle.cancel(1, 9)  # told to nobody

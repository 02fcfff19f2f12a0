"""Actors on their own: order, lanes, back-pressure, tasks that return messages, and what a parent hears."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from dsi_actors.actor import Actor, MailboxFull
from support.patience import patience


class Recorder(Actor[object]):
    """Keeps what it hears; does what callables among its messages say."""

    def __init__(self, mailbox_size: int = 100) -> None:
        super().__init__("recorder", mailbox_size=mailbox_size)
        self.heard: list[object] = []
        self.stopped = 0

    def receive(self, message: object) -> None:
        if callable(message):
            message()
        else:
            self.heard.append(message)
            if message == "stop":
                self.stop()

    def on_stop(self) -> None:
        self.stopped += 1


async def run(actor: Recorder, *messages: object) -> None:
    for message in messages:
        actor.tell(message)
    async with patience():
        await actor.run()


async def test_messages_in_order_and_control_first() -> None:
    actor = Recorder()
    actor.tell(1)
    actor.tell(2)
    actor.tell("urgent", control=True)
    await run(actor, "stop", "never heard")
    assert actor.heard == ["urgent", 1, 2, "stop"]
    assert actor.stopped == 1
    actor.tell("nobody is there")  # the dead hear nothing, and nobody is hurt


async def test_a_full_mailbox_is_an_error_of_the_sender_not_a_loss() -> None:
    actor = Recorder(mailbox_size=2)
    actor.tell(1)
    actor.tell("stop")
    with pytest.raises(MailboxFull, match="recorder has 2 messages waiting"):
        actor.tell(3)
    actor.tell("urgent", control=True)
    await run(actor)
    assert actor.heard == ["urgent", 1, "stop"]


async def test_what_is_delivered_is_handled_at_once_but_not_in_the_middle_of_a_message() -> None:
    actor = Recorder()
    heard_inside: list[object] = []

    def deliver_inside() -> None:
        actor.deliver("inner")
        heard_inside.extend(actor.heard)

    async def outside() -> object:
        actor.deliver("outer")
        assert actor.heard == ["outer"], "before deliver returned"
        actor.deliver(deliver_inside)
        assert actor.heard == ["outer", "inner"]
        assert heard_inside == ["outer"], "one message at a time"
        return "stop"

    await run(actor, lambda: actor.spawn(outside()))
    assert actor.heard == ["outer", "inner", "stop"]
    actor.deliver("nobody is there")
    assert actor.heard[-1] == "stop"


async def test_a_task_returns_one_message() -> None:
    actor = Recorder()

    async def work() -> object:
        await asyncio.sleep(0)
        return "stop"

    await run(actor, lambda: actor.spawn(work()))
    assert actor.heard == ["stop"]


async def test_stopping_cancels_the_tasks() -> None:
    actor = Recorder()
    ended: list[str] = []

    async def work() -> object:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("cancelled")
        return "never"

    async def started() -> object:
        return "stop"

    await run(actor, lambda: actor.spawn(work()), lambda: actor.spawn(started()))
    assert ended == ["cancelled"]
    assert actor.heard == ["stop"]


def fail() -> None:
    raise LookupError("what was that?")


async def failing_task() -> object:
    fail()
    return None


class FailsAtItsStart(Recorder):
    def on_start(self) -> None:
        fail()


@pytest.mark.parametrize("how", ["at its start", "in receive", "in a task"])
async def test_a_failure_ends_the_actor_and_reaches_the_parent(how: str) -> None:
    parent, child = Recorder(), FailsAtItsStart() if how == "at its start" else Recorder()
    child.tell(fail if how == "in receive" else lambda: child.spawn(failing_task()))
    errors: list[BaseException | None] = []

    def on_end(error: BaseException | None) -> object:
        errors.append(error)
        return "stop"

    await run(parent, lambda: parent.start_child(child, on_end))
    assert child.stopped == 1
    assert child.ended
    [error] = errors
    assert isinstance(error, LookupError)


async def test_a_parent_ends_its_children() -> None:
    parent, child = Recorder(), Recorder()
    begin: Callable[[], None] = lambda: parent.start_child(child, lambda error: error)  # noqa: E731
    child.tell(lambda: parent.tell("stop"))
    await run(parent, begin)
    assert child.stopped == 1

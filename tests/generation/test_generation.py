"""A generation and the workers lent to it, message by message."""

from __future__ import annotations

import asyncio
import time

import pytest

import dsi_actors
from dsi_actors.config import Config, Sampling
from dsi_actors.core import GenerationCore, Policy
from dsi_actors.core.actions import Action
from dsi_actors.core.events import Event, PolicyChanged
from dsi_actors.generation.account import Account
from dsi_actors.generation.answers import Misbehaved, Withdrawn
from dsi_actors.generation.generation import Generation
from dsi_actors.generation.knowledge import Knowledge
from dsi_actors.generation.messages import Granted, Reclaimed
from dsi_actors.planning.arms import TOGETHER
from dsi_actors.planning.controller import Controller
from dsi_actors.planning.estimates import Estimates
from dsi_actors.planning.search import Steps
from dsi_actors.planning.tuner import Tuner
from dsi_actors.workforce.scheduler import Scheduler
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
    OpenGeneration,
    Ready,
    Verified,
    Verify,
)
from support.fake_worker import FakeWorker, running, silent
from support.patience import limit_s
from support.timed import PROMPT, timed_config

pytestmark = pytest.mark.usefixtures("forked_workers")

NOTHING_KNOWN = Knowledge(Config(), lambda role: [], lambda: 0)


def lent(number: int, sent: list[FromOrchestrator]) -> WorkerHandle:
    hello = Hello(1, number, "target", "timed", "", "cpu:0", "host", number)
    return WorkerHandle(number, bytes([number]), hello, "target", sent.append)


async def test_a_worker_that_failed_is_not_used_again_even_if_a_grant_was_on_its_way() -> None:
    """Reclaimed, and granted anew, while the generation was giving it back: the scheduler took it back after that."""
    sent: dict[int, list[FromOrchestrator]] = {1: [], 2: []}
    first, second = (lent(number, sent[number]) for number in sent)
    controller = Controller.with_one_drafter("dsi", 2, 1, Estimates())
    generation = Generation(
        1, GenerationCore((1, 2), policy=controller.begin(), max_tokens=4), Scheduler(), controller, NOTHING_KNOWN,
        vocabulary_size=1000, sampling=Sampling(max_tokens=4), correlation="g", first_target_wait_s=3600.0,
        target_wait_s=3600.0, on_tokens=lambda tokens: None, on_end=lambda error: None,
    )  # fmt: skip
    task = asyncio.create_task(generation.run())
    await asyncio.sleep(0)
    for worker in (first, second):
        generation.receive(Granted(worker))
    assert [type(message) for message in sent[1]] == [OpenGeneration, Verify]
    generation.receive(Misbehaved(first, "its numbers are not finite"))
    assert isinstance(sent[1][-1], CloseGeneration)
    before = len(sent[1])
    generation.receive(Granted(first))
    assert sent[1][before:] == []
    generation.stop()
    await task


@pytest.mark.parametrize("code", ["limit", "request"])
async def test_what_a_drafter_that_was_sent_away_still_owes_is_not_its_fault(code: str) -> None:
    """A text was too long for it, or parameters had no meaning: what else it was asked is cancelled by us, and it says so."""
    sent: list[FromOrchestrator] = []
    useless: list[str] = []
    hello = Hello(1, 3, "drafter", "timed", "", "cpu:0", "host", 3)
    drafter = WorkerHandle(3, b"3", hello, "drafter", sent.append, on_useless=useless.append)
    for number in range(1, 5):
        controller = Controller.with_one_drafter("dsi", 1, None, Estimates(40.0, 40.0, 8, drafter_ms=2.0))
        generation = Generation(
            number, GenerationCore((1, 2), policy=controller.begin(), max_tokens=400), Scheduler(),
            controller, NOTHING_KNOWN, vocabulary_size=1000, sampling=Sampling(max_tokens=400),
            correlation="g", first_target_wait_s=3600.0, target_wait_s=3600.0, on_tokens=lambda tokens: None,
            on_end=lambda error: None,
        )  # fmt: skip
        task = asyncio.create_task(generation.run())
        await asyncio.sleep(0)
        generation.receive(Granted(drafter))
        asked = [message for message in sent if isinstance(message, Draft) and message.generation == number]
        assert len(asked) == 2
        drafter.on_reply(Failed(number, asked[1].attempt, code, "it cannot be served"))
        await asyncio.sleep(0)
        drafter.on_reply(Cancelled(number, asked[0].attempt, 0, 0))
        await asyncio.sleep(0)
        generation.stop()
        await task
    assert (drafter.faults, useless) == (0, [])


async def test_a_block_counts_as_verified_beside_only_since_the_block_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests for drafts go out at once. While the first one is answered something is verified, and then nothing is."""
    now_s = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    shares: list[float] = []
    monkeypatch.setattr(Tuner, "drafted", lambda self, tokens, took_ms, *, beside: shares.append(beside))
    drafter = Lent(3, "drafter")
    controller = Controller.with_one_drafter("dsi", 1, None, Estimates(40.0, 40.0, 8, drafter_ms=2.0))
    generation = Generation(
        1, GenerationCore((1, 2), policy=controller.begin(), max_tokens=400), Scheduler(), controller, NOTHING_KNOWN,
        vocabulary_size=1000, sampling=Sampling(max_tokens=400), correlation="g", first_target_wait_s=3600.0,
        target_wait_s=3600.0, on_tokens=lambda tokens: None, on_end=lambda error: None,
    )  # fmt: skip
    task = asyncio.create_task(generation.run())
    await asyncio.sleep(0)
    generation._account.verification_began()
    generation.receive(Granted(drafter.worker))
    first, second = (message for message in drafter.sent if isinstance(message, Draft))
    now_s = 1.0
    generation._account.verification_ended()
    drafter.worker.on_reply(Drafted(1, first.attempt, first.start, (5,) * first.count, True, 100))
    for at_s in (2.0, 3.0):
        now_s = at_s
        block = Drafted(1, second.attempt, second.start + int(at_s) - 2, (5,), False, 100)
        drafter.worker.on_reply(block)
    assert shares == [0.0, 0.0], "the first one read the prompt, too, and does not count"
    generation.stop()
    await task


async def test_an_exception_at_the_start_ends_the_generation_with_that_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader waited for ever: it was raised in a callback of the event loop."""

    def fail(self: Account) -> None:
        raise LookupError("there is no clock")

    config = timed_config(listen="tcp://127.0.0.1:*")
    async with (
        dsi_actors.Orchestrator(config) as orchestrator,
        running(orchestrator.endpoint, FakeWorker("target", silent)),
    ):
        assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
        monkeypatch.setattr(Account, "begin", fail)
        with pytest.raises(LookupError, match="there is no clock"):
            await anext(orchestrator.generate(PROMPT))
        assert orchestrator.running == 0


class Lent:
    """A worker that is lent, and what it was sent."""

    def __init__(self, number: int, role: str, kind: str = "") -> None:
        self.sent: list[FromOrchestrator] = []
        hello = Hello(1, number, role, "timed", "", "cpu:0", "host", number)
        self.worker = WorkerHandle(number, bytes([number]), hello, role, self.sent.append, kind=kind)
        self.worker.ready = Ready("", 1000, 1 << 16, 8, 1000, 1000, 4, 0, 0, 0, rows=64)

    def take(self) -> list[FromOrchestrator]:
        taken, self.sent[:] = list(self.sent), []
        return taken


async def test_drafters_of_one_generation_come_and_go_without_the_others() -> None:
    target, a, b, later = Lent(1, "target"), Lent(2, "drafter", "a"), Lent(3, "drafter", "b"), Lent(4, "drafter", "a")
    knowledge = Knowledge(Config(target="T", drafter=("a", "b")), lambda role: [], lambda: 0)
    controller = Controller.with_one_drafter("dsi", 1, 1, Estimates(), rows=4)
    generation = Generation(
        1, GenerationCore((1, 2), policy=controller.begin(), max_tokens=400), Scheduler(), controller, knowledge,
        vocabulary_size=1000, sampling=Sampling(max_tokens=400), correlation="g", first_target_wait_s=3600.0,
        target_wait_s=3600.0, on_tokens=lambda tokens: None, on_end=lambda error: None,
    )  # fmt: skip
    task = asyncio.create_task(generation.run())
    await asyncio.sleep(0)

    def draft_of(lent: Lent) -> Draft:
        return next(message for message in lent.take() if isinstance(message, Draft))

    generation.receive(Granted(b.worker))
    assert controller.drafter == "b"
    of_b = draft_of(b)
    generation.receive(Granted(a.worker))
    assert controller.drafter == TOGETHER
    of_a = draft_of(a)
    assert (of_a.base, of_a.tokens, of_a.start) == (of_b.base, of_b.tokens, of_b.start) == (0, (1, 2), 2)
    generation.receive(Granted(target.worker))
    b.worker.on_reply(Drafted(1, of_b.attempt, 2, (7,), False, 0))
    a.worker.on_reply(Drafted(1, of_a.attempt, 2, (5,), False, 0))
    await asyncio.sleep(0)
    generation.receive(Withdrawn(a.worker))
    assert controller.drafter == "b"
    assert not [message for message in b.take() if isinstance(message, Cancel | CloseGeneration)], "it has not noticed"
    generation.receive(Granted(later.worker))
    assert controller.drafter == TOGETHER
    of_later = draft_of(later)
    assert of_later.tokens == (1, 2)
    later.worker.on_reply(Drafted(1, of_later.attempt, 2, (5,), False, 0))
    await asyncio.sleep(0)
    [verify] = [message for message in target.take() if isinstance(message, Verify)]
    target.worker.on_reply(Verified(1, verify.attempt, 2, (7,), (), 1, 100))  # what b said, and a did not
    await asyncio.sleep(0)
    again = draft_of(later)
    assert (again.base, again.tokens, again.start) == (2, (7,), 3)
    generation.receive(Reclaimed(b.worker))
    assert controller.drafter == "a"
    b.worker.on_reply(Drafted(1, of_b.attempt, 3, (7,), True, 0))
    await asyncio.sleep(0)
    generation.receive(Misbehaved(later.worker, "it lies"))
    generation.stop()
    await task
    assert generation.report is not None
    assert generation.report.drafter == "a"
    assert generation.report.alternatives == 1


async def test_what_to_do_with_workers_is_planned_once_all_are_lent() -> None:
    """The drafter comes first. With no server there yet SI was planned: the first verification waited for five drafts."""
    drafter, *targets = Lent(1, "drafter"), Lent(2, "target"), Lent(3, "target"), Lent(4, "target")
    known = Estimates(26.0, 26.0, 32, drafter_ms=2.5, calibrated_ms=26.0)
    controller = Controller.with_one_drafter("dsi", 3, None, known)
    planned: list[Policy] = []
    has_planned = asyncio.Event()

    def observe(number: int, what: Event | Action) -> None:
        if isinstance(what, PolicyChanged):
            planned.append(what.policy)
            has_planned.set()

    generation = Generation(
        1, GenerationCore((1, 2), policy=controller.begin(), max_tokens=400), Scheduler(), controller, NOTHING_KNOWN,
        vocabulary_size=1000, sampling=Sampling(max_tokens=400), correlation="g", first_target_wait_s=3600.0,
        target_wait_s=3600.0, on_tokens=lambda tokens: None, on_end=lambda error: None,
        observe=observe,
    )  # fmt: skip
    task = asyncio.create_task(generation.run())
    await asyncio.sleep(0)
    for lent in (drafter, *targets):
        generation.grant(lent.worker)
    await has_planned.wait()
    generation.stop()
    await task
    assert planned == [Tuner("dsi", 3, None, controller.estimates).choose()]


async def test_a_drafter_is_not_judged_while_it_reads_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed meanwhile is plain decoding, beside which somebody reads: it says nothing of what a drafter is worth."""
    counted: list[bool] = []
    monkeypatch.setattr(Controller, "committed", lambda self, *args, drafts, reads, drafters: counted.append(reads))
    target, drafter = Lent(1, "target"), Lent(2, "drafter")
    controller = Controller.with_one_drafter("dsi", 1, None, Estimates(20.0, 20.0, 8, drafter_ms=2.0))
    generation = Generation(
        1, GenerationCore((1, 2), policy=Policy.distributed(2, 1), max_tokens=40), Scheduler(), controller, NOTHING_KNOWN,
        vocabulary_size=1000, sampling=Sampling(max_tokens=40), correlation="g", first_target_wait_s=3600.0,
        target_wait_s=3600.0, on_tokens=lambda tokens: None, on_end=lambda error: None,
    )  # fmt: skip
    task = asyncio.create_task(generation.run())
    await asyncio.sleep(0)
    generation.receive(Granted(drafter.worker))
    generation.receive(Granted(target.worker))

    async def commit() -> None:
        asked = [message for message in target.sent if isinstance(message, Verify)][-1]
        target.worker.on_reply(Verified(1, asked.attempt, asked.start, (7,), (), 1, 20_000, False))
        await asyncio.sleep(0)

    await commit()
    await commit()
    asked = [message for message in drafter.sent if isinstance(message, Draft)][-1]
    drafter.worker.on_reply(Drafted(1, asked.attempt, asked.start, (9,), False, 2000))
    await commit()
    assert counted == [True, True, False]
    generation.stop()
    await task


async def test_messages_are_handled_while_a_better_policy_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, whole = 0, 5_000_000

    def long_search(tuner: Tuner) -> Steps[Policy | None]:
        nonlocal steps
        for _ in range(whole):
            steps += 1
            yield
        return None

    monkeypatch.setattr(Tuner, "retuning", long_search)
    target = Lent(1, "target")
    controller = Controller.with_one_drafter("dsi", 1, None, Estimates(20.0, 20.0, 8, drafter_ms=2.0))
    ended = asyncio.Event()
    generation = Generation(
        1, GenerationCore((1, 2), policy=controller.begin(), max_tokens=40), Scheduler(), controller, NOTHING_KNOWN,
        vocabulary_size=1000, sampling=Sampling(max_tokens=40), correlation="g", first_target_wait_s=3600.0,
        target_wait_s=3600.0, on_tokens=lambda tokens: None, on_end=lambda error: ended.set(),
    )  # fmt: skip
    task = asyncio.create_task(generation.run())
    await asyncio.sleep(0)
    generation.grant(target.worker)
    steps_at_answer: list[int] = []
    while not ended.is_set():
        asked = [message for message in target.sent if isinstance(message, Verify)]
        if len(asked) > len(steps_at_answer):
            steps_at_answer.append(steps)
            assert steps < whole, "the generation did not wait for the end of the search"
            target.worker.on_reply(Verified(1, asked[-1].attempt, asked[-1].start, (7,), (), 1, 20_000, False))
        await asyncio.sleep(0)
    assert steps_at_answer == sorted(set(steps_at_answer)), "it went on between any two of them"
    await task


@pytest.mark.parametrize("tops", [((), ()), ((5, 6), (-1.0,)), ((5, 1000), (-1.0, -2.0)), ((5, 6, 7), (-1.0,) * 3)])
async def test_a_server_that_tells_other_probable_tokens_than_were_asked_for_is_left(
    tops: tuple[tuple[int, ...], tuple[float, ...]],
) -> None:
    def answer(request: Verify) -> list[Verified]:
        return [Verified(request.generation, request.attempt, request.start, (5,), (-1.0,), 1, 1, False, *tops)]

    config = timed_config(listen="tcp://127.0.0.1:*", target_wait_s=0.0)
    async with (
        dsi_actors.Orchestrator(config) as orchestrator,
        running(orchestrator.endpoint, FakeWorker("target", answer)),
    ):
        assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
        with pytest.raises(dsi_actors.NoTargetError, match="1 tokens from 3"):
            await anext(orchestrator.generate(PROMPT, Sampling(top_logprobs=2)))

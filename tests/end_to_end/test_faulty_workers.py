"""Workers that lie, forget or say nothing cost time: the text stays the target's own, and no generation hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import zmq
import zmq.asyncio

import dsi_actors
from dsi_protocol import (
    Cancel,
    Cancelled,
    Draft,
    Drafted,
    Failed,
    FromWorker,
    Goodbye,
    Hello,
    Message,
    NeedPrefix,
    Verified,
    Verify,
    Welcome,
    decode,
    encode,
)
from support.fake_worker import Answer, FakeWorker, running, silent
from support.patience import limit_s, patience, slowness, until
from support.timed import PROMPT, plain_decoding, start_worker, text_of, timed_config

TOKENS = 30


@pytest.fixture
async def orchestrator(tmp_path: Path) -> AsyncIterator[dsi_actors.Orchestrator]:
    """One honest timed target server; what a test adds may misbehave. Who does not answer is found out soon: should the
    honest one be late, it is asked again, and never taken for dead."""
    config = timed_config(listen=f"ipc://{tmp_path}/dsi.sock", request_timeout_s=0.4 * slowness())
    async with dsi_actors.Orchestrator(config) as made:
        worker = start_worker(made.endpoint, "--role", "target")
        assert await made.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
        yield made
    worker.communicate(timeout=limit_s())


def drafted_far_away(request: Draft | Verify) -> Iterable[FromWorker]:
    assert isinstance(request, Draft)
    yield Drafted(request.generation, request.attempt, request.start + 1000, (1, 2), False, 1)


def drafted_unknown_tokens(request: Draft | Verify) -> Iterable[FromWorker]:
    assert isinstance(request, Draft)
    yield Drafted(request.generation, request.attempt, request.start, (4_000_000,) * request.count, True, 1)


def drafted_more_than_asked(request: Draft | Verify) -> Iterable[FromWorker]:
    assert isinstance(request, Draft)
    yield Drafted(request.generation, request.attempt, request.start, (1,) * (request.count + 5), True, 1)


def no_idea(request: Draft | Verify) -> Iterable[FromWorker]:
    yield Drafted(request.generation, request.attempt, request.start, (), True, 1)


def failed(request: Draft | Verify) -> Iterable[FromWorker]:
    yield Failed(request.generation, request.attempt, "engine", "it broke")


def cancelled_by_itself(request: Draft | Verify) -> Iterable[FromWorker]:
    yield Cancelled(request.generation, request.attempt, 0, 0)


def always_needs_prefix(request: Draft | Verify) -> Iterable[FromWorker]:
    yield NeedPrefix(request.generation, request.attempt, request.base)


def verified_elsewhere(request: Draft | Verify) -> Iterable[FromWorker]:
    yield Verified(request.generation, request.attempt, request.start + 1, (1,), (), 1, 1)


def verified_nothing(request: Draft | Verify) -> Iterable[FromWorker]:
    yield Verified(request.generation, request.attempt, request.start, (), (), 1, 1)


def verified_too_much(request: Draft | Verify) -> Iterable[FromWorker]:
    yield Verified(request.generation, request.attempt, request.start, (1,) * 50, (), 1, 1)


def verified_unknown_tokens(request: Draft | Verify) -> Iterable[FromWorker]:
    yield Verified(request.generation, request.attempt, request.start, (1000,), (), 1, 1)


class SlowDrafter(FakeWorker):
    """Each step takes longer than the time after which a silent worker is dead, and it looks for cancels in between only."""

    def __init__(self, step_s: float) -> None:
        super().__init__("drafter", silent)
        self.obeys_cancel = False
        self.steps = 0
        self._step_s = step_s

    async def react_slowly(self, message: Draft) -> AsyncIterator[FromWorker]:
        await asyncio.sleep(self._step_s)
        self.steps += 1
        yield Drafted(message.generation, message.attempt, message.start, (1,), False, 1)
        yield Cancelled(message.generation, message.attempt, 1, 1)


async def test_a_slow_drafter_is_not_taken_for_a_faulty_one(tmp_path: Path) -> None:
    silence_s = 0.5 * slowness()
    config = timed_config(listen=f"ipc://{tmp_path}/dsi.sock", sp=1, silence_ms=round(1000 * silence_s))
    drafter = SlowDrafter(2 * silence_s)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        honest = start_worker(orchestrator.endpoint, "--role", "target")
        async with running(orchestrator.endpoint, drafter):
            assert await orchestrator.wait_for_workers(targets=1, drafters=1, timeout_s=limit_s())
            [handle] = [worker for worker in orchestrator.workers if worker.role == "drafter"]
            sampling = dsi_actors.Sampling(max_tokens=TOKENS)
            while drafter.steps < 3:
                assert await text_of(orchestrator.generate(PROMPT, sampling)) == plain_decoding(PROMPT, TOKENS)
            assert handle in orchestrator.workers
            assert handle.faults == 0
    honest.communicate(timeout=limit_s())


@pytest.mark.parametrize("algorithm", ["si", "dsi"])
@pytest.mark.parametrize("vocabulary", ["timed-1000", ""])
@pytest.mark.parametrize(
    "answer",
    [
        drafted_far_away, drafted_unknown_tokens, drafted_more_than_asked, no_idea, failed, cancelled_by_itself,
        always_needs_prefix, silent,
    ],
)  # fmt: skip
async def test_a_faulty_drafter(
    orchestrator: dsi_actors.Orchestrator, answer: Answer, algorithm: dsi_actors.config.Algorithm, vocabulary: str
) -> None:
    async with running(orchestrator.endpoint, FakeWorker("drafter", answer, vocabulary=vocabulary)):
        assert await orchestrator.wait_for_workers(targets=1, drafters=1, timeout_s=limit_s())
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS), algorithm=algorithm, lookahead=2)
        async with patience():
            assert await text_of(stream) == plain_decoding(PROMPT, TOKENS)
        assert [worker.role for worker in orchestrator.workers if worker.hello.host != "fake"] == ["target"]
        assert all(not worker._in_flight for worker in orchestrator.workers if worker.role == "target")


def drafted_with_a_gap(request: Draft | Verify) -> Iterable[FromWorker]:
    """As if the second of three blocks was lost."""
    assert isinstance(request, Draft)
    for start in range(request.start, request.start + request.count):
        if start != request.start + 1:
            done = start + 1 == request.start + request.count
            yield Drafted(request.generation, request.attempt, start, (1,), done, 1)


@pytest.mark.parametrize("algorithm", ["si", "dsi"])
async def test_a_lost_block_of_drafts_is_no_fault_of_the_drafter(
    orchestrator: dsi_actors.Orchestrator, algorithm: dsi_actors.config.Algorithm
) -> None:
    """The drafter is asked again, from the gap on."""
    drafter = FakeWorker("drafter", drafted_with_a_gap)
    async with running(orchestrator.endpoint, drafter):
        assert await orchestrator.wait_for_workers(targets=1, drafters=1, timeout_s=limit_s())
        [handle] = [worker for worker in orchestrator.workers if worker.role == "drafter"]
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS), algorithm=algorithm, lookahead=4)
        async with patience():
            assert await text_of(stream) == plain_decoding(PROMPT, TOKENS)
        asked = [message for message in drafter.heard if isinstance(message, Draft)]
        assert len(asked) > 1
        assert (handle.faults, handle.lost) == (0, False)


class Unfit(FakeWorker):
    """It cannot be what it is asked to be."""

    def _react(self, message: Message) -> Iterable[FromWorker]:
        if isinstance(message, Welcome):
            return (Failed(0, 0, "load", f"it does not have the engine {message.engine!r}"),)
        return ()


async def test_a_worker_that_cannot_be_what_it_is_asked_to_be_is_dropped(orchestrator: dsi_actors.Orchestrator) -> None:
    unfit = Unfit("target", silent)
    async with running(orchestrator.endpoint, unfit):
        assert await until(unfit.dismissed) == "it left", "its heart beats on, and it is told to go"
        assert [worker.hello.host for worker in orchestrator.workers if worker.hello.host == "fake"] == []
        sampling = dsi_actors.Sampling(max_tokens=5)
        assert await text_of(orchestrator.generate(PROMPT, sampling)) == plain_decoding(PROMPT, 5)
    assert not any(isinstance(message, Draft | Verify) for message in unfit.heard)


@pytest.mark.parametrize(
    "answer",
    [
        verified_elsewhere, verified_nothing, verified_too_much, verified_unknown_tokens, failed, cancelled_by_itself,
        always_needs_prefix, silent,
    ],
)  # fmt: skip
async def test_a_faulty_target_server_beside_an_honest_one(
    orchestrator: dsi_actors.Orchestrator, answer: Answer
) -> None:
    async with running(orchestrator.endpoint, FakeWorker("target", answer)):
        assert await orchestrator.wait_for_workers(targets=2, drafters=0, timeout_s=limit_s())
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS), algorithm="dsi", sp=2)
        async with patience():
            assert await text_of(stream) == plain_decoding(PROMPT, TOKENS)


@pytest.mark.parametrize(("answer", "problem"), [(failed, "it broke"), (silent, "start another worker")])
async def test_a_faulty_target_server_alone_ends_the_generation_with_its_reason(
    tmp_path: Path, answer: Answer, problem: str
) -> None:
    config = timed_config(listen=f"ipc://{tmp_path}/dsi.sock", target_wait_s=0.2)
    if answer is silent:  # it does not even answer a cancel, and is taken for dead
        config = replace(config, request_timeout_s=0.2, silence_ms=round(500 * slowness()))
    worker = FakeWorker("target", answer)
    worker.obeys_cancel = False
    async with dsi_actors.Orchestrator(config) as orchestrator, running(orchestrator.endpoint, worker), patience():
        with pytest.raises(dsi_actors.NoTargetError, match=problem):
            await text_of(orchestrator.generate(PROMPT))


async def test_target_servers_that_compute_other_bits_are_not_mixed(tmp_path: Path) -> None:
    """A text would depend on who answers."""

    def lies(request: Draft | Verify) -> Iterable[FromWorker]:
        yield Verified(request.generation, request.attempt, request.start, (7,), (), 1, 1)

    config = timed_config(listen=f"ipc://{tmp_path}/dsi.sock", sp=3)
    first, same, unsaid, other = (FakeWorker("target", lies, fingerprint=number) for number in (5, 5, 0, 6))
    async with dsi_actors.Orchestrator(config) as orchestrator, running(orchestrator.endpoint, first):
        assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
        async with running(orchestrator.endpoint, same), running(orchestrator.endpoint, unsaid):
            assert await orchestrator.wait_for_workers(targets=3, drafters=0, timeout_s=limit_s())
            async with running(orchestrator.endpoint, other):
                assert "different bits" in await until(other.dismissed)
                assert len(orchestrator.workers) == 3


async def test_once_they_have_left_other_target_servers_may_come(tmp_path: Path) -> None:
    """Not at once: those that left might come back."""
    config = timed_config(listen=f"ipc://{tmp_path}/dsi.sock", silence_ms=round(500 * slowness()))
    async with dsi_actors.Orchestrator(config) as orchestrator:
        assert orchestrator._root is not None
        orchestrator._root.workforce._compatibility._memory_s = 0.3
        async with running(orchestrator.endpoint, FakeWorker("target", silent, fingerprint=5)):
            await until(lambda: orchestrator.workers)
        await until(lambda: not orchestrator.workers)
        async with patience():
            while not orchestrator.workers:
                other = FakeWorker("target", silent, fingerprint=6)
                async with running(orchestrator.endpoint, other):
                    while not orchestrator.workers and not other.dismissed():  # noqa: ASYNC110
                        await asyncio.sleep(0.005)


def token_at(request: Draft | Verify) -> Iterable[FromWorker]:
    """The target's token at each position is the position."""
    yield Verified(request.generation, request.attempt, request.start, (request.start,), (), 1, 1)


@pytest.mark.parametrize("lost", ["once", "for ever"])
async def test_a_lost_reply_is_asked_for_again(tmp_path: Path, lost: str) -> None:
    """The heart beats, one answer never came. The worker is asked again; at last it answers a cancel, and the next request."""
    asked: list[int] = []

    def forgetful(request: Draft | Verify) -> Iterable[FromWorker]:
        asked.append(request.attempt)
        if request.attempt == 3 and (lost == "for ever" or asked.count(3) == 1):
            return ()
        return token_at(request)

    seconds = 0.3 * slowness()
    config = timed_config(listen=f"ipc://{tmp_path}/dsi.sock")
    config = (
        replace(config, silence_ms=round(2e3 * seconds))
        if lost == "once"
        else replace(config, request_timeout_s=seconds)
    )
    worker = FakeWorker("target", forgetful)
    async with dsi_actors.Orchestrator(config) as orchestrator, running(orchestrator.endpoint, worker), patience():
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=5), algorithm="ar")
        assert await text_of(stream) == [3, 4, 5, 6, 7]
    if lost == "once":
        assert asked.count(3) > 1
    else:
        assert any(isinstance(message, Cancel) and message.attempt == 3 for message in worker.heard)


async def test_a_hello_that_quotes_too_much_is_refused_and_harms_nobody(orchestrator: dsi_actors.Orchestrator) -> None:
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(orchestrator.endpoint)
        for role, model in (("target", "x" * 4090), ("y" * 4090, "")):
            await stranger.send(encode(Hello(1, 5, role, "auto", model, "cpu:0", "elsewhere", 1)))
            async with patience():
                assert isinstance(decode(await stranger.recv()), Goodbye)
    sampling = dsi_actors.Sampling(max_tokens=5)
    assert await text_of(orchestrator.generate(PROMPT, sampling)) == plain_decoding(PROMPT, 5)


async def test_a_hello_is_answered_as_often_as_it_comes(orchestrator: dsi_actors.Orchestrator) -> None:
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(orchestrator.endpoint)
        for _ in range(2):
            await peer.send(encode(Hello(1, 6, "target", "auto", "", "cpu:0", "elsewhere", 1)))
            async with patience():
                assert isinstance(decode(await peer.recv()), Welcome)


async def test_a_generation_in_line_waits_for_busy_servers(tmp_path: Path) -> None:
    config = timed_config(sp=1, drafter=None, listen=f"ipc://{tmp_path}/s", target_ms=30)
    config = replace(config, target_options={**config.target_options, "slots": 1})
    async with dsi_actors.Orchestrator(config) as orchestrator:
        worker = start_worker(orchestrator.endpoint)
        assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
        orchestrator.config = replace(config, ready_timeout_s=0.1)  # shorter than a generation takes, from here on
        sampling = dsi_actors.Sampling(max_tokens=40)
        texts = await asyncio.gather(*(text_of(orchestrator.generate(PROMPT, sampling)) for _ in range(2)))
        assert texts == [plain_decoding(PROMPT, 40)] * 2
    worker.communicate(timeout=limit_s())


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


@pytest.mark.parametrize("ticks", range(6))
async def test_a_start_that_is_cancelled_leaves_no_process(ticks: int) -> None:
    before = children()
    starting = asyncio.create_task(dsi_actors.Orchestrator(timed_config()).__aenter__())
    while children() == before:  # noqa: ASYNC110  what is waited for is a process
        await asyncio.sleep(0)
    for _ in range(ticks):
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children() <= before


async def test_an_orchestrator_that_ends_at_once_gives_its_address_back() -> None:
    """Before any of its actors took a step."""
    async with dsi_actors.Orchestrator(timed_config(listen="tcp://127.0.0.1:*")) as first:
        endpoint = first.endpoint
    async with dsi_actors.Orchestrator(timed_config(listen=endpoint)):
        pass


async def turns_of_the_loop() -> None:
    """Tasks that were made run until they wait for something from outside."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_closing_ends_streams_that_wait_for_a_first_target(tmp_path: Path) -> None:
    async with dsi_actors.Orchestrator(timed_config(listen=f"ipc://{tmp_path}/s")) as orchestrator:
        reading = asyncio.create_task(text_of(orchestrator.generate(PROMPT)))
        waiting = asyncio.create_task(orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=3600))
        await turns_of_the_loop()
    async with patience():
        for task in (reading, waiting):
            with pytest.raises(dsi_actors.OrchestratorClosed):
                await task
    with pytest.raises(dsi_actors.OrchestratorClosed):
        await text_of(orchestrator.generate(PROMPT))


async def test_a_stream_closed_before_its_start_never_starts(tmp_path: Path) -> None:
    async with dsi_actors.Orchestrator(timed_config(listen=f"ipc://{tmp_path}/s")) as orchestrator:
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=5))
        reading = asyncio.create_task(text_of(stream))
        await turns_of_the_loop()
        await stream.aclose()
        target = FakeWorker("target", failed)
        async with running(orchestrator.endpoint, target):
            assert await reading == []
        assert not any(isinstance(message, Verify) for message in target.heard)


@pytest.mark.parametrize("correlation", ["x" * 5000, "line\nbreak", "\ud800"])
async def test_a_correlation_that_cannot_travel_is_refused(
    orchestrator: dsi_actors.Orchestrator, correlation: str
) -> None:
    with pytest.raises(dsi_actors.ConfigError, match="correlation must be printable text"):
        orchestrator.generate(PROMPT, correlation=correlation)


@pytest.mark.parametrize("options", [{"a": None}, {"a": [1]}, {"a": 1 << 70}, {"a": "x" * 5000}])
def test_options_that_cannot_travel_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(dsi_actors.ConfigError, match="a setting cannot be told to a worker"):
        dsi_actors.Config(target_options=options)  # type: ignore[arg-type]


@pytest.mark.parametrize("lost", [0, 1, 3])
async def test_a_lost_answer_of_a_server_that_goes_on_is_no_fault_of_it(tmp_path: Path, lost: int) -> None:
    """What stands behind it is not used. The server is asked again, from what is committed on, and may go on after that."""
    asked: list[Verify] = []
    computing: list[Verify] = []

    def goes_on(request: Draft | Verify) -> Iterable[FromWorker]:
        assert isinstance(request, Verify)
        while computing:
            yield Cancelled(request.generation, computing.pop().attempt, 0, 0)
        first, last = request.start, request.start + request.ahead
        answers = range(first, last + 1)
        if not asked:  # the last answer is not ready when the next request comes
            answers = range(first, last)
            computing.append(request)
        for position in answers:
            if asked or position != first + lost:
                yield Verified(request.generation, request.attempt, position, (position,), (), 1, 1, position < last)
        asked.append(request)

    worker = FakeWorker("target", goes_on)
    config = timed_config(listen=f"ipc://{tmp_path}/dsi.sock")
    async with dsi_actors.Orchestrator(config) as orchestrator, running(orchestrator.endpoint, worker), patience():
        assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
        [handle] = orchestrator.workers
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=8), algorithm="ar")
        assert await text_of(stream) == list(range(3, 11))
        assert (handle.faults, handle.lost) == (0, False)
        assert [(request.start, request.ahead) for request in asked] == [(3, 7), (3 + lost, 0), (4 + lost, 6 - lost)]


async def test_a_server_that_goes_on_for_ever_is_sent_away(orchestrator: dsi_actors.Orchestrator) -> None:
    def endless(request: Draft | Verify) -> Iterable[FromWorker]:
        for position, token in enumerate(plain_decoding(PROMPT, 60)[request.start - 3 :], request.start):
            yield Verified(request.generation, request.attempt, position, (token,), (), 1, 1, True)

    async with running(orchestrator.endpoint, FakeWorker("target", endless)):
        assert await orchestrator.wait_for_workers(targets=2, drafters=0, timeout_s=limit_s())
        async with patience():
            for _ in range(4):
                stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS), algorithm="dsi", sp=2)
                assert await text_of(stream) == plain_decoding(PROMPT, TOKENS)


async def test_a_worker_that_has_not_left_is_dismissed_again(tmp_path: Path) -> None:
    """One that has no time yet to read that its orchestrator ends may lose the first message with the connection."""
    endpoint = f"ipc://{tmp_path}/dsi.sock"
    stays = FakeWorker("target", lambda request: (), vocabulary="timed-1000")
    async with running(endpoint, stays):
        async with dsi_actors.Orchestrator(timed_config(listen=endpoint)) as orchestrator:
            assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
        async with patience():
            await until(lambda: sum(isinstance(message, Goodbye) for message in stays.heard) > 2)

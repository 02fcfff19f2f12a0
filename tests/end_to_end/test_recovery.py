"""Workers die, hang and come back at every moment of a generation: the text is the same, and the workers are back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

import dsi_actors
from dsi_actors.core.actions import Action
from dsi_actors.core.events import DraftsArrived, DraftsLate, Event
from dsi_actors.launching.launcher import WorkerSpec
from dsi_actors.supervision.supervisor import SupervisorMessage, WorkerSupervisor
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_actors.workforce.workforce import Workforce
from dsi_protocol import Draft, Goodbye, Verify
from support.connections import Relay, listening
from support.patience import limit_s, patience, slowness, until
from support.timed import PROMPT, gone, plain_decoding, start_worker, text_of, timed_config, workers

TOKENS = 40


def detection_ms() -> int:
    """Silence that means death, and never befalls a worker that is only kept waiting for a processor."""
    return round(1000 * slowness())


@pytest.fixture
async def orchestrator() -> AsyncIterator[dsi_actors.Orchestrator]:
    async with dsi_actors.Orchestrator(timed_config(target_ms=12, drafter_ms=3, silence_ms=detection_ms())) as running:
        yield running


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[WorkerSpec]:
    """Every worker that a supervisor has decided to start, or to start again."""
    start, found = WorkerSupervisor._start, list[WorkerSpec]()

    def noted(self: WorkerSupervisor, slot: Any, delay_s: float = 0.0) -> Coroutine[Any, Any, SupervisorMessage]:
        found.append(slot.spec)
        return start(self, slot, delay_s)

    monkeypatch.setattr(WorkerSupervisor, "_start", noted)
    return found


async def until_it_has_ended(orchestrator: dsi_actors.Orchestrator, worker: WorkerHandle) -> None:
    """Its supervisor has buried it, and so decided whether it is started again."""
    await until(lambda: worker.lost and worker.hello.process not in orchestrator.process_ids)


def busy(worker: WorkerHandle) -> bool:
    wanted = Verify if worker.role == "target" else Draft
    return any(isinstance(flight.request, wanted) for flight in worker._in_flight.values())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("phase", ["idle", "prompt", "working", "last tokens"])
@pytest.mark.parametrize("role", ["target", "drafter"])
async def test_a_worker_may_die_at_any_moment(
    orchestrator: dsi_actors.Orchestrator, role: str, phase: str, how: signal.Signals
) -> None:
    victim = next(worker for worker in orchestrator.workers if worker.role == role)
    before = set(orchestrator.process_ids)
    text: list[int] = []

    async def read() -> None:
        async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)):
            text.extend(tokens)

    if phase == "idle":
        os.kill(victim.hello.process, how)
    reading = asyncio.create_task(read())
    at_least = {"idle": 0, "prompt": 0, "working": 10, "last tokens": TOKENS - 4}[phase]
    if phase != "idle":
        await until(lambda: len(text) >= at_least and (busy(victim) or reading.done()))
        os.kill(victim.hello.process, how)
    async with patience():
        await reading
    assert text == plain_decoding(PROMPT, TOKENS)
    await until(lambda: victim.lost)
    assert await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=limit_s()), "it is started again"
    await until(lambda: gone([victim.hello.process]))  # and what hangs is fenced
    assert len(set(orchestrator.process_ids) - before) == 1
    assert await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS))) == text


async def test_all_workers_die_at_once(orchestrator: dsi_actors.Orchestrator) -> None:
    text: list[int] = []
    async with patience():
        async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)):
            text.extend(tokens)
            if len(text) > 10 and len(text) - len(tokens) <= 10:
                for process in orchestrator.process_ids:
                    os.kill(process, signal.SIGKILL)
    assert text == plain_decoding(PROMPT, TOKENS)


async def test_a_drafter_that_is_back_drafts_again(orchestrator: dsi_actors.Orchestrator) -> None:
    victim = next(worker for worker in orchestrator.workers if worker.role == "drafter")
    os.kill(victim.hello.process, signal.SIGKILL)
    await until(lambda: victim.lost)
    async with patience(), orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=100_000)) as stream:
        assert not any((await anext(stream)).accepted), "it began without a drafter"
        async for tokens in stream:
            if any(tokens.accepted):
                break
        else:
            pytest.fail("it never went on with one")


@pytest.mark.parametrize("algorithm", ["si", "dsi"])
async def test_a_drafter_that_hangs_costs_speed_only(algorithm: Any) -> None:
    """It is stopped, and not found dead for long: it is waited for once, not at each token."""
    happened: list[Event | Action] = []
    async with dsi_actors.Orchestrator(timed_config(target_ms=10, drafter_ms=2)) as orchestrator:
        [drafter] = [worker for worker in orchestrator.workers if worker.role == "drafter"]
        orchestrator.observe(lambda generation, item: happened.append(item))
        text: list[int] = []
        async with patience():
            async for tokens in orchestrator.generate(
                PROMPT, dsi_actors.Sampling(max_tokens=60), algorithm=algorithm, lookahead=4
            ):
                text.extend(tokens)
                if len(text) > 10 and len(text) - len(tokens) <= 10:
                    os.kill(drafter.hello.process, signal.SIGSTOP)
                    del happened[:]
        os.kill(drafter.hello.process, signal.SIGCONT)
        assert not drafter.lost
        assert text == plain_decoding(PROMPT, 60)
        waits = sum(isinstance(item, DraftsLate) for item in happened)
        last_drafts = sum(isinstance(item, DraftsArrived) for item in happened)  # they were on their way
        assert waits <= 1 + last_drafts


async def test_a_worker_that_dies_too_often_is_left_dead(starts: list[WorkerSpec]) -> None:
    async with dsi_actors.Orchestrator(timed_config(restarts=1)) as orchestrator:
        for left in (3, 2):
            victim = next(worker for worker in orchestrator.workers if worker.role == "drafter")
            os.kill(victim.hello.process, signal.SIGKILL)
            await until_it_has_ended(orchestrator, victim)
            async with patience():
                while len(orchestrator.workers) != left:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        assert [spec.role for spec in starts[3:]] == ["drafter"], "it was started again once"
        assert [worker.role for worker in orchestrator.workers] == ["target", "target"]
        text = await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)))
        assert text == plain_decoding(PROMPT, TOKENS)


async def test_a_worker_that_is_not_like_the_others_is_not_started_again(starts: list[WorkerSpec]) -> None:
    """It would be the same, and its load would take from those that work."""
    async with dsi_actors.Orchestrator(timed_config()) as orchestrator:
        assert orchestrator._root is not None
        given_up, other = (worker for worker in orchestrator.workers if worker.role == "target")
        given_up.incompatible = True
        orchestrator._root.workforce._drop(given_up, Goodbye("it is not like the others"))
        os.kill(other.hello.process, signal.SIGKILL)
        for worker in (given_up, other):
            await until_it_has_ended(orchestrator, worker)
        assert len(starts) == 3 + 1
        assert await orchestrator.wait_for_workers(targets=1, drafters=1, timeout_s=limit_s())


async def test_a_worker_that_is_asked_to_leave_is_not_started_again(
    starts: list[WorkerSpec], orchestrator: dsi_actors.Orchestrator
) -> None:
    victim = next(worker for worker in orchestrator.workers if worker.role == "target")
    os.kill(victim.hello.process, signal.SIGTERM)
    text = await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)))
    assert text == plain_decoding(PROMPT, TOKENS)
    await until_it_has_ended(orchestrator, victim)
    assert len(starts) == 3
    assert len(orchestrator.process_ids) == 2


async def test_a_worker_that_was_taken_for_dead_ends_when_it_wakes(tmp_path: Any) -> None:
    """One that nobody here can kill: on another machine. What it had to say comes too late."""
    config = timed_config(listen=f"ipc://{tmp_path}/dsi.sock", silence_ms=detection_ms())
    async with dsi_actors.Orchestrator(config) as orchestrator:
        started = [start_worker(orchestrator.endpoint, "--role", role) for role in ("target", "target", "drafter")]
        assert await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=limit_s())
        text: list[int] = []
        async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=300)):
            text.extend(tokens)
            if len(text) > 10 and len(text) - len(tokens) <= 10:
                os.kill(started[0].pid, signal.SIGSTOP)
        await until(lambda: len(orchestrator.workers) == 2)
        os.kill(started[0].pid, signal.SIGCONT)
        assert text == plain_decoding(PROMPT, 300)
        await asyncio.to_thread(started[0].wait, limit_s())
        assert len(orchestrator.workers) == 2
    for worker in started:
        worker.communicate(timeout=limit_s())


async def test_a_connection_that_breaks_costs_a_moment_and_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker reconnects and stays the same; what was lost on the way is sent again."""
    monkeypatch.setattr("dsi_actors.workforce.members._RECONNECT_S", 600.0)  # it comes back in time, however slowly
    config = timed_config(listen="tcp://127.0.0.1:*", silence_ms=detection_ms(), drafter=None)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        relay = Relay(orchestrator.endpoint.removeprefix("tcp://"))
        async with listening(relay.answer) as relayed:
            with workers(f"tcp://{relayed}", ["--role", "target"]):
                assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
                [before] = orchestrator.workers
                text: list[int] = []
                async with patience():
                    async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=200)):
                        text.extend(tokens)
                        if len(text) in (30, 100):
                            relay.cut()
                assert text == plain_decoding(PROMPT, 200)
                relay.interrupted = True
                relay.cut()
                assert orchestrator._root is not None
                [member] = orchestrator._root.workforce._members

                def is_unreachable() -> bool:
                    before.close(1)  # the last word for a while, and it is lost
                    return member.unreachable_s is not None

                await until(is_unreachable)
                relay.interrupted = False
                await until(lambda: member.unreachable_s is None)
                assert orchestrator.workers == [before], "also one that is idle"


async def test_a_process_that_cannot_be_made_is_tried_again(
    orchestrator: dsi_actors.Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = asyncio.create_subprocess_exec, 2

    async def fail_twice(*words: Any, **options: Any) -> asyncio.subprocess.Process:
        nonlocal failures
        if failures:
            failures -= 1
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await real(*words, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail_twice)
    victim = next(worker for worker in orchestrator.workers if worker.role == "target")
    os.kill(victim.hello.process, signal.SIGKILL)
    await until(lambda: victim.lost)
    assert await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=limit_s())
    assert failures == 0


async def test_a_generation_is_resumed_wherever_it_was_cut(orchestrator: dsi_actors.Orchestrator) -> None:
    sampling = dsi_actors.Sampling(max_tokens=TOKENS, temperature=0.7, seed=3)
    whole = await text_of(orchestrator.generate(PROMPT, sampling))
    for cut in (0, 1, 17, TOKENS - 1, TOKENS):
        stream = orchestrator.generate(PROMPT, sampling, resumed=whole[:cut])
        assert await text_of(stream) == whole[cut:]
        report = await stream.report()
        assert (report.tokens, report.finish_reason) == (TOKENS - cut, "length")


async def test_an_error_carries_what_a_resumption_needs() -> None:
    sampling = dsi_actors.Sampling(max_tokens=TOKENS)
    text: list[int] = []
    async with dsi_actors.Orchestrator(timed_config(target_wait_s=0.1, restarts=0)) as orchestrator:
        with pytest.raises(dsi_actors.NoTargetError) as caught:  # noqa: PT012  it comes in the middle
            async for tokens in orchestrator.generate(PROMPT, sampling):
                text.extend(tokens)
                for worker in orchestrator.workers:
                    if worker.role == "target":
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(worker.hello.process, signal.SIGKILL)
    assert 0 < len(text) < TOKENS
    assert list(caught.value.token_ids) == text
    async with dsi_actors.Orchestrator(timed_config()) as orchestrator:
        rest = await text_of(orchestrator.generate(PROMPT, sampling, resumed=caught.value.token_ids))
    assert text + rest == plain_decoding(PROMPT, TOKENS)


@pytest.mark.parametrize(
    ("resumed", "problem"),
    [
        ([1] * (TOKENS + 1), f"{TOKENS + 1} tokens are resumed, over max_tokens {TOKENS}"),
        ([1, 5, 2], "the resumed tokens go on after the stop token 5"),
        ([1, 5000], "token 5000 is outside the target's vocabulary"),
    ],
)
async def test_what_cannot_be_resumed_is_named(
    orchestrator: dsi_actors.Orchestrator, resumed: list[int], problem: str
) -> None:
    sampling = dsi_actors.Sampling(max_tokens=TOKENS, stop_token_ids=(5,))
    with pytest.raises(dsi_actors.ConfigError, match=problem):
        await text_of(orchestrator.generate(PROMPT, sampling, resumed=resumed))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a workforce has looked for workers that are silent."""
    look, found = Workforce._look_after_workers, list[float]()

    def noted(self: Workforce, now_s: float) -> None:
        found.append(now_s)
        look(self, now_s)

    monkeypatch.setattr(Workforce, "_look_after_workers", noted)
    return found


async def test_an_orchestrator_that_stood_still_blames_nobody(
    orchestrator: dsi_actors.Orchestrator, looks: list[float]
) -> None:
    reading = asyncio.create_task(text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS))))
    await until(lambda: any(busy(worker) for worker in orchestrator.workers))
    before = set(orchestrator.process_ids)
    time.sleep(2 * detection_ms() / 1e3)  # noqa: ASYNC251  a service that blocks its event loop
    del looks[:]
    assert await reading == plain_decoding(PROMPT, TOKENS)
    await until(lambda: len(looks) > 3)
    assert set(orchestrator.process_ids) == before
    assert len(orchestrator.workers) == 3


async def test_it_may_stand_still_just_when_it_looks_for_the_silent(
    orchestrator: dsi_actors.Orchestrator, looks: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, sleep, blocked = asyncio.get_running_loop(), asyncio.sleep, asyncio.Event()

    async def sleep_then_block(delay_s: float) -> None:
        task = asyncio.current_task()
        await sleep(delay_s)
        if task is not None and task.get_name() == "workforce" and not blocked.is_set():
            blocked.set()
            loop.call_soon(time.sleep, 2 * detection_ms() / 1e3)  # after the clock has rung, before anybody heard it

    before = set(orchestrator.process_ids)
    monkeypatch.setattr("asyncio.sleep", sleep_then_block)
    async with patience():
        await blocked.wait()
    del looks[:]
    await until(lambda: len(looks) > 3)
    assert set(orchestrator.process_ids) == before
    assert len(orchestrator.workers) == 3

"""Real worker processes with the timed engine, real sockets, the real orchestrator."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
from collections.abc import AsyncIterator
from typing import Any, Literal

import pytest
import zmq

import dsi_actors
from dsi_actors.config import Algorithm
from dsi_actors.core.actions import Action, StartVerify, VerifyGoesOn
from dsi_actors.core.events import Event
from dsi_protocol import Cancelled, Hello, Reply, Verify, encode
from support.patience import patience, until
from support.timed import PROMPT, gone, plain_decoding, text_of, timed_config

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture
async def orchestrator() -> AsyncIterator[dsi_actors.Orchestrator]:
    async with dsi_actors.Orchestrator(timed_config(sp=3)) as running:
        yield running


async def test_every_algorithm_gives_the_targets_own_text(orchestrator: dsi_actors.Orchestrator) -> None:
    expected = plain_decoding(PROMPT, 50)
    cases: list[tuple[Algorithm, int, int]] = [("ar", 1, 1), ("si", 1, 3), ("dsi", 1, 2), ("dsi", 2, 1), ("dsi", 3, 4)]
    for algorithm, sp, lookahead in cases:
        stream = orchestrator.generate(
            PROMPT, dsi_actors.Sampling(max_tokens=50), algorithm=algorithm, sp=sp, lookahead=lookahead
        )
        assert await text_of(stream) == expected, algorithm
        report = await stream.report()
        assert (report.algorithm, report.sp, report.tokens, report.finish_reason) == (algorithm, sp, 50, "length")
        if algorithm == "ar":
            assert (report.target_forwards, report.wasted_target_forwards, report.drafted_tokens) == (50, 0, 0)
        else:
            assert 0.3 < report.acceptance_rate <= 1
            assert report.target_forwards - report.wasted_target_forwards < 50


async def test_plain_decoding_is_one_request(orchestrator: dsi_actors.Orchestrator) -> None:
    seen: list[Event | Action] = []
    with orchestrator.observe(lambda _, item: seen.append(item)):
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=50), algorithm="ar")
        assert await text_of(stream) == plain_decoding(PROMPT, 50)
    assert sum(isinstance(item, StartVerify) for item in seen) == 1
    assert sum(isinstance(item, VerifyGoesOn) for item in seen) == 49


async def test_a_server_that_dies_while_it_goes_on_by_itself_costs_time_only(
    orchestrator: dsi_actors.Orchestrator,
) -> None:
    text: list[int] = []
    killed = 0
    async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=60), algorithm="ar"):
        text.extend(tokens)
        busy = [worker for worker in orchestrator.workers if worker.role == "target" and worker._in_flight]
        if len(text) in (10, 25) and busy:
            os.kill(busy[0].hello.process, signal.SIGKILL)
            killed += 1
    assert killed == 2
    assert text == plain_decoding(PROMPT, 60)


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
async def test_the_worst_and_the_best_drafter(acceptance: float) -> None:
    async with dsi_actors.Orchestrator(timed_config(acceptance=acceptance)) as orchestrator:
        stream = orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=30))
        assert await text_of(stream) == plain_decoding(PROMPT, 30)
        assert (await stream.report()).acceptance_rate == acceptance


async def test_a_stop_token_is_the_last_one(orchestrator: dsi_actors.Orchestrator) -> None:
    expected = plain_decoding(PROMPT, 40)
    sampling = dsi_actors.Sampling(max_tokens=40, stop_token_ids=(expected[17],))
    stream = orchestrator.generate(PROMPT, sampling)
    assert await text_of(stream) == expected[: expected.index(expected[17]) + 1]
    assert (await stream.report()).finish_reason == "stop"


async def test_several_generations_share_the_workers(orchestrator: dsi_actors.Orchestrator) -> None:
    prompts = [[*PROMPT, number] for number in range(5)]
    streams = [orchestrator.generate(prompt, dsi_actors.Sampling(max_tokens=20)) for prompt in prompts]
    texts = await asyncio.gather(*(text_of(stream) for stream in streams))
    assert texts == [plain_decoding(prompt, 20) for prompt in prompts]


async def test_who_comes_later_need_not_wait_for_the_end() -> None:
    """One generation has both servers; a second one gets one of them at once, and gives it back at its end."""
    async with dsi_actors.Orchestrator(timed_config(target_ms=10, drafter_ms=2)) as orchestrator:
        async with orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=200_000)) as endless:
            text = list(await anext(endless))
            short = orchestrator.generate([7, 8], dsi_actors.Sampling(max_tokens=20))
            async with patience():
                assert await text_of(short) == plain_decoding([7, 8], 20)
                while len(text) < 100:
                    text += await anext(endless)
        assert text == plain_decoding(PROMPT, len(text))


@pytest.mark.parametrize("how", ["leave the loop", "cancel the task", "close the stream"])
async def test_leaving_cancels_everything_down_to_the_forward(how: str) -> None:
    """The forward in progress would take an hour; the workers are free again at once."""
    async with dsi_actors.Orchestrator(timed_config(target_ms=3_600_000, drafter_ms=20)) as orchestrator:

        async def until_a_forward_runs() -> None:
            targets = [worker for worker in orchestrator.workers if worker.role == "target"]
            await until(lambda: any(worker._in_flight for worker in targets))

        async def read() -> None:
            async for _ in orchestrator.generate(PROMPT):
                pass

        if how == "cancel the task":
            task = asyncio.create_task(read())
            await until_a_forward_runs()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            stream = orchestrator.generate(PROMPT)
            first = asyncio.ensure_future(anext(stream))
            await until_a_forward_runs()
            if how == "close the stream":
                await stream.aclose()
            first.cancel()
            with pytest.raises((asyncio.CancelledError, StopAsyncIteration)):
                await first
            del stream
        for worker in orchestrator.workers:
            if worker.role == "target":
                # A cancelled request is answered at once by a worker that is free, in an hour by one that is not.
                worker.open(1 << 40, 3, "probe", dsi_actors.Sampling())
                worker.cancel(1 << 40, 1)
                answer: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
                worker.verify(Verify(1 << 40, 1, 0, 0, (1, 2, 3), 3), answer.set_result)
                async with patience():
                    assert isinstance(await answer, Cancelled)


async def test_breaking_out_of_the_loop_ends_the_generation(orchestrator: dsi_actors.Orchestrator) -> None:
    async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=10_000)):
        assert tokens
        break
    assert await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=5))) == plain_decoding(PROMPT, 5)


@pytest.mark.parametrize("role", ["target", "drafter"])
async def test_a_worker_that_dies_costs_time_only(orchestrator: dsi_actors.Orchestrator, role: str) -> None:
    victim = next(worker.hello.process for worker in orchestrator.workers if worker.role == role)
    text: list[int] = []
    async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=60)):
        text.extend(tokens)
        if len(text) > 10 and victim:
            os.kill(victim, signal.SIGKILL)
            victim = 0
    assert text == plain_decoding(PROMPT, 60)


async def test_without_any_target_a_generation_ends_with_what_it_has() -> None:
    text: list[int] = []

    async def read(orchestrator: dsi_actors.Orchestrator) -> None:
        async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=1000)):
            text.extend(tokens)
            if len(text) > 10:
                for worker in orchestrator.workers:
                    if worker.role == "target":
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(worker.hello.process, signal.SIGKILL)

    async with dsi_actors.Orchestrator(timed_config(target_wait_s=0.2, restarts=0)) as orchestrator:
        with pytest.raises(
            dsi_actors.NoTargetError, match=r"no target server for 0.2 s, \d+ tokens committed"
        ) as caught:
            await read(orchestrator)
    assert list(caught.value.token_ids) == text == plain_decoding(PROMPT, len(text))


async def test_no_process_is_left() -> None:
    async with dsi_actors.Orchestrator(timed_config()) as orchestrator:
        processes = orchestrator.process_ids
        assert len(processes) == 3
    assert gone(processes)


async def test_strangers_and_nonsense_do_not_disturb(orchestrator: dsi_actors.Orchestrator) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(orchestrator.endpoint)
    hello = Hello(1, 77, "target", "transformers", "another/model", "cpu:0", "elsewhere", 1)
    old = Hello(99, 78, "auto", "auto", "", "cpu:0", "elsewhere", 2)
    text: list[int] = []
    async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=40)):
        text.extend(tokens)
        for frame in (b"", b"\xc1" * 50, bytes(100_000), encode(Cancelled(1, 1, 0, 0)), encode(hello), encode(old)):
            stranger.send(frame)
    assert text == plain_decoding(PROMPT, 40)
    assert len(orchestrator.workers) == 4
    stranger.close()
    context.term()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"algorithm": "magic"}, "unknown algorithm 'magic': choose one of dsi, si, ar"),
        ({"sp": 0}, r"sp must lie in \[1, 1024\], not 0"),
        ({"lookahead": 0}, "lookahead must be auto or lie in"),
        ({"prompt_ids": [5, 1000]}, "token 1000 is outside the target's vocabulary of 1000"),
        ({"sampling": dsi_actors.Sampling(max_tokens=1 << 20)}, "over the target's limit of 1048576"),
    ],
)
async def test_bad_arguments_are_named(
    orchestrator: dsi_actors.Orchestrator, arguments: dict[str, object], problem: str
) -> None:
    with pytest.raises(dsi_actors.ConfigError, match=problem):
        await text_of(orchestrator.generate(**{"prompt_ids": PROMPT, **arguments}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"sp": 0}, "sp must lie in"),
        ({"target": ""}, "target is empty"),
        ({"listen": "127.0.0.1:5555"}, "is no endpoint"),
        ({"listen": "tcp://0.0.0.0:5555"}, "can be reached by other machines"),
        ({"silence_ms": 100}, "silence_ms must be at least twice heartbeat_ms"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(dsi_actors.ConfigError, match=problem):
        dsi_actors.Config(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -3), ("seed", -1), ("seed", 1 << 64), ("temperature", -0.1),
        ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
        ("min_p", -0.1), ("min_p", 1.5), ("top_k", -2), ("presence_penalty", 2.5), ("frequency_penalty", math.nan),
        ("logit_bias", {5: 200}), ("logit_bias", {-1: 1}),
        ("logit_bias", {5: "a"}), ("logit_bias", 3), ("bad_words", [[]]), ("bad_words", [3]), ("min_tokens", 200),
        ("min_tokens", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40), ("repetition_penalty", 1e39), ("repetition_penalty", math.nan), ("stop_token_ids", (-1,)),
        ("max_tokens", "5"), ("seed", 1.5), ("temperature", "0.5"), ("temperature", None), ("top_k", "3"),
        ("stop_token_ids", ("a",)), ("stop_token_ids", 3),
    ],
)  # fmt: skip
def test_bad_sampling_is_named(name: str, value: Any) -> None:
    with pytest.raises(dsi_actors.ConfigError, match=f"{name} must"):
        dsi_actors.Sampling(**{name: value})


async def test_a_model_that_is_not_there_shows_before_a_worker_is_started() -> None:
    config = dsi_actors.Config(target="/nowhere/at-all.gguf", drafter=None, sp=2, devices=("cpu",))
    with pytest.raises(dsi_actors.ConfigError, match="there is no file /nowhere"):
        async with dsi_actors.Orchestrator(config):
            pytest.fail("it started")


async def test_a_worker_that_cannot_start_says_why() -> None:
    config = dsi_actors.Config(engine="timed", target_options={"latency_ms": -1}, drafter=None, sp=1, devices=("cpu",))
    with pytest.raises(dsi_actors.WorkerStartError, match=r"target worker on cpu did not start: .*latency_ms"):
        async with dsi_actors.Orchestrator(config):
            pytest.fail("it started")


async def test_a_drafter_with_another_vocabulary_is_refused() -> None:
    config = timed_config()
    options = {**config.drafter_options, "vocabulary_size": 500}
    config = dsi_actors.Config(
        engine="timed", target_options=config.target_options, drafter_options=options, devices=("cpu",)
    )
    with pytest.raises(
        dsi_actors.WorkerStartError, match=r"vocabulary \(500 tokens\) is not the target's \(1000 tokens\)"
    ):
        async with dsi_actors.Orchestrator(config):
            pytest.fail("it started")


@pytest.mark.parametrize(("algorithm", "lookahead"), [("dsi", "auto"), ("dsi", 2), ("si", 4)])
async def test_a_tree_of_drafts_gives_the_targets_own_text(
    algorithm: Algorithm, lookahead: int | Literal["auto"]
) -> None:
    """And what an alternative brings is told apart from what the first choice brings."""
    sampling = dsi_actors.Sampling(max_tokens=120, seed=3)
    by_alternative, reports = 0, []
    async with dsi_actors.Orchestrator(timed_config(acceptance=0.5, alternatives=0.6, sp=3)) as orchestrator:
        for rows in (8, 1):
            stream = orchestrator.generate(PROMPT, sampling, algorithm=algorithm, lookahead=lookahead, rows=rows)
            found: list[int] = []
            async for tokens in stream:
                found += tokens
                by_alternative += sum(tokens.by_alternative)
            assert found == plain_decoding(PROMPT, 120)
            reports.append(await stream.report())
    tree, chain = reports
    assert tree.alternatives == by_alternative
    assert chain.alternatives == 0
    if lookahead != "auto":  # on a busy machine the planner may find that a chain, or plain decoding, is faster
        assert by_alternative > 0

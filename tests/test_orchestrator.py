"""What embedders do with an orchestrator that it was not made for, and what it says then."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import threading
from typing import Any

import numpy
import pytest
import torch

import dsi_actors
from support.patience import limit_s
from support.timed import PROMPT, plain_decoding, text_of, timed_config

pytestmark = pytest.mark.usefixtures("forked_workers")

TOKENS = 12


async def test_an_orchestrator_is_started_once() -> None:
    orchestrator = dsi_actors.Orchestrator(timed_config(sp=1, drafter=None))
    async with orchestrator:
        before = orchestrator.process_ids
        with pytest.raises(dsi_actors.ConfigError, match="make a new one for each `async with`"):
            await orchestrator.__aenter__()
        assert orchestrator.process_ids == before
    with pytest.raises(dsi_actors.ConfigError, match="was started before"):
        await orchestrator.__aenter__()


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("hello", "prompt_ids must be token ids, not text"),
        (b"hello", "prompt_ids must be token ids, not text"),
        (["hello"], "a sequence of token ids, which are whole numbers"),
        ([1.5], "whole numbers"),
        ([[1, 2]], "whole numbers"),
        (7, "a sequence of token ids"),
        (None, "a sequence of token ids"),
        (numpy.array([[1, 2]]), "whole numbers"),
        (numpy.array([]), "the prompt is empty"),
        ([-1], "-1 is none"),
        ([1 << 32], "4294967296 is none"),
    ],
)
def test_a_prompt_that_is_none_is_refused_at_once(prompt: Any, problem: str) -> None:
    orchestrator = dsi_actors.Orchestrator(timed_config())
    with pytest.raises(dsi_actors.ConfigError, match=problem):
        orchestrator.generate(prompt)
    if not isinstance(prompt, numpy.ndarray):
        with pytest.raises(dsi_actors.ConfigError, match=problem.replace("prompt_ids", "resumed")):
            orchestrator.generate([1], resumed=prompt)


async def test_any_sequence_of_integers_is_a_prompt() -> None:
    sampling = dsi_actors.Sampling(max_tokens=TOKENS)
    async with dsi_actors.Orchestrator(timed_config(sp=1, drafter=None)) as orchestrator:
        for prompt in (tuple(PROMPT), numpy.array(PROMPT), torch.tensor(PROMPT), iter(PROMPT)):
            text = await text_of(orchestrator.generate(prompt, sampling))
            assert text == plain_decoding(PROMPT, TOKENS)
            assert all(type(token) is int for token in text)


def test_sampling_takes_any_type_of_number() -> None:
    numbers: dict[str, Any] = {
        "max_tokens": numpy.int64(3), "seed": numpy.uint64(5), "temperature": numpy.float32(0.5),
        "stop_token_ids": numpy.array([1, 2]),
    }  # fmt: skip
    given = dsi_actors.Sampling(**numbers)
    assert given == dsi_actors.Sampling(max_tokens=3, seed=5, temperature=0.5, stop_token_ids=(1, 2))
    assert [type(value) for value in (given.max_tokens, given.seed, given.temperature)] == [int, int, float]


async def test_a_stream_that_is_collected_in_another_thread_ends_its_generation() -> None:
    async with dsi_actors.Orchestrator(timed_config(sp=1, drafter=None)) as orchestrator:
        streams = [orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=100_000))]
        await anext(streams[0])
        assert orchestrator._root is not None
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
        thread = threading.Thread(target=streams.clear)
        thread.start()
        assert await orchestrator._root.wait_until(lambda: orchestrator.running == 0, limit_s())
        thread.join()
        assert failures == []


async def test_workers_are_ended_without_asyncio_losing_sight_of_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who polls a process collects its exit status; asyncio's watcher then warns of an unknown child."""

    def poll(self: subprocess.Popen[bytes]) -> None:
        raise AssertionError("the process was polled")

    async with dsi_actors.Orchestrator(timed_config()) as orchestrator:
        assert orchestrator._root is not None
        supervisor = orchestrator._root.supervisor
        assert supervisor is not None
        with monkeypatch.context() as patched:
            patched.setattr(subprocess.Popen, "poll", poll)
            supervisor.fence(next(iter(supervisor._workers)))
            await supervisor.end_all()
    warnings = [record for record in caplog.records if record.name == "asyncio" and record.levelno > logging.INFO]
    # On a busy machine a step of the loop is slow, and debug mode says so.
    assert [record for record in warnings if not record.getMessage().startswith("Executing ")] == []


async def test_any_number_of_observers_see_a_generation_each_for_itself() -> None:
    sampling = dsi_actors.Sampling(max_tokens=TOKENS)
    first: list[Any] = []
    second: list[Any] = []
    broken: list[Any] = []

    def fails(generation: int, item: Any) -> None:
        broken.append(item)
        raise ValueError("no")

    async with dsi_actors.Orchestrator(timed_config()) as orchestrator:
        orchestrator.observe(fails)
        with orchestrator.observe(lambda generation, item: first.append((generation, item))):
            observation = orchestrator.observe(lambda generation, item: second.append((generation, item)))
            assert await text_of(orchestrator.generate(PROMPT, sampling)) == plain_decoding(PROMPT, TOKENS)
        assert len(broken) == 1, "it was told on although it had failed"
        assert first == second != []
        assert await text_of(orchestrator.generate(PROMPT, sampling)) == plain_decoding(PROMPT, TOKENS)
        assert len(broken) == 1
        assert {number for number, _ in first} < {number for number, _ in second}, "its block was over"
        stream = orchestrator.generate(PROMPT, sampling)
        await anext(stream)
        observation.end()
        observation.end()
        seen = len(second)
        await text_of(stream)
        assert len(second) == seen, "told of a generation that began before the end"

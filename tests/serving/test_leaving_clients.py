"""Clients on raw sockets that leave at each stage of a request: at once nothing is left of it, and nobody polls for that."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from dsi_actors.tokenizer import Tokenizer
from support.patience import limit_s
from support.service import Served, completion, served, words

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: An hour for each forward: without a client that leaves nothing ends.
HOUR_MS = 3.6e6


class HeldTokenizer(Tokenizer):
    """Tokenizes a text with "held" in it once it is let go."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.arrived, self.let_go = threading.Semaphore(0), threading.Event()
        self.threads: set[int] = set()

    def encode(self, text: str) -> list[int]:
        self.threads.add(threading.get_ident())
        if "held" in text:
            self.arrived.release()
            assert self.let_go.wait(limit_s())
        return super().encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        self.threads.add(threading.get_ident())
        return super().encode_chat(messages)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def slow(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One place on one target server, which takes an hour for a token."""
    directory = tmp_path_factory.mktemp("words")
    async with served(
        directory, tokenizer=HeldTokenizer(words(directory)), sp=1, slots=1, target_ms=HOUR_MS, drafter=None,
        request_timeout_s=7200, calibrate=False,
    ) as service:  # fmt: skip
        yield service


def outcomes(service: Served, outcome: str = "client_gone", name: str = "dsi_requests_total") -> float:
    for line in service.service.metrics.text().decode().splitlines():
        if line.startswith(name) and f'"{outcome}"' in line:
            return float(line.rsplit(" ", 1)[1])
    return 0.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pipelined", [False, True])
async def test_before_the_first_token(slow: Served, stream: bool, pipelined: bool) -> None:
    """Also if it has sent its next request ahead, for which uvicorn would stop to read."""
    gone = outcomes(slow)
    client = await slow.connect()
    await client.send(completion(stream=stream, max_tokens=50) + (completion() if pipelined else b""))
    await slow.until(lambda: slow.orchestrator.running == 1 and not slow.orchestrator.waiting)
    client.leave()
    await slow.quiet()
    assert outcomes(slow) == gone + 1


@pytest.mark.parametrize("stream", [False, True])
async def test_in_line(slow: Served, stream: bool) -> None:
    first, second = await slow.connect(), await slow.connect()
    await first.send(completion())
    await slow.until(lambda: slow.orchestrator.running == 1 and not slow.orchestrator.waiting)
    await second.send(completion(stream=stream, n=3))
    await slow.until(lambda: slow.orchestrator.waiting == 3)
    assert slow.service.places.taken == 4
    second.leave()
    await slow.until(lambda: slow.orchestrator.running == 1 and slow.service.places.taken == 1)
    first.leave()
    await slow.quiet()


@pytest.mark.parametrize("stream", [False, True])
async def test_while_its_prompt_is_tokenized(slow: Served, stream: bool) -> None:
    tokenizer = slow.tokenizer
    assert isinstance(tokenizer, HeldTokenizer)
    tokenizer.let_go.clear()
    client = await slow.connect()
    await client.send(completion("held", stream=stream))
    await slow.until(lambda: tokenizer.arrived.acquire(blocking=False))
    client.leave()
    await slow.quiet()
    tokenizer.let_go.set()
    assert slow.orchestrator.running == 0


@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
async def test_in_the_middle_of_its_request(slow: Served, part: float) -> None:
    request = completion("w4 " * 500)
    client = await slow.connect()
    await client.send(request[: int(len(request) * part)])
    await slow.until(lambda: len(slow.server.server_state.connections) > 0)
    client.leave()
    await slow.quiet()
    await slow.until(lambda: not slow.server.server_state.connections)


@pytest.mark.parametrize("stream", [False, True])
async def test_between_tokens(tmp_path_factory: pytest.TempPathFactory, stream: bool) -> None:
    async with served(tmp_path_factory.mktemp("words"), sp=2, target_ms=2) as service:
        client = await service.connect()
        await client.send(completion(stream=stream, max_tokens=200_000, ignore_eos=True, n=2))
        await service.until(lambda: service.orchestrator.running == 2)
        if stream:
            await client.reply(until=lambda reply: reply.body.count(b"data: ") > 5)
        client.leave()
        await service.quiet()
        assert outcomes(service, "cancelled", "dsi_generations_total") == 2
        assert len(service.orchestrator.workers) == 3, "no worker was lost"

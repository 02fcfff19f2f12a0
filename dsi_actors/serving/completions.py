"""One client's request from prompt to text: its choices run side by side, and end together when the client goes away."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from dsi_actors.config import Algorithm, Sampling
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.results import GenerationReport
from dsi_actors.serving.metrics import Metrics
from dsi_actors.serving.text import Piece, TextAssembler
from dsi_actors.tokenizer import Tokenizer

#: Pieces that may wait for a client that reads slowly. Its generations go on meanwhile, at most to max_tokens.
_PIECES_AHEAD = 256


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done, whatever the endpoint."""

    prompt_ids: list[int]
    sampling: Sampling
    stops: Sequence[str]
    choices: int
    algorithm: Algorithm
    sp: int | None
    lookahead: int | Literal["auto"]
    #: The most rows of a drafting step; None lets it be chosen.
    rows: int | None
    correlation: str
    #: The text of the answer continues that of the prompt; otherwise it stands alone, as an answer in a chat does.
    continues: bool


@dataclass(slots=True)
class Choice:
    """One answer, as it comes."""

    index: int
    seed: int
    #: A text that grew with each piece would be copied each time.
    pieces: list[Piece] = field(default_factory=list)
    finish_reason: str | None = None
    report: GenerationReport | None = None
    #: Up to and including the one that completed a stop string, whatever was committed behind it.
    tokens: int = 0

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Update:
    """Something new in a choice: a piece of its text, or its end."""

    choice: Choice
    piece: Piece | None


class Completion:
    """Iterate over `updates`; leaving the loop cancels all choices, down to the forwards that run."""

    def __init__(self, orchestrator: Orchestrator, tokenizer: Tokenizer, metrics: Metrics, job: Job) -> None:
        self._orchestrator = orchestrator
        self._tokenizer = tokenizer
        self._metrics = metrics
        self.job = job
        self.begun_s = time.perf_counter()
        self.choices = [Choice(index, (job.sampling.seed + index) % (1 << 64)) for index in range(job.choices)]

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Raises what the orchestrator raises."""
        queue: asyncio.Queue[Update | BaseException] = asyncio.Queue(_PIECES_AHEAD)
        tasks = [asyncio.create_task(self._run(choice, queue)) for choice in self.choices]
        try:
            left = len(tasks)
            while left:
                update = await queue.get()
                if isinstance(update, BaseException):
                    raise update
                left -= update.piece is None
                yield update
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, choice: Choice, queue: asyncio.Queue[Update | BaseException]) -> None:
        try:
            with self._metrics.running():
                await self._generate(choice, queue)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(Update(choice, None))

    async def _generate(self, choice: Choice, queue: asyncio.Queue[Update | BaseException]) -> None:
        job = self.job
        after = job.prompt_ids if job.continues else ()
        assembler = TextAssembler(self._tokenizer, job.stops, after=after, min_tokens=job.sampling.min_tokens)
        stop_token_ids = {*job.sampling.stop_token_ids, *self._tokenizer.stop_tokens_of(job.stops)}
        sampling = replace(job.sampling, seed=choice.seed, stop_token_ids=tuple(sorted(stop_token_ids)))
        begun_s = last_s = time.perf_counter()
        async with self._orchestrator.generate(
            job.prompt_ids, sampling, algorithm=job.algorithm, sp=job.sp, lookahead=job.lookahead,
            rows=job.rows, correlation=f"{job.correlation}-{choice.index}",
        ) as stream:  # fmt: skip
            async for tokens in stream:
                now_s = time.perf_counter()
                piece = assembler.add(tokens)
                given = len(piece.tokens)
                self._metrics.committed(tokens.accepted[:given], now_s - last_s, first=not choice.tokens)
                last_s = now_s
                choice.tokens += given
                await self._show(choice, piece, queue)
                if assembler.stopped:
                    stream.cancel()
                    break
            if not assembler.stopped:
                await self._show(choice, assembler.rest(), queue)
            choice.report = await stream.report()
        choice.finish_reason = "length" if choice.report.finish_reason == "length" and not assembler.stopped else "stop"
        self._metrics.finished(choice.report, choice.finish_reason, time.perf_counter() - begun_s)

    async def _show(self, choice: Choice, piece: Piece, queue: asyncio.Queue[Update | BaseException]) -> None:
        if piece.text or piece.tokens:
            choice.pieces.append(piece)
            await queue.put(Update(choice, piece))


def seed_or_any(seed: int | None) -> int:
    """The client's seed, as a number of 64 bits; without one, any."""
    return secrets.randbits(63) if seed is None else seed % (1 << 64)

"""One client's request from prompt to text: its choices run side by side, and end together when the client goes away."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from dsi_actors.config import Algorithm, Sampling
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.results import GenerationReport
from dsi_actors.serving.metrics import Metrics
from dsi_actors.serving.parts import Message, Reader
from dsi_actors.text import Piece, TextAssembler, TokenText, prompt_piece
from dsi_actors.tokenizer import Tokenizer

#: Pieces that may wait for a client that reads slowly. Its generations go on meanwhile, at most to max_tokens.
_PIECES_AHEAD = 256


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done, whatever the endpoint."""

    #: The token ids of each.
    prompts: Sequence[list[int]]
    sampling: Sampling
    stops: Sequence[str]
    #: For each prompt.
    choices: int
    algorithm: Algorithm
    sp: int | None
    lookahead: int | Literal["auto"]
    #: The most rows of a drafting step; None lets it be chosen.
    rows: int | None
    correlation: str
    #: The text of the answer continues that of the prompt; otherwise it stands alone, as an answer in a chat does.
    continues: bool
    #: Makes what reads an answer as a message. None: nobody does.
    reader: Callable[[], Reader] | None = None
    #: Names of special tokens that are a part of the text for the reader.
    shown: Collection[str] = ()
    #: The answer begins with the prompt.
    echoes: bool = False
    #: Of the most probable tokens in each place of the prompt, how many are wanted; None: nothing is told of the prompt.
    prompt_alternatives: int | None = None
    #: Those are told apart from the answer, too.
    tells_prompt: bool = False
    #: There is something to generate: max_tokens is above 0.
    generates: bool = True


@dataclass(slots=True)
class Choice:
    """One answer, as it comes."""

    index: int
    seed: int
    prompt_ids: Sequence[int]
    #: The tokens of the prompt, if something of them is told apart from the answer.
    prompt: Sequence[TokenText] = ()
    #: A text that grew with each piece would be copied each time.
    pieces: list[Piece] = field(default_factory=list)
    finish_reason: str | None = None
    #: The stop string that ended the answer, if one did.
    stopped_by: str | None = None
    report: GenerationReport | None = None
    calls_tools: bool = False
    #: Up to and including the one that completed a stop string, whatever was committed behind it.
    tokens: int = 0

    @property
    def shown_tokens(self) -> int:
        """Tokens that the client is told of."""
        return len(self.prompt) + sum(len(piece.tokens) for piece in self.pieces)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def message(self) -> Message:
        """The answer as a message, if somebody reads it as one."""
        return Message.of(part for piece in self.pieces for part in piece.parts)


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
        self.choices = [
            Choice(place * job.choices + index, (job.sampling.seed + index) % (1 << 64), prompt)
            for place, prompt in enumerate(job.prompts)
            for index in range(job.choices)
        ]

    @property
    def cached_tokens(self) -> int:
        """Of the prompts' tokens, those that the target server of a prompt's first choice did not read again."""
        first = self.choices[:: self.job.choices]
        return sum(choice.report.cached_tokens for choice in first if choice.report is not None)

    async def updates(self, silence_s: float | None = None) -> AsyncGenerator[Update | None, None]:
        """None: nothing is new for `silence_s`. Raises what the orchestrator raises."""
        queue: asyncio.Queue[Update | BaseException] = asyncio.Queue(_PIECES_AHEAD)
        tasks = [asyncio.create_task(self._run(choice, queue)) for choice in self.choices]
        try:
            left = len(tasks)
            while left:
                try:
                    async with asyncio.timeout(silence_s):
                        update = await queue.get()
                except TimeoutError:
                    yield None
                    continue
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
        offset = await self._show_prompt(choice, queue)
        if not job.generates:
            choice.finish_reason = "length"
            return
        after = choice.prompt_ids if job.continues else ()
        assembler = TextAssembler(
            self._tokenizer, job.stops, after=after, min_tokens=job.sampling.min_tokens, shown=job.shown, offset=offset
        )
        reader = None if job.reader is None else job.reader()
        stop_token_ids = {*job.sampling.stop_token_ids, *self._tokenizer.stop_tokens_of(job.stops)}
        sampling = replace(job.sampling, seed=choice.seed, stop_token_ids=tuple(sorted(stop_token_ids)))
        begun_s = last_s = time.perf_counter()
        async with self._orchestrator.generate(
            choice.prompt_ids, sampling, algorithm=job.algorithm, sp=job.sp, lookahead=job.lookahead,
            rows=job.rows, correlation=f"{job.correlation}-{choice.index}",
        ) as stream:  # fmt: skip
            async for tokens in stream:
                now_s = time.perf_counter()
                piece = assembler.add(tokens)
                given = len(piece.tokens)
                self._metrics.committed(tokens.accepted[:given], now_s - last_s, first=not choice.tokens)
                last_s = now_s
                choice.tokens += given
                await self._show(choice, piece, reader, queue)
                if assembler.stopped:
                    stream.cancel()
                    break
            if not assembler.stopped:
                await self._show(choice, assembler.rest(), reader, queue)
            if reader is not None and (parts := reader.finish()):
                choice.calls_tools = choice.calls_tools or any(part.kind == "call" for part in parts)
                await self._show(choice, Piece("", parts=tuple(parts)), None, queue)
            choice.report = await stream.report()
        choice.stopped_by = assembler.stopped_by
        choice.finish_reason = "length" if choice.report.finish_reason == "length" and not assembler.stopped else "stop"
        if choice.finish_reason == "stop" and choice.calls_tools:
            choice.finish_reason = "tool_calls"
        self._metrics.finished(choice.report, choice.finish_reason, time.perf_counter() - begun_s)

    async def _show_prompt(self, choice: Choice, queue: asyncio.Queue[Update | BaseException]) -> int:
        """Tell of the prompt what was asked for. Returns how many characters of it the answer begins with."""
        job, scores = self.job, None
        if job.prompt_alternatives is not None:
            name = f"{job.correlation}-{choice.index}-prompt"
            scores = await self._orchestrator.score(
                choice.prompt_ids, top_logprobs=job.prompt_alternatives, correlation=name
            )

        def piece_of(alternatives: int) -> Piece:
            return prompt_piece(
                self._tokenizer, choice.prompt_ids, scores, alternatives=alternatives, ends=not job.generates
            )

        if job.tells_prompt:
            choice.prompt = (await asyncio.to_thread(piece_of, job.prompt_alternatives or 0)).tokens
        if not job.echoes:
            return 0
        piece = await asyncio.to_thread(piece_of, job.sampling.top_logprobs)
        await self._show(choice, piece, None, queue)
        return len(piece.text)

    async def _show(
        self, choice: Choice, piece: Piece, reader: Reader | None, queue: asyncio.Queue[Update | BaseException]
    ) -> None:
        if reader is not None:
            piece = replace(piece, parts=tuple(reader.feed(piece.text)))
            choice.calls_tools = choice.calls_tools or any(part.kind == "call" for part in piece.parts)
        if piece.text or piece.tokens or piece.parts:
            choice.pieces.append(piece)
            await queue.put(Update(choice, piece))


def seed_or_any(seed: int | None) -> int:
    """The client's seed, as a number of 64 bits; without one, any."""
    return secrets.randbits(63) if seed is None else seed % (1 << 64)

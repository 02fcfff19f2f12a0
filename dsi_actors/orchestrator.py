"""The orchestrator: what others embed. `async with Orchestrator(config)`, then `async for tokens in generate(...)`, or
`async for text in generate_text(...)`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Literal, SupportsIndex, Unpack

from dsi_actors.arguments import check_resumed, check_way, correlation_of, token_ids_of
from dsi_actors.config import TIMED, Algorithm, Config, Sampling
from dsi_actors.core import GenerationCore
from dsi_actors.errors import (
    ConfigError,
    NoTargetError,
    OrchestratorClosed,
    TooManyGenerations,
    WorkerStartError,
)
from dsi_actors.generation.generation import Generation
from dsi_actors.generation.knowledge import Knowledge
from dsi_actors.generation.scoring import Scoring
from dsi_actors.host.advice import worker_command
from dsi_actors.launching.choice import launcher_for
from dsi_actors.launching.launcher import Launcher
from dsi_actors.local_workers import start_local_workers
from dsi_actors.models import prepare_models, target_tokenizer
from dsi_actors.observation import Observation, Observations, Observer
from dsi_actors.planning.estimates import Estimates
from dsi_actors.progress import Report, unreported
from dsi_actors.results import Answer, TextScores
from dsi_actors.root import Root
from dsi_actors.stream import Cancel, Channel, GenerationStream
from dsi_actors.text import TextAssembler
from dsi_actors.text_stream import Prompt, TextOptions, TextStream, read_options
from dsi_actors.tokenizer import Tokenizer
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import MAX_TOKENS_PER_MESSAGE

#: A worker that has not left is dismissed again: at most so many times in all, with this pause between.
_FAREWELLS, _FAREWELL_S = 10, 0.05
#: The generation by which a start measures how long a token takes, and its tokens; the first one's time is not taken.
_CALIBRATION, _MEASURED_TOKENS = (1 << 63) - 1, 3


class Orchestrator:
    """Drafter, target servers and generations behind one object. Use as an async context manager.

    With `config.listen` it binds there and waits for workers; without, it fetches or converts the models that are missing,
    starts local workers itself and enters the block once all are ready. `report` is told what it does meanwhile.
    `launcher` starts these workers; None: the one that `config.cluster` names. Raises ConfigError (nothing was started) and
    WorkerStartError (everything was ended).
    """

    def __init__(
        self, config: Config | None = None, *, report: Report | None = None, launcher: Launcher | None = None
    ) -> None:
        self.config = config if config is not None else Config()
        if launcher is not None and self.config.listen is not None:
            raise ConfigError(
                "with listen, workers connect by themselves and none is launched: leave out listen or launcher"
            )
        self.endpoint = ""
        self._report = report
        self._root: Root | None = None
        self._task: asyncio.Task[None] | None = None
        self._launcher = launcher if launcher is not None else launcher_for(self.config)
        self._numbers = itertools.count(1)
        self._knowledge = Knowledge(self.config, lambda role: self._running().of_role(role), lambda: self.running)
        self._observations = Observations()
        self._tokenizer: Tokenizer | None = None
        self._one_loads_it = asyncio.Lock()

    async def __aenter__(self) -> Orchestrator:
        if self._root is not None:
            raise ConfigError("this Orchestrator was started before: make a new one for each `async with`")
        self._root = root = Root(self.config, self._report or unreported)
        if self.config.local_models:
            await prepare_models(self.config, self._report)
        try:
            endpoint = self.config.listen or await self._launcher.open()
            self.endpoint = root.workforce.listen(endpoint, self._launcher.keyring)
        except BaseException:
            await self._launcher.close()
            raise
        self._task = asyncio.create_task(root.run(), name="dsi-orchestrator")
        try:
            if self.config.listen is None:
                await self._start_local_workers(root)
        except BaseException:
            await self._close(root)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._root is not None
        await self._close(self._root)

    def generate(
        self,
        prompt_ids: Iterable[SupportsIndex],
        sampling: Sampling | None = None,
        *,
        algorithm: Algorithm = "dsi",
        sp: int | None = None,
        lookahead: int | Literal["auto"] = "auto",
        rows: int | None = None,
        resumed: Iterable[SupportsIndex] = (),
        correlation: str | None = None,
    ) -> GenerationStream:
        """The target's own continuation of `prompt_ids`, as it is committed.

        `resumed`: tokens that an earlier run gave for the same target, prompt and sampling, before it was cut off. They
        count among `max_tokens` and are not given again; what follows is what the earlier run would have given.

        Iterate over the result: each item is a `CommittedTokens`, a tuple of ids. Leaving the loop, cancelling the task
        or closing the stream cancels all work, down to the forwards that run. `sp`, `lookahead` and `rows` are for this
        generation. `rows`: the most rows that a step of the drafter may have, one for the main path and the others for
        alternatives; 1 drafts chains, None lets it be chosen. `correlation` names the generation in the logs of the
        orchestrator and of every worker.

        `prompt_ids` and `resumed` may be any sequence of integers, such as a numpy array or a tensor of one dimension.

        Raises ConfigError at once for arguments that cannot be used, and from the first iteration if the target cannot
        take this prompt; NoTargetError, with the tokens so far, if no target server is there for too long.
        """
        sampling = sampling if sampling is not None else Sampling()
        check_way(algorithm, sp, lookahead, rows, correlation)
        prompt, earlier = token_ids_of("prompt_ids", prompt_ids), token_ids_of("resumed", resumed)
        if not prompt:
            raise ConfigError("the prompt is empty: give at least one token")
        check_resumed(earlier, sampling)
        number = next(self._numbers)
        correlation = correlation_of(correlation, f"generation-{number}")
        return self._stream(number, prompt, sampling, algorithm, sp, lookahead, rows, earlier, correlation)

    def generate_text(self, prompt: Prompt, **options: Unpack[TextOptions]) -> TextStream:
        """The same for text. `prompt` is a text, or the messages of a conversation.

        Iterate over the result: each item is a piece of the answer's text. The text is that of the tokens that `generate`
        gives. Raises ConfigError at once for options that cannot be used, and from the first iteration if the target has no
        tokenizer."""
        request, way = read_options(prompt, options)
        check_way(**way)

        async def begin() -> tuple[GenerationStream, TextAssembler]:
            self._running()
            tokenizer = await self.tokenizer()
            prepared = await asyncio.to_thread(request.prepared, tokenizer)
            text = TextAssembler(tokenizer, request.stop, after=prepared.after, min_tokens=prepared.sampling.min_tokens)
            return self.generate(prepared.prompt_ids, prepared.sampling, **way), text

        return TextStream(begin)

    async def answer(self, prompt: Prompt, **options: Unpack[TextOptions]) -> Answer:
        """The whole text that `generate_text` gives."""
        return await self.generate_text(prompt, **options).answer()

    async def tokenizer(self) -> Tokenizer:
        """The target's tokenizer, loaded when it is first asked for. Raises ConfigError."""
        async with self._one_loads_it:
            if self._tokenizer is None:
                self._tokenizer = await target_tokenizer(self.config, self._report)
            return self._tokenizer

    async def score(
        self, token_ids: Iterable[SupportsIndex], *, top_logprobs: int = 0, correlation: str | None = None
    ) -> TextScores:
        """How probable a text is: the log probability of each token but the first after the tokens before it.

        `top_logprobs`: so many of the most probable tokens in each place are told, too (at most 20). The result is a
        function of the target and the text. If the target server is lost, another one goes on. Cancelling the task cancels
        the work. `correlation` is as in `generate`.

        Raises ConfigError for arguments that cannot be used, and if the target cannot do this; NoTargetError.
        """
        tokens = token_ids_of("token_ids", token_ids)
        if not tokens:
            raise ConfigError("the text is empty: give at least one token")
        top_logprobs = Sampling(top_logprobs=top_logprobs).top_logprobs  # checked
        number = next(self._numbers)
        correlation = correlation_of(correlation, f"score-{number}")
        channel = Channel()

        async def start() -> Cancel | None:
            root = self._running()
            target = await self._first_target(root)
            assert target.ready is not None
            if len(tokens) > (most := min(target.ready.max_length, MAX_TOKENS_PER_MESSAGE)):
                raise ConfigError(f"the text has {len(tokens)} tokens: that is over the target's limit of {most}")
            self._check_tokens(target, tokens)
            self._check_place(root)
            if channel.closed or len(tokens) == 1:  # there is nothing before the first token
                return None
            scoring = Scoring(
                number, tokens, root.scheduler, top_logprobs=top_logprobs, correlation=correlation,
                vocabulary_size=target.ready.vocabulary_size, first_target_wait_s=self.config.ready_timeout_s,
                target_wait_s=self.config.target_wait_s, on_tokens=channel.put, on_end=channel.end,
            )  # fmt: skip
            root.start_generation(scoring, channel)
            return scoring.cancel

        async with GenerationStream(channel, start) as stream:
            blocks = [block async for block in stream]
        return TextScores(
            tuple(logprob for block in blocks for logprob in block.logprobs),
            tuple(tops for block in blocks for tops in block.top_logprobs),
        )

    def _stream(
        self,
        number: int,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        algorithm: Algorithm,
        sp: int | None,
        lookahead: int | Literal["auto"],
        rows: int | None,
        resumed: Sequence[int],
        correlation: str,
    ) -> GenerationStream:
        channel = Channel()

        async def start() -> Cancel | None:
            root = self._running()
            target = await self._first_target(root)
            self._check_prompt(target, prompt_ids, sampling)
            self._check_tokens(target, (*resumed, sampling.most_token))
            self._check_place(root)
            controller = self._knowledge.controller(
                algorithm,
                sp,
                None if lookahead == "auto" else lookahead,
                position=len(prompt_ids) + len(resumed),
                rows=rows,
            )
            core = GenerationCore(
                prompt_ids,
                policy=controller.begin(),
                max_tokens=sampling.max_tokens,
                stop_tokens=sampling.stop_token_ids,
                resumed=resumed,
            )
            if channel.closed:
                return None
            assert target.ready is not None
            generation = Generation(
                number,
                core,
                root.scheduler,
                controller,
                self._knowledge,
                vocabulary_size=target.ready.vocabulary_size,
                sampling=sampling,
                correlation=correlation,
                first_target_wait_s=self.config.ready_timeout_s,
                target_wait_s=self.config.target_wait_s,
                on_tokens=channel.put,
                on_end=channel.end,
                observe=self._observations.teller(),
            )
            root.start_generation(generation, channel)
            return generation.cancel

        return GenerationStream(channel, start)

    def observe(self, observer: Observer) -> Observation:
        """Tell `observer` of every event and every action of the cores of generations that start from now on, with the
        generation's number. It must return at once.

        The result ends the observation by its `end`, or as a context manager. Any number of observers are told at the
        same time. One that raises is told no more: the generation and the other observers go on.
        """
        return self._observations.add(observer)

    @property
    def workers(self) -> list[WorkerHandle]:
        """The workers that are ready."""
        return list(self._running().ready_workers)

    @property
    def messages(self) -> tuple[int, int]:
        """Messages that came from workers, and that were sent to them, so far."""
        return self._running().workforce.messages

    @property
    def max_length(self) -> int:
        """Positions, prompt and answer together, that the target servers take; 0 while there is none."""
        return min(
            (worker.ready.max_length for worker in self.workers if worker.role == "target" and worker.ready), default=0
        )

    @property
    def running(self) -> int:
        """Generations that are not over, those that wait among them."""
        return len(self._running().generations)

    @property
    def waiting(self) -> int:
        """Generations that have no target server yet."""
        return self._running().scheduler.waiting

    @property
    def preparing(self) -> int:
        """Workers on their way that had to fetch or convert their model first."""
        return sum(bool(worker.preparing) for worker in self._running().workforce.workers)

    @property
    def process_ids(self) -> list[int]:
        """The local worker processes."""
        supervisor = self._running().supervisor
        return [] if supervisor is None else supervisor.process_ids

    async def wait_for_workers(self, *, targets: int, drafters: int, timeout_s: float) -> bool:
        """Whether so many workers are ready within `timeout_s`."""
        root = self._running()

        def enough() -> bool:
            return len(root.of_role("target")) >= targets and len(root.of_role("drafter")) >= drafters

        await root.wait_until(lambda: enough() or root.ended, timeout_s)
        self._running()
        return enough()

    # Start and end

    def _running(self) -> Root:
        if self._root is None or self._root.ended or self._task is None:
            raise OrchestratorClosed("the orchestrator is not running: use it inside `async with`")
        return self._root

    async def _start_local_workers(self, root: Root) -> None:
        await start_local_workers(root, self.config, self._launcher, self.endpoint)
        on_processors = self.config.engine != TIMED and not any(worker.gpus for worker in self.workers)
        if on_processors and self.estimates.calibrated_ms > 0:
            await self._measure_alone(root)

    async def _measure_alone(self, root: Root) -> None:
        """What a token takes in plain decoding: workers on shared processors measured themselves while others started."""
        sampling = Sampling(max_tokens=_MEASURED_TOKENS)
        try:
            async with self._stream(_CALIBRATION, [0], sampling, "ar", 1, "auto", None, (), "calibration") as stream:
                async for _ in stream:
                    pass
                report = await stream.report()
        except NoTargetError as error:
            raise WorkerStartError(f"the target server could not be measured: {error}") from error
        self._knowledge.measured_alone(min(report.trace.target_ms[1:]))

    async def _close(self, root: Root) -> None:
        """End generations, then workers, then our own actors. Safe to call whatever is running."""
        assert self._task is not None
        root.closing = True
        try:
            for generation, _ in list(root.generations.values()):
                generation.stop()
            await root.wait_until(lambda: not root.generations or root.ended, 1.0)
            for _ in range(0 if root.workforce.ended else _FAREWELLS):
                if not root.workforce.say_goodbye():
                    break
                await asyncio.sleep(_FAREWELL_S)
            root.workforce.stop()
            if root.supervisor is not None:
                await root.supervisor.end_all()
        finally:
            root.stop()
            try:
                await self._task
            finally:
                if root.supervisor is not None:
                    await root.supervisor.all_ended()
                root.workforce.close_gateway()
                await self._launcher.close()

    # Before a generation

    async def _first_target(self, root: Root) -> WorkerHandle:
        timeout_s = self.config.ready_timeout_s
        found = await root.wait_until(lambda: bool(root.of_role("target")) or root.ended, timeout_s)
        self._running()
        if not found:
            raise NoTargetError(
                f"no target server came within {timeout_s:g} s: start one with "
                f"{worker_command(self.endpoint, keys=self.config.keys)}"
            )
        return root.of_role("target")[0]

    @staticmethod
    def _check_prompt(target: WorkerHandle, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        assert target.ready is not None
        length = len(prompt_ids) + sampling.max_tokens
        if length > target.ready.max_length:
            raise ConfigError(
                f"the prompt has {len(prompt_ids)} tokens and max_tokens is {sampling.max_tokens}: together {length} are "
                f"over the target's limit of {target.ready.max_length}"
            )
        if length > MAX_TOKENS_PER_MESSAGE:
            raise ConfigError(
                f"the prompt has {len(prompt_ids)} tokens and max_tokens is {sampling.max_tokens}: together {length} are "
                f"over the {MAX_TOKENS_PER_MESSAGE} that fit one message"
            )
        Orchestrator._check_tokens(target, prompt_ids)

    def _check_place(self, root: Root) -> None:
        if len(root.generations) >= self.config.max_generations:
            raise TooManyGenerations(f"{self.config.max_generations} generations wait or run already: try again later")

    @staticmethod
    def _check_tokens(target: WorkerHandle, token_ids: Sequence[int]) -> None:
        assert target.ready is not None
        if (token := max(token_ids, default=0)) >= target.ready.vocabulary_size:
            raise ConfigError(f"token {token} is outside the target's vocabulary of {target.ready.vocabulary_size}")

    @property
    def estimates(self) -> Estimates:
        """What the next generation begins with: what earlier ones taught, else what the workers measured at their start."""
        return self._knowledge.estimates()

"""Any causal language model that transformers can load and whose state can be rewound, on a CPU or a CUDA device.

A target computes the prompt in chunks aligned to position 0, and every later position at a width that gives the bits of
a full window, so that a token's logits do not depend on how the tokens around it were grouped into requests, or on the
generations that share the forward (docs/exactness.md). A drafter only guesses: it computes exactly the tokens that it must.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Mapping, Sequence

import structlog
import torch

from dsi_protocol import OptionValue
from dsi_workers.engines.base import Engine, EngineError, EngineInfo, Interrupt, RequestError, Task
from dsi_workers.engines.bits import Trial, Widths
from dsi_workers.engines.forward import Forward, Run
from dsi_workers.engines.load import load_model
from dsi_workers.engines.machine import keep_freed_memory, torch_device
from dsi_workers.engines.tried import widths_tried
from dsi_workers.lookup import Lookup
from dsi_workers.model_files import read_vocabulary_hash
from dsi_workers.models import resolve_model
from dsi_workers.sampling import Sampler, log_probability, warm_up
from dsi_workers.session import Session
from dsi_workers.slots import Slots

log = structlog.get_logger("dsi.engine")

PROMPT_CHUNK = 128
_LONG_S = 0.2
#: How often the forwards of a chain's drafter are timed.
_ROUNDS = 4
_MOST_SLOTS = 1024


class TransformersEngine(Engine):
    """Options: dtype (auto, float32, bfloat16, float16), quantization (none, int8, or auto: int8 for a drafter on a CPU, where
    nothing is faster), window, max_length, slots, threads, graphs (false: a GPU computes by torch's own operations, whose bits
    are others); a drafter's: lookup (it checks guesses of prompt lookup on its way), remember (of earlier generations, too),
    target (the model whose vocabulary it shall speak in)."""

    def __init__(self, model: str, *, device: str, drafter: bool, options: Mapping[str, OptionValue]) -> None:
        log.info("imported")
        torch.set_num_threads(_whole(options, "threads", 1))
        self._device = torch_device(device)
        directory = resolve_model(model)
        vocabulary = read_vocabulary_hash(directory)
        self._exact = not drafter
        self._window = _whole(options, "window", 32 if self._device.type == "cuda" else 8, most=PROMPT_CHUNK)
        loaded = load_model(
            directory, self._device, reference=model, dtype=str(options.get("dtype", "auto")),
            quantization=self._quantization(options), rows=self._window,
            most_positions=_whole(options, "max_length", 2048), graphs=options.get("graphs", True) is not False,
            exact=self._exact,
        )  # fmt: skip
        log.info("read", model=model)
        self._config, max_length = loaded.config, loaded.positions
        keep_freed_memory()
        slots = _whole(options, "slots", 8, most=_MOST_SLOTS)
        self._samplers: dict[int, Sampler] = {}
        self._slots = Slots(slots, block=PROMPT_CHUNK if self._exact else None)
        self._forward = Forward(
            loaded.decoder, self._config, self._device, slots=slots,
            capacity=max_length + max(PROMPT_CHUNK, self._window),
        )  # fmt: skip
        if not self._exact and self._device.type == "cpu":
            self._forward.read_step = 1
        self._widths = Widths({self._window: 0.0})
        if self._exact:
            name = f"{self._config.model_type} on {self._device}"
            words = int(self._config.vocab_size)
            trial = Trial(self._forward, window=self._window, words=words, name=name)
            self._widths = widths_tried(
                self._forward, directory, window=self._window, slots=slots, try_them=lambda: trial.widths(slots)
            )
            self._forward.cache.release(0)
            log.info("bits tried", widths=sorted(self._widths.costs_s))
        self._lookup = self._make_lookup(options) if not self._exact and options.get("lookup") else None
        latency_us, window_latency_us, batch_latency_us = self._warm_up(options.get("calibrate", True) is not False)
        self.info = EngineInfo(
            vocabulary=vocabulary,
            vocabulary_size=int(self._config.vocab_size),
            max_length=max_length,
            window=self._window,
            latency_us=latency_us,
            window_latency_us=window_latency_us,
            slots=slots,
            batch_latency_us=batch_latency_us,
            fingerprint=self._fingerprint() if self._exact else 0,
        )

    def _quantization(self, options: Mapping[str, OptionValue]) -> str:
        name = str(options.get("quantization", "auto"))
        guesses_on_a_cpu = not self._exact and self._device.type == "cpu"
        return name if name != "auto" else "int8" if guesses_on_a_cpu else "none"

    # A step

    def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
        tasks = [task for task in tasks if not self._copies(task)]
        self._forward.interrupt = interrupt
        counted = self._forward.count
        try:
            runs = {id(task): self._run_of(task, alone=len(tasks) == 1) for task in tasks}
            for group in self._groups(tasks, runs):
                self._compute(group, [runs[id(task)] for task in group])
        finally:
            self.forwards += self._forward.count - counted

    def reads_alone(self, task: Task) -> bool:
        if self._exact:
            return _position(task) < task.session.prompt_length
        if self._lookup is not None:
            self._lookup.recognize(task.session)
        return len(task.session.tokens) - _position(task) > 1

    def _groups(self, tasks: Sequence[Task], runs: Mapping[int, Run]) -> list[list[Task]]:
        """Tasks that share a forward: pieces of prompts have one of their own, the others as many as the bits allow."""
        groups: list[list[Task]] = [[]]
        for task in tasks:
            rows = sum(self._forward.rows_of(runs[id(each)]) for each in (*groups[0], task))
            if len(tasks) > 1 and self.reads_alone(task):
                groups.append([task])
            elif groups[0] and rows > self._most_rows:
                groups.insert(0, [task])
            else:
                groups[0].append(task)
        return [group for group in groups if group]

    @property
    def _most_rows(self) -> int:
        """Rows that several generations may share in one forward."""
        recorded = max(self._forward.recorded_rows, default=1 << 30)
        return min(recorded, self._widths.most) if self._exact else recorded

    def _compute(self, tasks: Sequence[Task], runs: Sequence[Run]) -> None:
        for task, run in zip(tasks, runs, strict=True):
            # Padding and an interrupt leave what they like from `begin` on: until the forward is done it is not computed.
            task.session.computed = min(task.session.computed, run.begin)
        rows, logit_rows = sum(run.width for run in runs), sum(len(run.wanted) for run in runs)
        if self._exact and rows <= self._widths.most:  # a piece of a prompt may be wider: it is by itself
            rows = rows if len(runs) == 1 else self._widths.cheapest(rows)
        if self._exact and logit_rows <= self._widths.most:
            logit_rows = self._widths.cheapest(logit_rows)
        answers = self._forward(runs, rows=rows, logit_rows=logit_rows)
        for task, run, logits in zip(tasks, runs, answers, strict=True):
            guess = run.tokens[len(task.session.tokens) - run.begin :]
            task.session.computed = run.begin + len(run.tokens) - len(guess)
            differs = self._choose(task, logits, guess)
            task.done = differs or task.session.computed == len(task.session.tokens)
            if self._lookup is not None and guess:
                self._lookup.checked(task.session, guess, right=len(task.answer.tokens) - 1)

    def _run_of(self, task: Task, *, alone: bool) -> Run:
        """What the next forward for this task computes.

        The token at position p comes out of the input at p - 1, so inputs [start - 1, length) are needed, and before
        them whatever this worker has not read yet.
        """
        session = task.session
        slot = self._slot_of(session)
        if self._lookup is not None:
            self._lookup.recognize(session)
        position, length = _position(task), len(session.tokens)
        if not self._exact:
            begin, end = position, min(position + PROMPT_CHUNK, length)
            guess = self._guess(task) if end == length else []
            first_logits = max(task.start - 1 + len(task.answer.tokens), begin)
            return Run(slot, session.tokens[begin:end] + guess, begin, end - begin + len(guess), first_logits)
        if position < session.prompt_length:
            begin = position - position % PROMPT_CHUNK
            width = min(PROMPT_CHUNK, session.prompt_length - begin)  # a function of the prompt alone, all here or not
            end = min(begin + width, length)
        else:
            begin, end = position, min(position + self._window, length)
            width = self._widths.cheapest(end - begin, self._window) if alone else self._widths.narrowest(end - begin)
        first_logits = max(task.start - 1 + len(task.answer.tokens), begin)
        return Run(slot, session.tokens[begin:end], begin, width, first_logits)

    def _choose(self, task: Task, logits: torch.Tensor, guess: Sequence[int]) -> bool:
        """Add the tokens that `logits` [n, vocabulary] give to the answer; whether one differs from the session's, or from the
        guess that follows them."""
        session, answer = task.session, task.answer
        length = len(session.tokens)
        sampler = self._samplers.get(session.generation)
        choices = logits.argmax(dim=-1).tolist() if sampler is None else None
        for row in range(len(logits)):
            at = task.start + len(answer.tokens)
            if sampler is not None:
                token = _chosen(sampler, logits[row], at, guess)
            else:
                assert choices is not None
                token = choices[row]
            answer.tokens.append(token)
            if session.sampling.logprobs:
                answer.logprobs.append(log_probability(logits[row], token))
            expected = session.tokens[at : at + 1] or guess[at - length : at - length + 1]
            if expected and expected[0] != token:
                return True
        return False

    # A drafter's own drafter

    def _make_lookup(self, options: Mapping[str, OptionValue]) -> Lookup:
        costs_us = dict.fromkeys((1, 2, 4, 8), math.inf)
        # In turn, the least of each: what disturbs the machine for a moment must not make one of them dear for ever.
        for _ in range(_ROUNDS):
            for rows, known_us in costs_us.items():
                run = Run(0, [0] * rows, PROMPT_CHUNK, rows, PROMPT_CHUNK)
                costs_us[rows] = min(known_us, self._forward.timed_s([run], rows=rows, logit_rows=rows) * 1e6)
        return Lookup(costs_us, remember=options.get("remember", True) is not False)

    def _copies(self, task: Task) -> bool:
        """Whether the task is done by what followed the same tokens before."""
        if self._lookup is not None and task.count is not None:
            task.answer.tokens = self._lookup.copy(task.session, task.count)
            task.done = bool(task.answer.tokens)
        return task.done

    def _guess(self, task: Task) -> list[int]:
        if self._lookup is None or task.count is None or len(task.session.tokens) - _position(task) > 1:
            return []
        return self._lookup.guess(task.session, task.count - 1)

    # Slots

    def _slot_of(self, session: Session) -> int:
        if not session.sampling.plain_greedy and session.generation not in self._samplers:
            self._samplers[session.generation] = Sampler(session)
        return self._slots.of(session)

    def forget(self, session: Session) -> None:
        self._slots.forget(session)
        self._samplers.pop(session.generation, None)
        if self._lookup is not None:
            self._lookup.forget(session)

    # Start

    def _warm_up(self, calibrate: bool) -> tuple[int, int, int]:
        """Run what will be run. Returns the median time in µs of a verification of one position, of a window, and of
        windows for all slots (a drafter: of one token, 0, and of a token for each slot); zeros if not to `calibrate`."""
        length = PROMPT_CHUNK
        prompt = Run(0, [position % 16 for position in range(length)], 0, length, length - 1)
        [logits] = self._forward([prompt], rows=length, logit_rows=1)
        warm_up(logits[0])
        for rows in self._forward.recorded_rows:  # now, not when somebody waits
            self._forward([Run(0, [0] * rows, length, rows, length)], rows=rows, logit_rows=rows)
        latencies = 0, 0, 0
        if calibrate:
            slots, widths = self._forward.cache.slots, self._widths

            def forward(positions: int, width: int, wanted: int = 1) -> int:
                """Of `wanted` runs, in as many forwards as they need. The same slot over and over: what is computed does not
                matter, only how long it takes."""
                run = Run(0, [0] * positions, length, width, length)
                runs = min(wanted, max(1, self._most_rows // self._forward.rows_of(run)))
                rows = max(width * runs, widths.cheapest(width * runs) if self._exact else 0)
                return self._median_us([run] * runs, rows, rows) * wanted // runs

            if self._exact:
                one_us = forward(1, widths.cheapest(1, self._window))
                latencies = one_us, forward(self._window, self._window), forward(self._window, self._window, slots)
            else:
                latencies = forward(1, 1), 0, forward(1, 1, slots)
        self._forward.cache.release(0)
        self.forwards = 0
        return latencies

    def _fingerprint(self) -> int:
        """Of the logits that a fixed text gets: its last prompt position, and a window after it. Never 0."""
        words = min(97, int(self._config.vocab_size))
        text = [position * 31 % words for position in range(PROMPT_CHUNK + self._window)]
        prompt = Run(0, text[:PROMPT_CHUNK], 0, PROMPT_CHUNK, PROMPT_CHUNK - 1)
        window = Run(0, text[PROMPT_CHUNK:], PROMPT_CHUNK, self._window, PROMPT_CHUNK)
        checksum = 0
        for run, logit_rows in ((prompt, 1), (window, self._window)):
            for logits in self._forward([run], rows=run.width, logit_rows=logit_rows):
                checksum = zlib.crc32(logits.float().cpu().numpy().tobytes(), checksum)
        self._forward.cache.release(0)
        self.forwards = 0
        return checksum or 1

    def _median_us(self, runs: Sequence[Run], rows: int, logit_rows: int) -> int:
        """Of three, or of fewer that took long together: what disturbs a long forward is a small part of it."""
        times_s = list[float]()
        while len(times_s) < 3 and sum(times_s) < _LONG_S:
            times_s.append(self._forward.timed_s(runs, rows=rows, logit_rows=logit_rows))
        return max(1, round(statistics.median(times_s) * 1e6))


def _chosen(sampler: Sampler, logits: torch.Tensor, position: int, guess: Sequence[int]) -> int:
    """Raises RequestError: parameters that nobody foresaw are no fault of the model."""
    try:
        return sampler.choose(logits, position, guess)
    except (
        torch.OutOfMemoryError,
        torch.AcceleratorError,
    ):  # of a forward before, too: it comes out where results are read
        raise
    except Exception as error:
        raise RequestError(f"no token can be chosen: {type(error).__name__}: {error}") from error


def _position(task: Task) -> int:
    """The first input that the next forward for this task must compute."""
    return min(task.session.computed, task.start - 1 + len(task.answer.tokens))


def _whole(options: Mapping[str, OptionValue], name: str, default: int, *, most: int = 1 << 24) -> int:
    value = options.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise EngineError(f"option {name} must be a whole number in [1, {most}], not {value!r}")
    return value

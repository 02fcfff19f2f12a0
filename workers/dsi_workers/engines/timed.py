"""An engine without a model: it waits for exact latencies and says scripted tokens. For tests, planning and benchmarks.

A target's next token is a hash of its seed and all tokens before. So all timed targets with one seed are replicas, and a text
that was built on a wrong prefix is noticed. A drafter is right at a position with the chance `acceptance`. This is drawn from
its seed, the generation's seed and the position; the simulator draws the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import math
import os
import random
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence

from dsi_protocol import MAX_TOLD, OptionValue, prefix_checksum
from dsi_protocol.gumbel import random_bits, stream_key
from dsi_workers.engine import Engine, EngineError, EngineInfo, Interrupt, Task
from dsi_workers.session import Session
from dsi_workers.tree import Branch, Walk

WINDOW = 32
#: Positions of a tree, and rows of a drafting step.
MOST_ROWS = 1024
#: The log probability of a token that it would not say.
_IMPOSSIBLE = -1000.0
#: A step that begins at most so long after the last one was due counts as its immediate successor.
_AT_ONCE_S = 0.002
#: Whoever waits for its turn on a device looks again after so long.
_TURN_S = 0.0001
#: Characters of a device's name.
_LONGEST_NAME = 64


class TimedEngine(Engine):
    """Options: latency_ms (of a target's verification, or a drafter's token), position_ms (added for each position of a forward
    beyond the first), jitter (latencies are lognormal with this coefficient of variation and the mean latency_ms), acceptance,
    alternatives (the chance that a drafter's second choice is right where its first is not; 0 drafts chains),
    seed, vocabulary_size, any_vocabulary (true: the engine says that it works with any), slots (generations side by side),
    chunk (a longer text is read in steps of so many tokens), calibrate (false: Ready reports no latencies), device (a name: the
    steps of all engines on this host with that name take turns, as those of processes on one GPU do; Linux only).

    Raises EngineError.
    """

    def __init__(self, options: Mapping[str, OptionValue], *, drafter: bool) -> None:
        def number(name: str, default: float) -> float:
            value = options.get(name, default)
            if isinstance(value, bool | str) or not value >= 0:
                raise EngineError(f"option {name} of the timed engine must be a number of at least 0, not {value!r}")
            return value

        self.latency_s = number("latency_ms", 0.0) / 1e3
        self.acceptance = number("acceptance", 1.0)
        self._jitter = number("jitter", 0.0)
        self._alternatives = number("alternatives", 0.0)
        self.vocabulary_size = int(number("vocabulary_size", 1000))
        self.seed = int(number("seed", 0))
        self._position_s = number("position_ms", 0.0) / 1e3
        self._chunk = int(number("chunk", 1 << 20))
        slots = int(number("slots", 64))
        self._drafter = drafter
        device = options.get("device", "")
        if not isinstance(device, str) or len(device) > _LONGEST_NAME:
            raise EngineError(
                f"option device of the timed engine must be a name of at most {_LONGEST_NAME} characters, not {device!r}"
            )
        self._device = _Device(device) if device else None
        #: When the last step was due. A token drafted right after another counts from then, so that oversleeping does not add up.
        self._due_s = 0.0
        #: The drafts that would be such successors: generation, and number of tokens before the draft.
        self._due_for: set[tuple[int, int]] = set()
        _sleep_precisely()
        if self.acceptance > 1:
            raise EngineError(f"option acceptance of the timed engine must lie in [0, 1], not {self.acceptance}")
        if not 2 <= self.vocabulary_size < 1 << 32:
            raise EngineError("option vocabulary_size of the timed engine must be at least 2")
        if not 1 <= slots <= 1024 or self._chunk < 1:
            raise EngineError("options slots and chunk of the timed engine must be at least 1, and slots at most 1024")
        latency_us = round(self.latency_s * 1e6) if options.get("calibrate", True) else 0
        position_us = self._position_s * 1e6 if latency_us else 0.0
        rows = MOST_ROWS if self._alternatives or not drafter else 1
        self.info = EngineInfo(
            vocabulary="" if options.get("any_vocabulary") else f"timed-{self.vocabulary_size}",
            vocabulary_size=0 if options.get("any_vocabulary") else self.vocabulary_size,
            max_length=1 << 20,
            window=WINDOW,
            latency_us=latency_us,
            window_latency_us=round(latency_us + position_us * ((rows if drafter else WINDOW) - 1)),
            slots=slots,
            batch_latency_us=round(latency_us + position_us * (slots * (1 if drafter else WINDOW) - 1)),
            rows=rows,
            scores=not drafter,
        )

    def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
        with contextlib.nullcontext() if self._device is None else self._device.turn(interrupt):
            self._step(tasks, interrupt)

    def _step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
        begun = time.perf_counter()
        ends = {id(task): self._end(task) for task in tasks}
        for task in tasks:
            if ends[id(task)] == len(task.session.tokens) and not task.score:
                task.answer.tokens = self._own_tokens(
                    task.session, task.start, task.branches if task.count is None else ()
                )
                if task.alternatives:
                    self._draft_branches(task)
        self.forwards += 1
        if begun - self._due_s < _AT_ONCE_S and any(
            (task.session.generation, len(task.session.tokens)) in self._due_for for task in tasks
        ):
            begun = self._due_s
        self._due_for = set()
        positions = sum(ends[id(task)] - self._begin(task) for task in tasks)
        for task in tasks:
            positions += len(task.branches) if task.count else sum(len(branch.tokens) for branch in task.branches)
        first, length = tasks[0], ends[id(tasks[0])]
        self._due_s = begun + self._latency_for(first.session.sampling.seed, first.start, length)
        self._due_s += self._position_s * (positions - 1)
        interrupt.wait_until(self._due_s)
        for task in tasks:
            session = task.session
            session.computed = ends[id(task)]
            task.done = session.computed == len(session.tokens)
            if task.done and session.sampling.logprobs and task.count is None:
                given = session.tokens[task.start : task.start + MAX_TOLD] if task.score else task.answer.tokens
                self._tell(task, given)
            if self._drafter:
                self._due_for.add((session.generation, len(session.tokens) + 1))

    def _tell(self, task: Task, tokens: Sequence[int]) -> None:
        """Log probabilities of `tokens` from the task's start on: what it says itself is certain."""
        count = min(task.session.sampling.top_logprobs, self.vocabulary_size)
        checksum = task.session.checksum(task.start)
        for token in tokens:
            truth = self._truth(checksum)
            checksum = prefix_checksum([token], checksum)
            task.answer.logprobs.append(0.0 if token == truth else _IMPOSSIBLE)
            task.answer.top_tokens += ((truth + place) % self.vocabulary_size for place in range(count))
            task.answer.top_logprobs += [0.0, *[_IMPOSSIBLE] * (count - 1)][:count]

    def reads_alone(self, task: Task) -> bool:
        return self._end(task) < len(task.session.tokens)

    def _end(self, task: Task) -> int:
        """One past the last position that the next step reads. Only the text before the first answer is read in pieces."""
        begin, length = self._begin(task), len(task.session.tokens)
        return (
            length
            if length - begin <= self._chunk or begin == task.start - 1
            else min(begin + self._chunk, task.start - 1)
        )

    def _begin(self, task: Task) -> int:
        """The first position that the next step reads."""
        return min(task.session.computed, task.start - 1)

    def _own_tokens(self, session: Session, start: int, branches: Sequence[Branch]) -> list[int]:
        walk, tokens = Walk(session.tokens, branches, start), list[int]()
        checksum = session.checksum(start)
        while True:
            tokens.append(self._own_token(session, checksum, walk.position))
            if not walk.takes(tokens[-1]):
                return tokens
            checksum = prefix_checksum(tokens[-1:], checksum)

    def _own_token(self, session: Session, prefix: int, position: int) -> int:
        token = self._truth(prefix)
        wrong = self._drafter and not self._agrees(session.sampling.seed, position)
        return (token + 1) % self.vocabulary_size if wrong else token

    def _draft_branches(self, task: Task) -> None:
        """A second choice for the token that was drafted, and a token for each branch."""
        session, position = task.session, len(task.session.tokens)
        truth = self._truth(session.checksum(position))
        wrong = task.answer.tokens[0] != truth
        bits = random_bits(stream_key(self.seed + session.sampling.seed, position), 1)
        hit = wrong and bits < self._alternatives * 2**64
        task.answer.alternatives = [truth if hit else (truth + 2) % self.vocabulary_size]
        for branch in task.branches:
            prefix = prefix_checksum(branch.tokens, session.checksum(branch.fork))
            task.answer.continued.append(self._own_token(session, prefix, branch.end))

    def _truth(self, prefix: int) -> int:
        """The target's token after the prefix with this checksum."""
        return self._draw(b"truth", prefix) % self.vocabulary_size

    def _agrees(self, generation_seed: int, position: int) -> bool:
        """Whether a drafter says the target's token at this position."""
        bits = random_bits(stream_key(self.seed + generation_seed, position), 0)
        return bits < self.acceptance * 2**64

    def _latency_for(self, generation_seed: int, start: int, length: int) -> float:
        """The latency in seconds of a verification of [start, length). Jitter is a function of the request: so all algorithms
        of a benchmark meet the same jitter."""
        if not self._jitter or not self.latency_s:
            return self.latency_s
        variance = math.log1p(self._jitter**2)
        draw = random.Random(random_bits(stream_key(self.seed + generation_seed, start), 1 + length + self._drafter))
        return draw.lognormvariate(math.log(self.latency_s) - variance / 2, math.sqrt(variance))

    def _draw(self, purpose: bytes, prefix: int) -> int:
        """64 uniform bits: a hash of the seed, the purpose and the checksum of the prefix."""
        digest = hashlib.blake2b(struct.pack("<QI", self.seed, prefix), digest_size=8, person=purpose)
        return int.from_bytes(digest.digest(), "little")


class _Device:
    """What several processes use one after the other."""

    def __init__(self, name: str) -> None:
        self._address = f"\0dsi-timed-{name}"  # of no file, so that nothing is left behind

    @contextlib.contextmanager
    def turn(self, interrupt: Interrupt) -> Iterator[None]:
        with socket.socket(socket.AF_UNIX) as mine:
            while not self._taken_by(mine):
                interrupt.wait_until(time.perf_counter() + _TURN_S)
            yield

    def _taken_by(self, mine: socket.socket) -> bool:
        """Whether the address is free, which one socket at a time can have."""
        try:
            mine.bind(self._address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise EngineError(
                    f"option device of the timed engine does not work on this system: {error.strerror}"
                ) from None
            return False
        return True


def _sleep_precisely() -> None:
    """Let sleeps of this thread end on time. By default Linux may end each 50 µs late, to save wake-ups."""
    if os.uname().sysname == "Linux":
        with contextlib.suppress(OSError):
            pr_set_timerslack = 29
            ctypes.CDLL(None).prctl(pr_set_timerslack, 1)

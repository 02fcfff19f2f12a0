"""An engine with exact latencies, a scripted truth and a scripted acceptance rate: for tests, planning, the paper's tables.

The truth depends on the whole prefix, so text that was built on a wrong prefix differs from the truth and is noticed.
It also depends on the seed alone: every timed target with one seed is a replica of every other.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Mapping

from dsi_protocol import OptionValue, prefix_checksum
from dsi_workers.engines.base import Answer, Engine, EngineError, EngineInfo, Interrupt
from dsi_workers.session import Session

WINDOW = 32


class TimedEngine(Engine):
    """A target takes `latency_ms` for a verification, however long; a drafter takes it for each token."""

    def __init__(self, options: Mapping[str, OptionValue], *, drafter: bool) -> None:
        def number(name: str, default: float) -> float:
            value = options.get(name, default)
            if isinstance(value, bool | str) or not value >= 0:
                raise EngineError(f"option {name} of the timed engine must be a number of at least 0, not {value!r}")
            return value

        self.latency_s = number("latency_ms", 0.0) / 1e3
        self.acceptance = number("acceptance", 1.0)
        self.vocabulary_size = int(number("vocabulary_size", 1000))
        self.seed = int(number("seed", 0))
        self._drafter = drafter
        if self.acceptance > 1:
            raise EngineError(f"option acceptance of the timed engine must lie in [0, 1], not {self.acceptance}")
        if not 2 <= self.vocabulary_size < 1 << 32:
            raise EngineError("option vocabulary_size of the timed engine must be at least 2")
        self.info = EngineInfo(
            vocabulary="" if options.get("any_vocabulary") else f"timed-{self.vocabulary_size}",
            vocabulary_size=0 if options.get("any_vocabulary") else self.vocabulary_size,
            max_length=1 << 20,
            window=WINDOW,
            latency_us=round(self.latency_s * 1e6),
            window_latency_us=0 if drafter else round(self.latency_s * 1e6),
        )

    def verify(self, session: Session, start: int, interrupt: Interrupt) -> Answer:
        begun = time.perf_counter()
        answer: list[int] = []
        checksum = prefix_checksum(session.tokens[:start])
        for position in range(start, len(session.tokens) + 1):
            token = self._truth(checksum)
            if self._drafter and not self._agrees(checksum):
                token = (token + 1) % self.vocabulary_size
            answer.append(token)
            if position == len(session.tokens) or session.tokens[position] != token:
                break
            checksum = prefix_checksum((token,), checksum)
        self.forwards += 1
        interrupt.wait_until(begun + self.latency_s)
        session.computed = len(session.tokens)
        return Answer(answer, [0.0] * len(answer) if session.sampling.logprobs else [])

    def _truth(self, prefix: int) -> int:
        return self._draw(b"truth", prefix) % self.vocabulary_size

    def _agrees(self, prefix: int) -> bool:
        """Whether the drafter is right after this prefix: independent draws, the same in every worker."""
        return self._draw(b"agree", prefix) < self.acceptance * 2**64

    def _draw(self, purpose: bytes, prefix: int) -> int:
        """64 uniform bits that depend on nothing but the seed, the purpose and the prefix."""
        digest = hashlib.blake2b(struct.pack("<QI", self.seed, prefix), digest_size=8, person=purpose)
        return int.from_bytes(digest.digest(), "little")

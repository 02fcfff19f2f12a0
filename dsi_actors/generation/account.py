"""What one generation took: wall clock, forwards, busy time."""

from __future__ import annotations

import time
from collections import deque

from dsi_actors.core import GenerationCore
from dsi_actors.results import GenerationReport, Trace

#: Of each latency, so many are remembered: a long generation must not grow.
_TRACED = 4096


class Account:
    """Times and costs of one generation."""

    def __init__(self) -> None:
        self._begun_s = self._first_s = self._last_s = self._ended_s = time.perf_counter()
        self._first_tokens = self._tokens = 0
        self._forwards = self._useful_forwards = 0
        self._unsettled: dict[int, int] = {}  # forwards of verifications whose use is not known yet
        self._target_busy_us = self._drafter_busy_us = 0
        self._cached_tokens: int | None = None  # of the first server that answered
        self._target_ms: deque[float] = deque(maxlen=_TRACED)
        self._drafter_ms: deque[float] = deque(maxlen=_TRACED)
        self._accepted: deque[bool] = deque(maxlen=_TRACED)

        #: Verifications in flight, and for how long there was one.
        self._verifying = 0
        self._verified_s = self._verifying_since_s = 0.0

    def verification_began(self) -> None:
        if not self._verifying:
            self._verifying_since_s = time.perf_counter()
        self._verifying += 1

    def verification_ended(self) -> None:
        self._verifying -= 1
        if not self._verifying:
            self._verified_s += time.perf_counter() - self._verifying_since_s

    @property
    def verified_ms(self) -> float:
        """For how long something has been verified so far."""
        running_s = time.perf_counter() - self._verifying_since_s if self._verifying else 0.0
        return (self._verified_s + running_s) * 1e3

    def begin(self) -> None:
        self._begun_s = time.perf_counter()

    def commit(self, tokens: int) -> float:
        """Returns the milliseconds since the commit before; 0 for the first one, which has a prompt to wait for."""
        before_s = self._last_s
        self._last_s = time.perf_counter()
        if not self._tokens:
            self._first_s, self._first_tokens = self._last_s, tokens
        self._tokens += tokens
        return (self._last_s - before_s) * 1e3 if self._tokens > tokens else 0.0

    def end(self) -> None:
        self._ended_s = time.perf_counter()

    def verified(self, attempt: int, forwards: int, busy_us: int, cached: int) -> None:
        self.cancelled(forwards, busy_us)
        if self._cached_tokens is None:
            self._cached_tokens = cached
        self._unsettled[attempt] = self._unsettled.get(attempt, 0) + forwards
        self._target_ms.append(busy_us / 1e3)

    def cancelled(self, forwards: int, busy_us: int) -> None:
        self._forwards += forwards
        self._target_busy_us += busy_us

    def settle(self, attempt: int, *, useful: bool) -> None:
        """The core has judged this verification: it committed a token, or it came too late."""
        self._useful_forwards += self._unsettled.pop(attempt, 0) * useful

    def drafting(self, busy_us: int, tokens: int = 0) -> None:
        self._drafter_busy_us += busy_us
        self._drafter_ms.extend([busy_us / 1e3 / max(1, tokens)] * tokens)

    def judged(self, accepted: int, judged: int) -> None:
        """Of `judged` further drafts the first `accepted` were right."""
        self._accepted.extend(place < accepted for place in range(judged))

    def report(self, core: GenerationCore, servers: int, drafter: str) -> GenerationReport:
        counters, policy = core.counters, core.policy
        later_tokens = self._tokens - self._first_tokens
        return GenerationReport(
            algorithm=policy.algorithm,
            sp=servers,
            lookahead=policy.lookahead if policy.max_ahead else 0,
            tokens=self._tokens,
            finish_reason=core.finish_reason or "cancelled",
            ms_per_token=(self._last_s - self._first_s) * 1e3 / later_tokens if later_tokens else 0.0,
            first_token_ms=(self._first_s - self._begun_s) * 1e3 if self._tokens else 0.0,
            total_ms=(self._ended_s - self._begun_s) * 1e3,
            acceptance_rate=counters.accepted / counters.judged if counters.judged else 0.0,
            drafter=drafter if counters.drafted else "",
            drafted_tokens=counters.drafted,
            rejections=counters.rejections,
            alternatives=counters.alternatives,
            alternative_rate=counters.alternatives / counters.offered if counters.offered else 0.0,
            target_forwards=self._forwards,
            wasted_target_forwards=self._forwards - self._useful_forwards,
            target_busy_ms=self._target_busy_us / 1e3,
            drafter_busy_ms=self._drafter_busy_us / 1e3,
            cached_tokens=min(self._cached_tokens or 0, core.prompt_length),
            trace=Trace(tuple(self._target_ms), tuple(self._drafter_ms), tuple(self._accepted)),
        )

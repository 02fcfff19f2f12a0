"""What one generation took: wall clock, forwards, busy time."""

from __future__ import annotations

import time

from dsi_actors.core import GenerationCore
from dsi_actors.results import GenerationReport


class Account:
    """Times and costs of one generation."""

    def __init__(self) -> None:
        self._begun_s = self._first_s = self._last_s = self._ended_s = time.perf_counter()
        self._first_tokens = self._tokens = 0
        self._forwards: dict[int, int] = {}
        self._useful_forwards = 0
        self._target_busy_us = self._drafter_busy_us = 0

    def begin(self) -> None:
        self._begun_s = time.perf_counter()

    def commit(self, tokens: int) -> None:
        self._last_s = time.perf_counter()
        if not self._tokens:
            self._first_s, self._first_tokens = self._last_s, tokens
        self._tokens += tokens

    def end(self) -> None:
        self._ended_s = time.perf_counter()

    def verification(self, attempt: int, forwards: int, busy_us: int) -> None:
        self._forwards[attempt] = forwards
        self._target_busy_us += busy_us

    def useful(self, attempt: int) -> None:
        self._useful_forwards += self._forwards.get(attempt, 0)

    def drafting(self, busy_us: int) -> None:
        self._drafter_busy_us += busy_us

    def report(self, core: GenerationCore, servers: int) -> GenerationReport:
        counters, policy = core.counters, core.policy
        forwards = sum(self._forwards.values())
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
            drafted_tokens=counters.drafted,
            rejections=counters.rejections,
            target_forwards=forwards,
            wasted_target_forwards=forwards - self._useful_forwards,
            target_busy_ms=self._target_busy_us / 1e3,
            drafter_busy_ms=self._drafter_busy_us / 1e3,
        )

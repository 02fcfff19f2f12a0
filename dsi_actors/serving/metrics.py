"""What Prometheus is told. One registry for each service, so that several can live in one process."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from importlib import metadata
from typing import ParamSpec

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from dsi_actors.logs import get_logger
from dsi_actors.results import GenerationReport
from dsi_protocol import PROTOCOL_VERSION

log = get_logger("serving.metrics")

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 60.0)


P = ParamSpec("P")


def _harmless(count: Callable[P, None]) -> Callable[P, None]:
    """An error in counting is logged, and what is counted goes on."""

    @wraps(count)
    def counted(*arguments: P.args, **named: P.kwargs) -> None:
        try:
            count(*arguments, **named)
        except Exception:
            log.exception("a metric could not be counted", metric=count.__name__)

    return counted


class _Registry(CollectorRegistry):
    """Without the series *_created, which tell when a series began: they double the number of series. The library's own switch is
    for the whole process, which may be an application that embeds this service."""

    def collect(self) -> Iterator[Metric]:
        for found in super().collect():
            found.samples = [sample for sample in found.samples if not sample.name.endswith("_created")]
            yield found


class Metrics:
    """Names begin with dsi_; times are in seconds, as Prometheus wants them."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model: str, *, workers: Callable[[str], int], waiting: Callable[[], int]) -> None:
        self._registry = _Registry()
        labels = {"model": model}

        def counter(name: str, words: str, *names: str) -> Counter:
            return Counter(f"dsi_{name}", words, ("model", *names), registry=self._registry)

        def histogram(name: str, words: str) -> Histogram:
            made = Histogram(f"dsi_{name}", words, ("model",), buckets=_SECONDS, registry=self._registry)
            return made.labels(**labels)

        self._model = model
        self._requests = counter("requests", "Requests that ended, by how they did.", "outcome")
        self._generations = counter("generations", "Generations that ended, by why.", "reason")
        self._tokens = counter("tokens", "Tokens of answers, by where they came from.", "origin")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._drafted = counter("drafted_tokens", "Tokens that drafters guessed, whatever became of them.")
        self._rejections = counter("rejections", "Corrections by the target that dropped what was built on a guess.")
        self._alternatives = counter(
            "alternatives", "Tokens that came by an alternative: the drafter's first choice there was wrong."
        )
        self._forwards = counter("target_forwards", "Forwards of target servers, by what became of them.", "use")
        self._busy = counter("busy_seconds", "Time that workers computed.", "role")
        self._first = histogram("time_to_first_token_seconds", "From the start of a generation to its first token.")
        self._between = histogram("token_interval_seconds", "Between commits, per committed token.")
        self._total = histogram("generation_seconds", "From the start of a generation to its end.")
        gauge = Gauge("dsi_generations_running", "Generations that run or wait.", ("model",), registry=self._registry)
        self._running = gauge.labels(**labels)
        waiting_gauge = Gauge("dsi_generations_waiting", "Those that wait.", ("model",), registry=self._registry)
        waiting_gauge.labels(**labels).set_function(waiting)
        ready = Gauge("dsi_workers_ready", "Workers that are ready.", ("model", "role"), registry=self._registry)
        for role in ("target", "drafter"):
            ready.labels(model=model, role=role).set_function(partial(workers, role))
        build = Info("dsi_build", "The version of this service.", ("model",), registry=self._registry)
        build.labels(**labels).info(
            {"version": _version(), "protocol": str(PROTOCOL_VERSION), "python": platform.python_version()}
        )
        ProcessCollector(registry=self._registry)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While a generation runs. One that ends by an exception is counted here, others in `finished`."""
        with self._running.track_inprogress():
            try:
                yield
            except asyncio.CancelledError:
                self._broken_off("cancelled")
                raise
            except Exception:
                self._broken_off("error")
                raise

    @_harmless
    def _broken_off(self, reason: str) -> None:
        self._generations.labels(self._model, reason).inc()

    @_harmless
    def committed(self, accepted: Sequence[bool], took_s: float, *, first: bool) -> None:
        """Tokens that came together, `took_s` after the ones before; which of them had been drafted."""
        if first:
            self._first.observe(took_s)
        else:
            for _ in accepted:
                self._between.observe(took_s / len(accepted))
        self._tokens.labels(self._model, "drafter").inc(sum(accepted))
        self._tokens.labels(self._model, "target").inc(len(accepted) - sum(accepted))

    @_harmless
    def finished(self, report: GenerationReport, reason: str, took_s: float) -> None:
        model = self._model
        self._total.observe(took_s)
        self._generations.labels(model, reason).inc()
        self._drafted.labels(model).inc(report.drafted_tokens)
        self._rejections.labels(model).inc(report.rejections)
        self._alternatives.labels(model).inc(report.alternatives)
        self._forwards.labels(model, "wasted").inc(report.wasted_target_forwards)
        self._forwards.labels(model, "useful").inc(report.target_forwards - report.wasted_target_forwards)
        self._busy.labels(model, "target").inc(report.target_busy_ms / 1e3)
        self._busy.labels(model, "drafter").inc(report.drafter_busy_ms / 1e3)

    @_harmless
    def request(self, outcome: str) -> None:
        self._requests.labels(self._model, outcome).inc()

    @_harmless
    def prompt(self, tokens: int) -> None:
        self._prompt_tokens.labels(self._model).inc(tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _version() -> str:
    try:
        return metadata.version("dsi-actors")
    except metadata.PackageNotFoundError:  # it runs from a checkout
        return "unknown"

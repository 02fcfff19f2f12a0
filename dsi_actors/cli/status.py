"""`dsi-actors status`: the workers and generations of a service that runs (`dsi-actors serve`), live in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from rich.console import Group
from rich.live import Live
from rich.table import Table

from dsi_actors.console.options import SubParsers, add_logging_option
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError

#: The service says something ten times a second.
_TIMEOUT_S = 10.0
_MOST_EVENT_BYTES = 16 << 20
_OVER_MS = 3000.0


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("status", help="workers and generations, live", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is (default %(default)s)")
    parser.add_argument("--key", metavar="KEY", help="an API key of the service, if it wants one")
    parser.add_argument("--once", action="store_true", help="look for a second, say it once")
    parser.add_argument("--json", action="store_true", help="say it once, as one JSON object")
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    seen = Seen()
    async with aclosing(follow(arguments.url, arguments.key)) as states:
        if arguments.once or arguments.json:
            async for state in states:
                seen.take(state)
                if seen.span_ms >= 1000:
                    break
            if arguments.json:
                sys.stdout.write(json.dumps(seen.summary()) + "\n")
            else:
                terminal().print(_picture(seen))
            return 0
        with Live(console=terminal(), auto_refresh=False) as live:
            async for state in states:
                seen.take(state)
                live.update(_picture(seen), refresh=True)
    sys.stderr.write("the service has ended\n")
    return 0


async def follow(url: str, key: str | None) -> AsyncGenerator[dict[str, Any]]:
    """What the dashboard is told, until the service ends. Raises ConfigError."""
    import httpx2  # a tenth of a second, which other commands need not wait

    _check_url(url)
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError("--key has characters that no HTTP header carries: an API key is ASCII")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            httpx2.AsyncClient(headers=headers, timeout=_TIMEOUT_S, follow_redirects=True) as client,
            client.sse(f"{url.rstrip('/')}/dashboard/events", max_event_size=_MOST_EVENT_BYTES) as events,
        ):
            answer = events.response
            if not answer.is_success:
                hint = {401: ": give --key", 404: ": it is no service of dsi-actors serve"}.get(answer.status_code, "")
                raise ConfigError(f"{url} answered {answer.status_code} {answer.reason_phrase}{hint}")
            async for event in events:
                yield json.loads(event.data)
    except httpx2.SSEError:
        raise ConfigError(f"{url} is no service of dsi-actors serve: give the address of one with --url") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        timed_out = isinstance(error, httpx2.TimeoutException)
        reason = f"it says nothing for {_TIMEOUT_S:g} s" if timed_out else str(error) or type(error).__name__
        raise ConfigError(f"no service at {url} ({reason}): start one with dsi-actors serve, or give --url") from None


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"--url {url} is no address: write it as http://127.0.0.1:8000")


class Seen:
    """What a stream of states told: the last one, and sums over the last seconds."""

    def __init__(self) -> None:
        self._state: Mapping[str, Any] = {"workers": [], "running": 0, "waiting": 0, "now_ms": 0.0}
        self._begun_ms: float | None = None
        self._moments: deque[dict[str, Any]] = deque()
        self._tokens: Counter[int] = Counter()  # by generation

    @property
    def span_ms(self) -> float:
        return self._state["now_ms"] - self._begun_ms if self._begun_ms is not None else 0.0

    def take(self, state: Mapping[str, Any]) -> None:
        self._state = state
        if self._begun_ms is None:
            self._begun_ms = state["now_ms"]
        for moment in state["moments"]:
            if moment["is"] == "commit":
                self._tokens[moment["generation"]] += len(moment["accepted"])
            elif moment["is"] == "end":
                self._tokens.pop(moment["generation"], None)
        self._moments.extend(state["moments"])
        while self._moments and self._moments[0]["at_ms"] < state["now_ms"] - _OVER_MS:
            self._moments.popleft()

    def summary(self) -> dict[str, Any]:
        """Rates are of the last three seconds."""
        seconds = max(0.1, min(self.span_ms, _OVER_MS) / 1e3)
        commits = [moment for moment in self._moments if moment["is"] == "commit"]
        accepted = sum(sum(moment["accepted"]) for moment in commits)
        alternatives = sum(len(moment["alternatives"]) for moment in commits)
        rejected = sum(moment["rejected"] for moment in commits)
        started = Counter(moment["worker"] for moment in self._moments if moment["is"] == "verify")
        drafted = sum(
            moment["end"] - moment["start"] + moment["branches"]
            for moment in self._moments
            if moment["is"] == "drafted"
        )
        workers = []
        for worker in self._state["workers"]:
            rate = started[worker["number"]] if worker["role"] == "target" else drafted
            workers.append({**worker, "per_second": round(rate / seconds, 1)})
        return {
            "running": self._state["running"], "waiting": self._state["waiting"],
            "tokens_per_second": round(sum(len(moment["accepted"]) for moment in commits) / seconds, 1),
            "acceptance_rate": round(accepted / (accepted + rejected), 3) if accepted + rejected else None,
            "alternatives_per_second": round(alternatives / seconds, 1),
            "workers": workers,
            "generations": [{"number": number, "tokens": tokens} for number, tokens in self._tokens.items()],
        }  # fmt: skip


def _picture(seen: Seen) -> Group:
    summary = seen.summary()
    rate = summary["acceptance_rate"]
    accepted = f", {rate:.0%} of guesses accepted" if rate is not None else ""
    by_alternative = summary["alternatives_per_second"]
    accepted += f", {by_alternative} tokens per second by alternatives" if by_alternative else ""
    workers = Table("worker", "host", "device", "generations", "verifications or drafts per second")
    for worker in summary["workers"]:
        name = f"{worker['role']} {worker['number']}"
        workers.add_row(name, worker["host"], worker["device"], str(worker["open"]), str(worker["per_second"]))
    generations = Table("generation", "tokens since we look")
    for generation in summary["generations"][-10:]:
        generations.add_row(str(generation["number"]), str(generation["tokens"]))
    return Group(
        f"{summary['running']} generations run, {summary['waiting']} of them wait; "
        f"{summary['tokens_per_second']} tokens per second{accepted}",
        workers,
        *([generations] if summary["generations"] else []),
    )

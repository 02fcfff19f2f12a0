"""What happens in all generations, as it happens, for whoever looks at the dashboard. Nobody looks: nothing is kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi.sse import format_sse_event

from dsi_actors.core.actions import Action, CancelDrafts, EmitTokens, Finish, StartDraft, StartVerify, VerifyGoesOn
from dsi_actors.core.events import DraftsArrived, Event, VerificationAbandoned, VerificationFinished
from dsi_actors.core.tree import main_path_end
from dsi_actors.errors import OrchestratorClosed
from dsi_actors.logs import get_logger
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.serving.errors import ApiError
from dsi_actors.tokenizer import Tokenizer, TokenStream
from dsi_actors.tracing.drafts import Drafts

log = get_logger("serving.watch")

_MOST_VIEWERS = 8
_FLUSH_S = 0.1
#: Between two flushes. What is beyond is not shown, and said to be missing.
_MOST_MOMENTS = 1000
#: A viewer that is further behind, a few seconds, has its stream ended: it may begin again.
_MOST_EVENTS_BEHIND = 64


class Watch:
    """An observer of the orchestrator, and a stream of server-sent events for each viewer.

    Each event is made once for all viewers, so that many of them cost no more than one.
    """

    def __init__(self, orchestrator: Orchestrator, tokenizer: Tokenizer) -> None:
        self._orchestrator = orchestrator
        self._tokenizer = tokenizer
        #: What waits for each viewer. None is the end.
        self._viewers: set[asyncio.Queue[bytes | None]] = set()
        self._flushing: asyncio.Task[None] | None = None
        self._moments: list[dict[str, Any]] = []
        self._missed = 0
        self._failed = False
        self._texts: dict[int, TokenStream] = {}
        self._drafts: dict[int, Drafts] = {}
        self._observation = orchestrator.observe(self._on_moment)

    async def events(self) -> AsyncIterator[bytes]:
        """One event every tenth of a second: who works here, and what happened since the last one. Raises ApiError."""
        if len(self._viewers) >= _MOST_VIEWERS:
            raise ApiError(429, f"{_MOST_VIEWERS} people look at the dashboard already: try again later")
        viewer: asyncio.Queue[bytes | None] = asyncio.Queue(_MOST_EVENTS_BEHIND)
        self._viewers.add(viewer)
        try:
            yield self._event([], 0)
            if self._flushing is None:
                self._flushing = asyncio.create_task(self._flush())
            while (event := await viewer.get()) is not None:
                yield event
        finally:
            self._drop(viewer)

    def end(self) -> None:
        """End the streams of all viewers. Nothing is watched any more."""
        self._observation.end()
        for viewer in list(self._viewers):
            self._end(viewer)

    async def _flush(self) -> None:
        try:
            while self._viewers:
                await asyncio.sleep(_FLUSH_S)
                moments, missed, self._moments, self._missed = self._moments, self._missed, [], 0
                event = self._event(moments, missed)
                for viewer in list(self._viewers):
                    if viewer.full():
                        self._end(viewer)
                    else:
                        viewer.put_nowait(event)
        except OrchestratorClosed:
            self.end()
        finally:
            self._flushing = None

    def _end(self, viewer: asyncio.Queue[bytes | None]) -> None:
        self._drop(viewer)
        while viewer.full():
            viewer.get_nowait()
        viewer.put_nowait(None)

    def _drop(self, viewer: asyncio.Queue[bytes | None]) -> None:
        self._viewers.discard(viewer)
        if not self._viewers:
            self._moments.clear()
            self._texts.clear()
            self._drafts.clear()

    def _event(self, moments: list[dict[str, Any]], missed: int) -> bytes:
        return format_sse_event(data_str=json.dumps({**self._state(), "moments": moments, "missed": missed}))

    def _state(self) -> dict[str, Any]:
        workers = [
            {
                "number": worker.number,
                "role": worker.role,
                "host": worker.hello.host,
                "device": worker.hello.device,
                "open": worker.sharers,
            }
            for worker in self._orchestrator.workers
        ]
        return {
            "now_ms": _now_ms(), "workers": workers, "running": self._orchestrator.running,
            "waiting": self._orchestrator.waiting,
        }  # fmt: skip

    def _on_moment(self, generation: int, item: Event | Action) -> None:
        """Called within the generation: nothing that goes wrong here may reach it."""
        if not self._viewers:
            return
        try:
            moment = self._moment(generation, item)
        except Exception:
            self._missed += 1
            if not self._failed:  # the first one is told
                self._failed = True
                log.exception("the dashboard cannot show what happened")
            return
        if moment is None:
            return
        if len(self._moments) < _MOST_MOMENTS:
            self._moments.append({**moment, "at_ms": _now_ms(), "generation": generation})
        else:
            self._missed += 1

    def _moment(self, generation: int, item: Event | Action) -> dict[str, Any] | None:
        match item:
            case StartVerify(attempt, server, base, tokens, start, parents):
                end, branches = main_path_end(base, tokens, parents)
                return {
                    "is": "verify", "attempt": attempt, "worker": server, "start": start, "end": end, "branches": branches,
                }  # fmt: skip
            case VerifyGoesOn(attempt, server, start):
                return {
                    "is": "verify",
                    "attempt": attempt,
                    "worker": server,
                    "start": start,
                    "end": start,
                    "branches": 0,
                }
            case VerificationFinished(attempt, _, _, tokens):
                return {"is": "verified", "attempt": attempt, "tokens": len(tokens)}
            case VerificationAbandoned(attempt):
                return {"is": "abandoned", "attempt": attempt}
            case StartDraft(attempt, base, tokens, start, drafter=drafter):
                self._drafts.setdefault(generation, Drafts()).requested(attempt, base, tokens, start, drafter)
                return {"is": "draft", "attempt": attempt}
            case CancelDrafts(attempt, drafter):
                if (drafts := self._drafts.get(generation)) is not None:
                    drafts.cancelled(attempt, drafter)
            case DraftsArrived():
                return _drafted(self._drafts.get(generation, Drafts()), item)  # it may have ended
            case EmitTokens(start, tokens, accepted, alternatives):
                stream = self._texts.setdefault(generation, self._tokenizer.stream())
                drafts = self._drafts.setdefault(generation, Drafts())
                settled, rejected = drafts.committed(start, tokens, accepted, alternatives)
                texts = [stream.add(token) for token in tokens]
                return {
                    "is": "commit", "start": start, "texts": texts, "accepted": accepted, "alternatives": alternatives,
                    "rejected": rejected, "blocks": [guess.block for guess in settled],
                }  # fmt: skip
            case Finish(reason):
                ended = self._texts.pop(generation, None)
                self._drafts.pop(generation, None)
                return {"is": "end", "reason": reason, "text": "" if ended is None else ended.flush()}
        return None


def _drafted(drafts: Drafts, event: DraftsArrived) -> dict[str, Any] | None:
    """`block`: its number, None if it came too late. `start`, `end`: positions of its main path. None: nothing is new in it."""
    guesses = drafts.arrived(event.attempt, event.start, event.tokens, event.parents, event.drafter)
    block, branches = None, 0
    start, end = event.start, event.start + len(event.tokens)
    if guesses == []:
        return None
    if guesses:
        main = [guess.position for guess in guesses if guess.main]
        positions = main or [guess.position for guess in guesses]
        start, end = min(positions), max(positions) + 1
        block, branches = drafts.blocks - 1, len(guesses) - len(main)
    elif drafts.follows(event.drafter):
        start = end = drafts.front
    return {
        "is": "drafted", "attempt": event.attempt, "worker": event.drafter, "block": block, "start": start, "end": end,
        "branches": branches,
    }  # fmt: skip


def _now_ms() -> float:
    return round(time.perf_counter() * 1e3, 2)

"""What happens in all generations, as it happens, for whoever looks at the dashboard. Nobody looks: nothing is kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from dsi_actors.core.actions import Action, EmitTokens, Finish, StartDraft, StartVerify
from dsi_actors.core.events import DraftsArrived, Event, VerificationAbandoned, VerificationFinished
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.serving.errors import ApiError
from dsi_actors.tokenizer import Tokenizer, TokenStream

_MOST_VIEWERS = 8
_FLUSH_S = 0.1
#: Between two flushes. What is beyond is not shown, and said to be missing.
_MOST_MOMENTS = 2000


class Watch:
    """An observer of the orchestrator, and a stream of server-sent events for each viewer."""

    def __init__(self, orchestrator: Orchestrator, tokenizer: Tokenizer) -> None:
        self._orchestrator = orchestrator
        self._tokenizer = tokenizer
        self._viewers: set[_Viewer] = set()
        #: Whether the service ends: streams that have no end of their own must not hold it up.
        self.ending: Callable[[], bool] = lambda: False
        self._texts: dict[int, TokenStream] = {}
        #: One past the last position that was guessed in each generation, since the last correction.
        self._guessed: dict[int, int] = {}
        orchestrator.observe(self._on_moment)

    @property
    def viewers(self) -> int:
        return len(self._viewers)

    async def events(self) -> AsyncIterator[str]:
        """One event every tenth of a second: who works here, and what happened since the last one. Raises ApiError."""
        if len(self._viewers) >= _MOST_VIEWERS:
            raise ApiError(429, f"{_MOST_VIEWERS} people look at the dashboard already: try again later")
        viewer = _Viewer()
        self._viewers.add(viewer)
        try:
            while not self.ending():
                yield f"data: {json.dumps({**self._state(), **viewer.take()})}\n\n"
                await asyncio.sleep(_FLUSH_S)
        finally:
            self._viewers.discard(viewer)
            if not self._viewers:
                self._texts.clear()
                self._guessed.clear()

    def _state(self) -> dict[str, Any]:
        workers = [
            {"number": worker.number, "role": worker.role, "device": worker.hello.device, "open": worker.sharers}
            for worker in self._orchestrator.workers
        ]
        return {
            "now_ms": _now_ms(), "workers": workers, "running": self._orchestrator.running,
            "waiting": self._orchestrator.waiting,
        }  # fmt: skip

    def _on_moment(self, generation: int, item: Event | Action) -> None:
        if self._viewers:
            moment = self._moment(generation, item)
            if moment is not None:
                moment |= {"at_ms": _now_ms(), "generation": generation}
                for viewer in self._viewers:
                    viewer.add(moment)

    def _moment(self, generation: int, item: Event | Action) -> dict[str, Any] | None:
        match item:
            case StartVerify(attempt, server, base, tokens, start):
                return {"is": "verify", "attempt": attempt, "worker": server, "start": start, "end": base + len(tokens)}
            case VerificationFinished(attempt, _, _, tokens):
                return {"is": "verified", "attempt": attempt, "tokens": len(tokens)}
            case VerificationAbandoned(attempt):
                return {"is": "abandoned", "attempt": attempt}
            case StartDraft(attempt):
                return {"is": "draft", "attempt": attempt}
            case DraftsArrived(attempt, start, tokens):
                self._guessed[generation] = start + len(tokens)
                return {"is": "drafted", "attempt": attempt, "start": start, "end": start + len(tokens)}
            case EmitTokens(start, tokens, accepted):
                stream = self._texts.setdefault(generation, self._tokenizer.stream())
                rejected = not accepted[-1] and self._guessed.get(generation, 0) >= start + len(tokens)
                if rejected:
                    del self._guessed[generation]
                texts = [stream.add(token) for token in tokens]
                return {"is": "commit", "start": start, "texts": texts, "accepted": accepted, "rejected": rejected}
            case Finish(reason):
                ended = self._texts.pop(generation, None)
                self._guessed.pop(generation, None)
                return {"is": "end", "reason": reason, "text": "" if ended is None else ended.flush()}
        return None


class _Viewer:
    def __init__(self) -> None:
        self._moments: list[dict[str, Any]] = []
        self._missed = 0

    def add(self, moment: dict[str, Any]) -> None:
        if len(self._moments) < _MOST_MOMENTS:
            self._moments.append(moment)
        else:
            self._missed += 1

    def take(self) -> dict[str, Any]:
        moments, missed, self._moments, self._missed = self._moments, self._missed, [], 0
        return {"moments": moments, "missed": missed}


def _now_ms() -> float:
    return round(time.perf_counter() * 1e3, 2)

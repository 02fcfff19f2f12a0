"""The orchestrator as an application of Ray Serve: Serve has HTTP, Ray places the workers, tokens travel over ZeroMQ.

pip install '.[ray,torch,serve]' 'ray[serve]'
ray start --head
serve run --app-dir examples ray_serve:application sp=3 target=your/model
curl "http://127.0.0.1:8000/ask?question=Why+is+the+sky+blue"

One replica is one orchestrator with workers of its own, each on a GPU of its own wherever the cluster has one. It needs no
GPU itself. More replicas (num_replicas=2) share nothing, and the same question has the same answer on each of them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve

import dsi_actors

app = FastAPI()


@serve.deployment(num_replicas=1, max_ongoing_requests=256, graceful_shutdown_timeout_s=30)
@serve.ingress(app)
class Answers:
    """Answers questions. `settings`: of dsi_actors.Config, beside `cluster`."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        config = dsi_actors.Config(cluster="ray", **settings)
        self.orchestrator = dsi_actors.Orchestrator(config)
        await self.orchestrator.__aenter__()  # Serve sends requests once all workers are ready

    async def check_health(self) -> None:
        """Raises if the orchestrator has ended: Serve then starts another replica."""
        _ = self.orchestrator.workers

    async def __del__(self) -> None:
        """Serve calls this after the last request. The workers end, and their GPUs are free."""
        if hasattr(self, "orchestrator"):
            await self.orchestrator.__aexit__(None, None, None)

    @app.get("/ask")
    async def ask(self, question: str, max_tokens: int = 64) -> StreamingResponse:
        answer = self.orchestrator.generate_text(question, max_tokens=max_tokens)
        return StreamingResponse(answer, media_type="text/plain; charset=utf-8")  # a client that leaves cancels it


def application(settings: dict[str, str]) -> serve.Application:
    """What `serve run ray_serve:application sp=3 target=your/model` starts. Numbers are given as text there."""
    numbers = {name: int(settings[name]) for name in ("sp",) if name in settings}
    return Answers.bind({"sp": 1, **settings, **numbers})  # type: ignore[attr-defined]  # the decorator adds it

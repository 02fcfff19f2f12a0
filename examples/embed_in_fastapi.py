"""The orchestrator inside somebody's own FastAPI application, without `dsi-actors serve`.

uvicorn --app-dir examples embed_in_fastapi:app
curl "http://127.0.0.1:8000/ask?question=Why+is+the+sky+blue"
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

import dsi_actors


@asynccontextmanager
async def workers(app: FastAPI) -> AsyncIterator[None]:
    """Target servers and drafter live as long as the application."""
    config = dsi_actors.Config(sp=1)
    async with dsi_actors.Orchestrator(config) as app.state.orchestrator:
        yield


app = FastAPI(lifespan=workers)


@app.get("/ask")
async def ask(request: Request, question: str, max_tokens: int = 64) -> StreamingResponse:
    answer = request.app.state.orchestrator.generate_text(question, max_tokens=max_tokens)
    return StreamingResponse(answer, media_type="text/plain; charset=utf-8")  # a client that leaves cancels it

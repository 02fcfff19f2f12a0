"""The orchestrator inside somebody's own FastAPI application, without `dsi-actors serve`.

uvicorn --app-dir examples embed_in_fastapi:app
curl "http://127.0.0.1:8000/ask?question=Why+is+the+sky+blue"
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

import dsi_actors
from dsi_actors.models import resolve_model
from dsi_actors.tokenizer import Tokenizer


@asynccontextmanager
async def workers(app: FastAPI) -> AsyncIterator[None]:
    """Target servers and drafter live as long as the application."""
    config = dsi_actors.Config(sp=1)
    app.state.tokenizer = Tokenizer(await resolve_model(config.target))
    async with dsi_actors.Orchestrator(config) as app.state.orchestrator:
        yield


app = FastAPI(lifespan=workers)


@app.get("/ask")
async def ask(request: Request, question: str, max_tokens: int = 64) -> StreamingResponse:
    tokenizer: Tokenizer = request.app.state.tokenizer
    # In a thread: a long question takes time, and the workers must hear from this event loop meanwhile.
    prompt_ids = await asyncio.to_thread(tokenizer.encode_chat, [{"role": "user", "content": question}])
    sampling = dsi_actors.Sampling(max_tokens=max_tokens, stop_token_ids=tokenizer.stop_token_ids)

    async def answer() -> AsyncIterator[str]:
        text = tokenizer.stream()
        async for tokens in request.app.state.orchestrator.generate(prompt_ids, sampling):
            yield "".join(text.add(token) for token in tokens)

    return StreamingResponse(answer(), media_type="text/plain; charset=utf-8")  # a client that leaves cancels it

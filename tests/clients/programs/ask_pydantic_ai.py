"""pydantic-ai: output by a tool and by a schema, streamed too, over both of OpenAI's APIs."""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel, extra="forbid"):
    name: Literal["Oslo", "Rome"]
    capital: bool


async def main() -> None:
    provider = OpenAIProvider(base_url=sys.argv[1], api_key="any")
    settings = {"max_tokens": 100, "seed": 1, "parallel_tool_calls": False}
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind("tiny", provider=provider)
        for output in (City, NativeOutput(City)):
            agent = Agent(model, output_type=output, model_settings=settings)
            assert isinstance((await agent.run("A city.")).output, City), (kind, output)
    text = Agent(OpenAIChatModel("tiny", provider=provider), model_settings=settings)
    async with text.run_stream("Say hello.") as streamed:
        assert [piece async for piece in streamed.stream_text()]


asyncio.run(main())

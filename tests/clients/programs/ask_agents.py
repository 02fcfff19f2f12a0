"""openai-agents: an agent with a tool and an output type, streamed too, over both of OpenAI's APIs.

What is asked for has an end, whatever the model says: the agent takes an answer that ran out of tokens for a failure.
"""

import asyncio
import sys
from typing import Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel


class City(BaseModel, extra="forbid"):
    name: Literal["Oslo", "Rome"]
    capital: bool


@function_tool
def count(number: Literal[1, 2]) -> str:
    """Counts."""
    return str(number)


async def main() -> None:
    set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=sys.argv[1], api_key="any", max_retries=0)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model="tiny", openai_client=client)
        settings = ModelSettings(max_tokens=100)
        agent = Agent(name="a", instructions="Answer.", model=model, output_type=City, model_settings=settings)
        assert isinstance((await Runner.run(agent, "A city.")).final_output, City), kind
        calls = Agent(
            name="b", model=model, tools=[count], tool_use_behavior="stop_on_first_tool",
            model_settings=ModelSettings(max_tokens=100, tool_choice="required", parallel_tool_calls=False),
        )  # fmt: skip
        assert (await Runner.run(calls, "Count.")).final_output in ("1", "2"), kind
        streamed = Runner.run_streamed(agent, "A city.")
        assert [event async for event in streamed.stream_events()], kind
        assert isinstance(streamed.final_output, City), kind


asyncio.run(main())

"""instructor: its modes by tools, JSON and JSON schema."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class City(BaseModel, extra="forbid"):
    name: Literal["Oslo", "Rome"]
    capital: bool


plain = openai.OpenAI(base_url=sys.argv[1], api_key="any", max_retries=0)
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(plain, mode=mode)
    found = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "A city."}], response_model=City, max_tokens=100, max_retries=0,
        seed=1,
    )  # fmt: skip
    assert isinstance(found, City), mode

"""Structured output by the service, asked by the official `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serving.test_openai import served
from support.engines import make_byte_model

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    model = make_byte_model(tmp_path_factory.mktemp("bytes"))
    with served(model) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def answer(client: openai.OpenAI, **fields: Any) -> str:
    made = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=200, seed=1, **fields
    )
    [choice] = made.choices
    assert choice.finish_reason == "stop"
    return choice.message.content or ""


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    given = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    found = json.loads(answer(client, response_format=given))
    assert set(found) == {"name", "age"}
    assert 0 <= found["age"] <= 120
    texts = {
        answer(client, extra_body={**more, "dsi": {"algorithm": algorithm}})
        for algorithm in ("ar", "si", "dsi")
        for more in ({"guided_json": SCHEMA}, {"structured_outputs": {"json": json.dumps(SCHEMA)}})
    }
    assert [json.loads(text) for text in texts] == [found]


def test_choice_regex_and_grammar(client: openai.OpenAI) -> None:
    assert answer(client, extra_body={"structured_outputs": {"choice": ["red", "blue"]}}) in ("red", "blue")
    assert answer(client, extra_body={"guided_choice": ["red"]}) == "red"
    assert answer(client, extra_body={"guided_regex": "[0-9]{4}"}).isdecimal()
    assert answer(client, extra_body={"guided_grammar": 'start: "a" "b"~2..2'}) == "abb"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format: json_schema must be an object with a schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "Invalid type"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "x"}, "more than one structure"),
        ({"guided_json": {"type": "string", "minLength": 3, "maxLength": 1}}, "guided_json: the structure cannot be used"),
        ({"guided_choice": "x"}, "guided_choice: choice has the wrong type"),
        ({"structured_outputs": {"speed": 1}}, "structured_outputs: speed is not supported"),
        ({"guided_regex": "(x"}, "unclosed group"),
        ({"guided_json": {"$ref": "#"}}, "guided_json: the structure cannot be used: no text can follow it"),
        ({"guided_json": {"enum": ["x" * 300_000]}}, "guided_json: the structure has .* bytes, over the limit"),
        ({"guided_regex": "x", "ignore_eos": True}, "structure needs stop_token_ids"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_gets_400(client: openai.OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(model="tiny", prompt="x", max_tokens=5, extra_body=fields)

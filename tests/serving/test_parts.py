"""The text of an answer, read as a message: the same however it comes in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsi_actors.errors import ConfigError
from dsi_actors.serving.parts import Message, TemplateReader, hermes_template, loaded

THINKS = "<|im_start|>assistant\n<think>\n"
ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"", "b": [1]}}\n</tool_call>'
OTHER = '<tool_call>\n{"arguments": {"x": "é"}, "name": "g"}\n</tool_call>'
LISTED = '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}]</tool_call>'
ARGUMENTS = '{"a": "}\\"", "b": [1]}'


def read(text: str, beginning: str = "", template: Any = None, *, size: int) -> tuple[str, str, list[tuple[str, str]]]:
    template = hermes_template(calls=True, reasoning=True) if template is None else template
    reader = TemplateReader(loaded(template), beginning, [])
    parts = [part for at in range(0, len(text), size) for part in reader.feed(text[at : at + size])]
    message = Message.of([*parts, *reader.finish()])
    assert len({call.id for call in message.calls}) == len(message.calls)
    return message.content, message.reasoning, [(call.name, call.arguments) for call in message.calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "beginning", "expected"),
    [
        ("  plain text\n ", "", ("  plain text\n ", "", [])),
        ("why\nnot\n</think>\n\nBecause <b>.", THINKS, ("Because <b>.", "why\nnot", [])),
        ("<think>\nwhy", "", ("", "why", [])),
        (f"I call.\n{ONE}\n{OTHER}", "", ("I call.", "", [("f", ARGUMENTS), ("g", '{"x": "é"}')])),
        (f"hm</think>{ONE}", THINKS, ("", "hm", [("f", ARGUMENTS)])),
        (LISTED, "", ("", "", [("f", "{}"), ("g", "{}")])),
        (ONE[:40], "", ("", "", [("f", "{")])),
        ("<tool_call>\nnonsense\n</tool_call>", "", ("\nnonsense\n", "", [])),
        ('<tool_call>{"name": 5}</tool_call>', "", ('{"name": 5}', "", [])),
        ('<tool_call>{"name": "f", "argum', "", ('{"name": "f", "argum', "", [])),
    ],
)
def test_what_hermes_models_write(text: str, beginning: str, expected: object, size: int) -> None:
    assert read(text, beginning, size=size) == expected


def test_arguments_come_as_they_are_written() -> None:
    reader = TemplateReader(loaded(hermes_template(calls=True, reasoning=False)), "", [])
    parts = [reader.feed(character) for character in ONE]
    shown = "".join(part.text for piece in parts[: ONE.index("[")] for part in piece if part.kind == "arguments")
    assert shown == '{"a": "}\\"", "b": '


@pytest.mark.parametrize("size", [1, 1000])
def test_a_template_of_the_models_own(size: int) -> None:
    """As Qwen 3.5 writes calls; arguments get the types of the tool's schema."""
    template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>", "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True, "content": "xml-inline",
                "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {},
        },
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}
    reader = TemplateReader(loaded(template), THINKS, [tool])
    text = "hm</think>\nSo:\n<tool_call>\n<function=f>\n<parameter=n>\n5\n</parameter>\n</function>\n</tool_call>"
    parts = [part for at in range(0, len(text), size) for part in reader.feed(text[at : at + size])]
    message = Message.of([*parts, *reader.finish()])
    assert (message.reasoning, message.content) == ("hm", "So:")
    assert [(call.name, json.loads(call.arguments)) for call in message.calls] == [("f", {"n": 5})]


def test_what_a_template_cannot_read_is_content() -> None:
    template = {
        "start_anchor": "x",
        "fields": {"tool_calls": {"open": "<c>", "close": "</c>", "content": "json"}, "content": {}},
    }
    for size in (1, 1000):
        content, _, calls = read("a<c>{broken</c> b", template=template, size=size)
        assert "{broken" in content
        assert content.endswith(" b")
        assert not calls


def test_a_template_that_is_none_is_told() -> None:
    with pytest.raises(ConfigError, match="response template cannot be used"):
        loaded({"fields": {}})

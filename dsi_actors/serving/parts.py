"""What the text of an answer is to a message: content, reasoning, calls of tools. Read as it comes.

How a model writes calls and reasoning is declared by its response template (transformers), or else taken to be the format of
Hermes, which most models write: <tool_call>{"name": ..., "arguments": ...}</tool_call>, and <think>...</think>.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dsi_actors.errors import ConfigError
from dsi_actors.text import Part

#: Fields of response templates that hold reasoning.
_REASONING = ("reasoning_content", "thinking", "reasoning")
#: The beginning of a call whose arguments are an object: from here on they are given as they come.
_CALL_BEGUN = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class Reader(Protocol):
    """Feed it the text of an answer. It is for one answer."""

    def feed(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """What was held back, now that nothing follows."""


class PlainReader:
    """All is content."""

    def feed(self, text: str) -> list[Part]:
        return [Part("content", text)] if text else []

    def finish(self) -> list[Part]:
        return []


class TemplateReader:
    """Reads by a response template. What does not follow it is content, as it came."""

    def __init__(self, template: Any, beginning: str, tools: Sequence[Mapping[str, Any]]) -> None:
        """`template`: of `loaded`. `beginning`: what the chat template wrote of the answer, such as <think>."""
        self._parser = _library().ResponseParser(template, prefix=beginning, tools=list(tools))
        self._failed = False
        #: The field that is written to, and all of its text so far.
        self._field, self._body = "", ""
        #: White space at the end of a text is held back: it counts only if something follows. At its beginning it does not
        #: count behind something else.
        self._blank = ""
        self._begins, self._is_first = True, True
        #: The arguments of a call that are given as they come.
        self._arguments: _Arguments | None = None
        self._calls = 0
        self._take(self._parser.initial_events)

    def feed(self, text: str) -> list[Part]:
        if not text:
            return []
        if self._failed:
            return [Part("content", text)]
        try:
            return self._take(self._parser.feed(text))
        except Exception:
            return self._give_up(text)

    def finish(self) -> list[Part]:
        if self._failed:
            return []
        try:
            _, events = self._parser.finalize()
            parts = self._take(events)
        except Exception:
            return self._give_up("")
        if self._is_first and self._blank:
            parts.append(Part("content", self._blank))
        return parts

    def _give_up(self, text: str) -> list[Part]:
        """The template cannot be followed: the rest is content."""
        self._failed = True
        raw = ("" if self._arguments or self._field != "tool_calls" else self._body) + text
        return [Part("content", raw)] if raw else []

    def _take(self, events: Iterable[Mapping[str, Any]]) -> list[Part]:
        parts: list[Part] = []
        for event in events:
            match event:
                case {"type": "region_open", "field": str(name)}:
                    self._is_first = self._is_first and name == "content"
                    self._field, self._body, self._blank = name, "", ""
                    self._begins, self._arguments = True, None
                case {"type": "region_chunk", "text": str(text)}:
                    self._body += text
                    parts += self._call(text) if self._field == "tool_calls" else self._text(text)
                case {"type": "region_close", "value": value} if self._field == "tool_calls":
                    parts += self._called(value)
        return parts

    def _text(self, text: str) -> list[Part]:
        text = self._blank + text
        if self._begins and not self._is_first:
            text = text.lstrip()
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        self._begins = self._begins and not shown
        return [Part("reasoning" if self._field in _REASONING else "content", shown)] if shown else []

    def _call(self, text: str) -> list[Part]:
        parts = []
        if self._arguments is None:
            begun = _CALL_BEGUN.match(self._body)
            if begun is None:
                return []
            self._arguments = _Arguments()
            parts.append(self._new_call(begun[1]))
            text = self._body[begun.end() :]
        shown = self._arguments.add(text)
        return [*parts, Part("arguments", shown, self._calls - 1)] if shown else parts

    def _called(self, value: Any) -> list[Part]:
        """The call is complete."""
        if self._arguments is not None:
            return []
        parts: list[Part] = []
        for called in value if isinstance(value, list) else [value]:
            functions = called.get("function", called) if isinstance(called, dict) else called
            for function in functions if isinstance(functions, list) else [functions]:
                name = function.get("name") if isinstance(function, dict) else None
                if not isinstance(name, str) or not name:
                    return [Part("content", self._body)]
                arguments = function.get("arguments", function.get("parameters", {}))
                text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                parts += [self._new_call(name), Part("arguments", text, self._calls - 1)]
        return parts

    def _new_call(self, name: str) -> Part:
        self._calls += 1
        return Part("call", name, self._calls - 1, f"call_{secrets.token_hex(12)}")


class _Arguments:
    """Finds the end of an object in JSON, as it comes."""

    def __init__(self) -> None:
        self._depth, self._in_text, self._escaped = 0, False, False
        self._over = False

    def add(self, text: str) -> str:
        """As much of the text as belongs to the object."""
        for place, character in enumerate(text):
            if self._over:
                return text[:place]
            if self._in_text:
                self._in_text = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                self._over = self._depth == 0
        return text


@dataclass(slots=True)
class Message:
    """A whole message."""

    content: str = ""
    reasoning: str = ""
    calls: list[Called] = field(default_factory=list)

    @staticmethod
    def of(parts: Iterable[Part]) -> Message:
        found = Message()
        texts: dict[tuple[str, int], list[str]] = {}
        for part in parts:
            if part.kind == "call":
                found.calls.append(Called(part.id, part.text, ""))
            else:
                texts.setdefault((part.kind, part.place), []).append(part.text)
        found.content = "".join(texts.get(("content", 0), ()))
        found.reasoning = "".join(texts.get(("reasoning", 0), ()))
        for place, call in enumerate(found.calls):
            call.arguments = "".join(texts.get(("arguments", place), ()))
        return found


@dataclass(slots=True)
class Called:
    id: str
    name: str
    #: JSON, as far as the model wrote JSON.
    arguments: str


def hermes_template(*, calls: bool, reasoning: bool) -> dict[str, Any]:
    """The response template of models that declare none."""
    fields: dict[str, Any] = {"content": {"content": "text"}}
    if calls:
        fields["tool_calls"] = {
            "open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
            "content_args": {"allow_non_json": True}, "transform": {"type": "function", "function": "{content}"},
        }  # fmt: skip
    if reasoning:
        fields["reasoning_content"] = {"open": "<think>", "close": "</think>", "content": "text"}
    # The anchor is nowhere: all of the beginning is read.
    return {"start_anchor": "\x00", "fields": fields}


def loaded(template: Mapping[str, Any]) -> Any:
    """The template, checked. Raises ConfigError."""
    module = _library().response_templates
    try:
        return module.load_response_template(dict(template))
    except Exception as error:
        raise ConfigError(
            f"the model's response template cannot be used ({error}): report it to the model's makers"
        ) from None


def _library() -> Any:
    try:
        from transformers.utils import chat_parsing
        from transformers.utils.chat_parsing import response_templates  # noqa: F401  an attribute of the package now
    except ImportError:
        raise ConfigError(
            "tools and reasoning need transformers 5.23 or later on the machine of the service: pip install 'dsi-actors[serve]'"
        ) from None
    return chat_parsing

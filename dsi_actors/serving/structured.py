"""What a request says about the form of its answer: response_format, vLLM's structured_outputs, and tools that must be called."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsi_actors.errors import ConfigError
from dsi_actors.serving.errors import ApiError
from dsi_actors.serving.messages import Tool
from dsi_actors.serving.schemas import AnyRequest, ChatRequest, NamedTool, ResponseFormat
from dsi_actors.structure import Structure

#: How each kind of structure is made. The kinds are the names of structured_outputs; with "guided_" before them they are
#: fields of a request, too.
_MAKERS: Mapping[str, tuple[type | tuple[type, ...], Callable[[Any], Structure]]] = {
    "json": ((dict, str), lambda schema: Structure.json_schema(_schema(schema))),
    "regex": (str, Structure.regex),
    "choice": (list, Structure.choice),
    "grammar": (str, Structure.lark),
}
#: Calls of tools in one answer that must call one.
_MOST_CALLS = 16


@dataclass(frozen=True, slots=True)
class _Asked:
    """A structure that a field of a request asks for."""

    field: str
    kind: str
    value: Any


def structure_of(asked: AnyRequest) -> Structure | None:
    """The form that the answer must have, or None. It takes up to some tenths of a second. Raises ApiError."""
    found = [*_of_response_format(asked.response_format), *_of_structured_outputs(asked)]
    forced = asked.forced_tools if isinstance(asked, ChatRequest) else []
    tools = asked.callable_tools if isinstance(asked, ChatRequest) else []
    fields = [one.field for one in found] + (["tool_choice"] if forced else [])
    if len(fields) > 1:
        raise ApiError(400, f"{' and '.join(fields)} ask for more than one structure: leave one out", param=fields[0])
    try:
        if forced:
            return _calls(asked, forced, None)
        for one in found:
            if not isinstance(one.value, _MAKERS[one.kind][0]):
                raise ConfigError(f"{one.kind} has the wrong type")
            if not tools:
                return _MAKERS[one.kind][1](one.value)
            if one.kind != "json":
                raise ConfigError(f"{one.kind} and tools exclude each other: leave one out")
            return _calls(asked, tools, one.value)  # of a type that was checked
    except ConfigError as error:
        raise ApiError(400, f"{fields[0]}: {error}", param=fields[0]) from None
    return None


def _calls(asked: AnyRequest, tools: Sequence[Tool], otherwise: Any) -> Structure:
    if isinstance(otherwise, str):
        try:
            otherwise = json.loads(otherwise)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the JSON schema is no JSON: {error}") from None
        if not isinstance(otherwise, dict):
            raise ConfigError("beside tools, the JSON schema must be an object")
    several = (
        isinstance(asked, ChatRequest) and asked.parallel_tool_calls and not isinstance(asked.tool_choice, NamedTool)
    )
    most = _MOST_CALLS if several else 1
    functions = {tool.function.name: tool.function.schema_of_arguments for tool in tools}
    return Structure.tool_calls(functions, most=most, otherwise=otherwise)


def _of_response_format(given: ResponseFormat | None) -> Iterator[_Asked]:
    if given is None or given.type == "text":
        return
    if given.type == "json_object":
        yield _Asked("response_format", "json", {"type": "object"})
    elif given.json_schema is None or given.json_schema.schema_ is None:
        raise ApiError(400, "response_format: json_schema must be an object with a schema", param="response_format")
    else:
        yield _Asked("response_format", "json", given.json_schema.schema_)


def _of_structured_outputs(asked: AnyRequest) -> Iterator[_Asked]:
    """What vLLM's fields ask for."""
    name = "structured_outputs"
    options = {key: value for key, value in (asked.structured_outputs or {}).items() if value is not None}
    if unknown := sorted(options.keys() - _MAKERS.keys() - {"json_object"}):
        raise ApiError(400, f"{name}: {unknown[0]} is not supported", param=name)
    if (any_object := options.pop("json_object", False)) not in (True, False):
        raise ApiError(400, f"{name}: json_object must be true or false", param=name)
    if any_object:
        yield _Asked(name, "json", {"type": "object"})
    for kind in _MAKERS:
        for field, value in ((name, options.get(kind)), (f"guided_{kind}", getattr(asked, f"guided_{kind}"))):
            if value is not None:
                yield _Asked(field, kind, value)


def _schema(schema: dict[str, Any] | str) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)

"""What a request says about the form of its answer: OpenAI's response_format, vLLM's structured_outputs and guided_json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from dsi_actors.errors import ConfigError
from dsi_actors.serving.errors import ApiError
from dsi_actors.serving.schemas import AnyRequest, ResponseFormat
from dsi_actors.structure import Structure

#: By the names of structured_outputs; with "guided_" before them they are fields of a request, too.
_MAKERS: Mapping[str, tuple[type | tuple[type, ...], Callable[[Any], Structure]]] = {
    "json": ((dict, str), lambda schema: Structure.json_schema(_schema(schema))),
    "regex": (str, Structure.regex),
    "choice": (list, Structure.choice),
    "grammar": (str, Structure.lark),
}


def structure_of(asked: AnyRequest) -> Structure | None:
    """The form that the answer must have, or None. It takes up to some tenths of a second. Raises ApiError."""
    found: list[tuple[str, Callable[[], Structure]]] = []
    given = asked.response_format
    if given is not None and given.type != "text":
        found.append(("response_format", lambda: _of_response_format(given)))
    options = _present(asked.structured_outputs)
    if unknown := sorted(options.keys() - _MAKERS.keys() - {"json_object"}):
        raise ApiError(400, f"structured_outputs: {unknown[0]} is not supported", param="structured_outputs")
    if (any_object := options.pop("json_object", False)) not in (True, False):
        raise ApiError(400, "structured_outputs: json_object must be true or false", param="structured_outputs")
    if any_object:
        found.append(("structured_outputs", Structure.json_object))
    for name in _MAKERS:
        for field, value in (("structured_outputs", options.get(name)), (f"guided_{name}", _guided(asked, name))):
            if value is not None:
                found.append((field, lambda name=name, value=value: _made(name, value)))  # type: ignore[misc]
    if len(found) > 1:
        fields = " and ".join(field for field, _ in found)
        raise ApiError(400, f"{fields} ask for more than one structure: leave one out", param=found[0][0])
    for field, make in found:
        try:
            return make()
        except ConfigError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from None
    return None


def _of_response_format(given: ResponseFormat) -> Structure:
    if given.type == "json_object":
        return Structure.json_object()
    if given.json_schema is None or given.json_schema.schema_ is None:
        raise ConfigError("json_schema must be an object with a schema")
    return Structure.json_schema(_schema(given.json_schema.schema_))


def _made(name: str, value: object) -> Structure:
    kinds, make = _MAKERS[name]
    if not isinstance(value, kinds):
        raise ConfigError(f"{name} has the wrong type")
    return make(value)


def _schema(schema: dict[str, Any] | str) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)


def _guided(asked: AnyRequest, name: str) -> object:
    found: object = getattr(asked, f"guided_{name}")
    return found


def _present(given: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (given or {}).items() if value is not None}

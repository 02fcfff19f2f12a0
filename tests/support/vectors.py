"""The golden vectors of protocol/vectors, and messages as they stand in them."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import dsi_protocol
from dsi_protocol import MESSAGES, Message, SamplingParameters

VECTORS = Path(dsi_protocol.__file__).parent.parent / "vectors"


def load(name: str) -> dict[str, Any]:
    """The content of one file."""
    content: dict[str, Any] = json.loads((VECTORS / name).read_text(encoding="utf-8"))
    return content


def cases(name: str) -> list[Any]:
    """The cases of one file, each as a parameter of a test with the case's name."""
    return [pytest.param(case, id=case["name"]) for case in load(name)["cases"]]


def as_json(message: Message) -> dict[str, Any]:
    """The message as an object of JSON, its name as `type`, without optional fields that have their default."""
    return {"type": type(message).__name__, **_said(message)}


def _said(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that do not have their default."""
    said = {each.name: getattr(record, each.name) for each in fields(record)}
    defaults = {each.name: each.default for each in fields(record)}
    return {name: _plain(value) for name, value in said.items() if value != defaults[name]}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return _said(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def from_json(said: dict[str, Any]) -> Any:
    """The message that such an object stands for."""
    values = {key: _tuples(value) for key, value in said.items()}
    if "sampling" in values:
        sampling = {key: _tuples(value) for key, value in values["sampling"].items()}
        values["sampling"] = SamplingParameters(**sampling)
    by_name = {message.__name__: message for message in MESSAGES}
    return by_name[values.pop("type")](**values)

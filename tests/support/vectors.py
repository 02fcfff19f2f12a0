"""The golden vectors of protocol/vectors, and messages as they stand in them."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

import dsi_protocol
from dsi_protocol import MESSAGES, Message

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
    defaults = {each.name: each.default for each in fields(message)}
    values = {key: value for key, value in asdict(message).items() if value != defaults[key]}
    return {
        "type": type(message).__name__,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()},
    }


def from_json(said: dict[str, Any]) -> Any:
    """The message that such an object stands for."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    by_name = {message.__name__: message for message in MESSAGES}
    return by_name[values.pop("type")](**values)

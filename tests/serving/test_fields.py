"""The fields of requests, as the documentation lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from dsi_actors.serving.fields import kinds_of
from dsi_actors.serving.responses import ResponsesRequest
from dsi_actors.serving.schemas import ChatRequest, CompletionRequest

KINDS = {"understood": "understood", "taken, and changes nothing": "label", "refused": "refused"}


#: Each path, and what clients send there.
DOORS = [
    ("/v1/chat/completions", ChatRequest),
    ("/v1/completions", CompletionRequest),
    ("/v1/responses", ResponsesRequest),
]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", ChatRequest),
        ("/v1/completions", CompletionRequest),
        ("/v1/responses", ResponsesRequest),
    ],
)
def test_the_table_of_fields_is_that_of_the_schema(path: str, kind: type[BaseModel]) -> None:
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^### `{path}`\n(.*?)^###? ", page, re.MULTILINE | re.DOTALL)
    told: dict[str, str] = {}
    for words, fields in re.findall(rf"^\| ({'|'.join(KINDS)}) \|(.*)\|$", section, re.MULTILINE):
        for name in re.findall("`([^`]+)`", fields):
            assert name not in told, f"{name} is there twice"
            told[name] = KINDS[words]
    assert told == kinds_of(kind)

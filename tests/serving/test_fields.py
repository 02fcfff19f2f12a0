"""The fields of requests, as the documentation lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsi_actors.serving.doors import DOORS, Door
from dsi_actors.serving.fields import kinds_of

KINDS = {"understood": "understood", "taken, and changes nothing": "label", "refused": "refused"}


@pytest.mark.parametrize(("path", "door"), DOORS.items(), ids=list(DOORS))
def test_the_table_of_fields_is_that_of_the_schema(path: str, door: Door) -> None:
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^### `{path}`\n(.*?)^###? ", page, re.MULTILINE | re.DOTALL)
    told: dict[str, str] = {}
    for words, fields in re.findall(rf"^\| ({'|'.join(KINDS)}) \|(.*)\|$", section, re.MULTILINE):
        for name in re.findall("`([^`]+)`", fields):
            assert name not in told, f"{name} is there twice"
            told[name] = KINDS[words]
    assert told == kinds_of(door.kind)

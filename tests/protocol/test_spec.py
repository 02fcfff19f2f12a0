"""SPEC.md against the code: the tables of its messages, its codes, its limits and its worked exchange."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import dsi_protocol
from dsi_protocol import MAX_FRAME_BYTES, MAX_REPLY_FRAME_BYTES, MESSAGES, Message, SamplingParameters
from dsi_protocol.fields import (
    BigText,
    Boolean,
    Double,
    OptionMap,
    PackedFloats,
    PackedTokens,
    Record,
    ShortText,
    TokenLists,
    Unsigned,
    schema_of,
)
from support.vectors import VECTORS, load

SPEC = (Path(dsi_protocol.__file__).parent.parent / "SPEC.md").read_text(encoding="utf-8")
KINDS = {
    Boolean: "bool",
    Double: "f64",
    ShortText: "text",
    PackedTokens: "tokens",
    PackedFloats: "floats",
    OptionMap: "options",
    Record: "map",
    BigText: "long text",
    TokenLists: "lists",
}
LETTERS = {"orchestrator": "O", "target": "T", "drafter": "D"}


def rows_of(part: str) -> list[list[str]]:
    """The rows of a table whose first cells stand in backticks."""
    return [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| `.*$", part, flags=re.MULTILINE)]


def sections() -> dict[str, tuple[int, list[tuple[str, str]]]]:
    """For each message of section 4 its number, and the names and types of its fields."""
    found = {}
    for part in re.split(r"^### 4\.\d+ ", SPEC.partition("## 5. ")[0], flags=re.MULTILINE)[1:]:
        heading = re.match(r"(\w+) \((\d+)\), (W→O|O→W|both ways)\n", part)
        assert heading, part[:80]
        table = part.partition("\n**The fields of")[0]
        rows = rows_of(table)
        assert all(len(row) == 6 and row[4] for row in rows), "name, type, range, and what it means"
        found[heading[1]] = (int(heading[2]), [(row[1].strip("`"), row[2]) for row in rows])
    return found


def fields_of(record: type[Any]) -> list[tuple[str, str]]:
    return [
        (name, f"u{kind.bits}" if isinstance(kind, Unsigned) else KINDS[type(kind)]) for name, kind in schema_of(record)
    ]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_the_table_of_a_message_is_its_fields(message: type[Message]) -> None:
    assert sections()[message.__name__] == (message.TYPE, fields_of(message))


def test_the_table_of_sampling_is_its_fields() -> None:
    table = SPEC.partition("**The fields of `sampling`.**")[2].partition("### ")[0]
    assert [(row[1].strip("`"), row[2]) for row in rows_of(table)] == fields_of(SamplingParameters)


def test_there_is_no_other_message() -> None:
    assert set(sections()) == {message.__name__ for message in MESSAGES}


def test_the_worked_exchange_is_that_of_the_vectors() -> None:
    section = SPEC.partition("## 8. ")[2].partition("## 9. ")[0]
    shown = re.findall(r"^ {4} ?(\d+)  (\w)→(\w)  (.+(?:\n {13}.+)*)", section, flags=re.MULTILINE)
    expected = []
    for number, line in enumerate(load("exchange.json")["cases"], 1):
        fields = dict(line["message"])
        name = fields.pop("type")
        words = [name, *(f"{key}={json.dumps(value)}" for key, value in fields.items())]
        expected.append((str(number), LETTERS[line["from"]], LETTERS[line["to"]], " ".join(words)))
    assert [(number, source, to, " ".join(words.split())) for number, source, to, words in shown] == expected


def test_the_bytes_of_a_message_are_those_of_the_vectors() -> None:
    block = SPEC.partition("Message 19 as bytes:")[2].partition("## 9. ")[0]
    shown = "".join(re.findall(r"^ {4}((?:[0-9a-f]{2} )+)", block, flags=re.MULTILINE)).replace(" ", "")
    assert shown == load("exchange.json")["cases"][18]["wire"]


def test_limits_are_those_of_the_code() -> None:
    assert f"| frame to a worker | {MAX_FRAME_BYTES:,} bytes |" in SPEC
    assert f"| frame to the orchestrator | {MAX_REPLY_FRAME_BYTES:,} bytes |" in SPEC


def test_every_section_that_is_named_is_there() -> None:
    there = set(re.findall(r"^##+ (\d+(?:\.\d+)?)", SPEC, flags=re.MULTILINE))
    number = r"\d+(?:\.\d+)?"
    groups = re.findall(rf"[Ss]ections? ({number}(?:(?:, | and | to | or ){number})*)", SPEC)
    named = {each for group in groups for each in re.findall(number, group)}
    assert len(named) > 20
    assert named <= there


def test_every_file_of_vectors_is_listed() -> None:
    listed = set(re.findall(r"^\| `vectors/(\w+\.json)` \|", SPEC, flags=re.MULTILINE))
    assert listed == {path.name for path in VECTORS.iterdir()}
